"""The whole configuration: one member of a sweep, and which of its settings contradict one another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evals import HELD_OUT, JUDGED
from evolve.config.engines import Engine
from evolve.config.evaluation import Endpoint, Eval, Judge, NoJudge, Questions, StandIn
from evolve.config.method import (
    Data,
    Filter,
    Iteration,
    Loss,
    Model,
    RewardModel,
    Sampling,
    Strategy,
    Template,
    Trainer,
)
from evolve.config.resources import Resources
from evolve.config.section import RUNTIME, Section, Seed, refuse


class Wandb(Section):
    mode: Literal["auto", "offline", "online", "disabled"]
    project: str
    entity: str | None


class Config(Section):
    """One member of a sweep: everything that decides its numbers, and where it runs."""

    model: Model
    data: Data
    strategy: Strategy
    sampling: Sampling
    template: Template
    loss: Loss
    filter: Filter
    reward_model: RewardModel
    iteration: Iteration
    engine: Engine
    trainer: Trainer
    judge: Annotated[NoJudge | Judge, Field(discriminator="mode")]
    annotator: Annotated[Endpoint | StandIn, Field(discriminator="kind")]
    eval: Eval
    seed: Seed
    resources: Annotated[Resources, RUNTIME]
    wandb: Annotated[Wandb, RUNTIME]
    output: Annotated[str, Field(min_length=1), RUNTIME]
    dry_run: Annotated[bool, RUNTIME]

    @property
    def eval_scorer(self) -> str:
        if self.eval.scorer != "auto":
            return self.eval.scorer
        return "verifier" if self.data.verifier else "reward_model"

    @property
    def annotating_scorer(self) -> str:
        """Which scorer stands in for a judge of benchmarks."""
        scorer = self.annotator.scorer if isinstance(self.annotator, StandIn) else "auto"
        return scorer if scorer != "auto" else "verifier" if self.data.verifier else "reward_model"

    @property
    def asked(self) -> dict[str, Questions]:
        """The settings of the benchmarks that ask questions of their own, by name; lm-eval's tasks share theirs."""
        names = [name for name in self.eval.benchmarks if name not in HELD_OUT]
        return {name: getattr(self.eval, name, self.eval.harness) for name in names}

    def selects(self, own: Questions) -> bool:
        """Whether eval.select has a say in the several answers to a benchmark's questions."""
        strategy = self.eval.test_time
        return "best" in own.pick or bool(own.pick and strategy and strategy.expand == "best")

    @property
    def trained_iterations(self) -> int:
        return self.iteration.count if self.loss.pt != "none" else 0

    @property
    def uses_reward_model(self) -> bool:
        needs: list[str] = [self.filter.scorer] if self.trained_iterations else []
        needs += [self.eval_scorer] if set(HELD_OUT) & set(self.eval.benchmarks) else []
        needs += [self.eval.select] if "test_time" in self.eval.benchmarks else []
        if isinstance(self.annotator, StandIn) and set(JUDGED) & set(self.eval.benchmarks):
            needs += [self.annotating_scorer]
        needs += [self.eval.select for own in self.asked.values() if self.selects(own)]
        return "reward_model" in needs

    @property
    def trains_reward_model(self) -> bool:
        return self.uses_reward_model and self.reward_model.path is None

    # Settings that are each allowed, and contradict one another.

    @model_validator(mode="after")
    def _scorers_agree(self) -> Config:
        """Who scores, and what there is to score by."""
        if self.data.verifier is None:
            if self.filter.scorer == "verifier":
                refuse(
                    f"filter.scorer=verifier: data.name={self.data.name} has no verifier; "
                    "take filter=reward_model or filter=rule"
                )
            if self.eval.scorer == "verifier":
                refuse(
                    f"eval.scorer=verifier: data.name={self.data.name} has no verifier; take eval.scorer=reward_model"
                )
            if self.eval.select == "verifier" and "test_time" in self.eval.benchmarks:
                refuse(
                    f"eval.select=verifier: data.name={self.data.name} has no verifier; take eval.select=reward_model"
                )
        scorers = {"filter.scorer": self.filter.scorer, "eval.scorer": self.eval.scorer}
        for key, scorer in scorers.items():
            if scorer == "judge" and self.judge.mode == "none":
                refuse(f"{key}=judge: judge.name=none; take judge=policy, judge=policy_pairwise or judge=server")
        engines = {"engine": self.engine} | ({"judge.engine": self.judge.engine} if self.judge.mode != "none" else {})
        for key, engine in engines.items():
            if engine.name == "openai" and engine.url and engine.model is None:
                refuse(
                    f"{key}.model: not set; of a server that runs, its name is all that tells one model from another"
                )
        if self.judge.mode != "none":
            if self.eval.scorer == "judge" and self.judge.model == "policy":
                refuse(
                    "eval.scorer=judge: judge.model=policy would measure each model by itself; "
                    "set judge.model to one and the same model"
                )
            looks = (self.strategy.expand == "best" and self.filter.scorer == "judge") or (
                self.eval.stop == "score_drop" and self.eval.scorer == "judge"
            )
            if looks and self.judge.mode == "pairwise":
                refuse("judge.mode=pairwise: compares answers, and strategy.expand or eval.stop scores them one by one")
            looks = looks or (self.loss.pt == "rewards" and self.filter.scorer == "judge")
            if looks and self.judge.engine.name == "vllm":
                refuse(
                    "judge.engine.name=vllm: strategy.expand, eval.stop or loss.pt has it beside the policy; take hf"
                )
        return self

    @model_validator(mode="after")
    def _evaluation_agrees(self) -> Config:
        """What is measured, on what data."""
        if self.data.verifier in ("math", "exact") and self.data.gold is None:
            refuse(
                f"data.verifier={self.data.verifier}: compares with a reference answer; set data.gold to the "
                "column that holds it"
            )
        if self.data.path == "embedded" and (self.data.gold is not None or self.data.prompt != "prompt"):
            refuse("data.gold, data.prompt: data.path=embedded has no columns; leave them as they are")
        if isinstance(self.annotator, Endpoint) and (self.annotator.serve is None) != (self.annotator.path is None):
            refuse(
                "annotator.serve, annotator.path: one is set; a server that is started here serves the model in path"
            )
        if isinstance(self.annotator, StandIn) and self.annotator.scorer == "verifier" and not self.data.verifier:
            refuse(f"annotator.scorer=verifier: data.name={self.data.name} has no verifier; take reward_model")
        room = self.engine.max_length or self.data.max_length
        for name, own in self.asked.items():
            key = f"eval.{name if own is not self.eval.harness else 'harness'}"
            if (tokens := own.max_new_tokens or 0) >= room:
                refuse(
                    f"{key}.max_new_tokens={tokens}: leaves no room for a question in the {room} tokens of "
                    "data.max_length (or engine.max_length)"
                )
            if own.pick:
                self._picks_agree(name, key, own)
        alpaca = self.eval.alpaca_eval
        if "alpaca_eval" in self.asked and alpaca.length_control and None in (alpaca.difficulty, alpaca.gamed):
            refuse(
                "eval.alpaca_eval.length_control=true: needs difficulty and gamed; set both, or length_control=false"
            )
        if len(set(self.eval.benchmarks)) < len(self.eval.benchmarks):
            refuse(f"eval.benchmarks={list(self.eval.benchmarks)}: names one twice")
        if "test_time" in self.eval.benchmarks and self.eval.test_time is None:
            refuse("eval.test_time=null: the benchmark test_time needs a strategy; take eval=test_time, which sets one")
        if self.eval.test_time is not None and self.eval.test_time.stop is not None:
            refuse(
                f"eval.test_time.stop={self.eval.test_time.stop}: its curves are by the number of answers, so all are "
                "made; eval.stop is of the benchmark refinement"
            )
        return self

    def _picks_agree(self, name: str, key: str, own: Questions) -> None:
        """What is picked from several answers to one benchmark's questions, and by whom."""
        strategy, picked = self.eval.test_time, f"{key}.pick=[{','.join(own.pick)}]"
        if strategy is None:
            refuse(
                f"{picked}: there are no several answers to pick from; set strategy@eval.test_time=parallel (and "
                "eval.test_time.answers)"
            )
            return
        if "majority" in own.pick and own is not self.eval.harness:
            refuse(f"{picked}: free text that a judge compares has no vote; take {key}.pick=[best]")
        if self.selects(own) and self.eval.select == "verifier":
            refuse(
                f"eval.select=verifier: the questions of {name} have no reference that it could select by; "
                "take eval.select=reward_model"
            )
        if self.eval.temperature == 0 and strategy.answers > 1 and (not strategy.refines or strategy.chains > 1):
            refuse(
                f"eval.temperature=0: all answers that {picked} picks from would be the same; set one above 0, or take "
                "strategy@eval.test_time=chain"
            )

    @model_validator(mode="after")
    def _training_agrees(self) -> Config:
        """What is trained on, by which loss."""
        if self.loss.pt == "rewards" and self.filter.scorer == "none":
            refuse(
                f"loss.pt=rewards: filter.name={self.filter.name} gives no scores, which are the rewards; "
                "take filter=reward_model or filter=verifier"
            )
        start, reference = self.iteration.start, self.iteration.reference
        rewards = self.loss.rewards
        if rewards and rewards.kl and (rewards.lora or self.trainer.lora) and start != reference:
            refuse(
                f"iteration.reference={reference}: of loss.pt=rewards with adapters, the reference is the model "
                f"without its adapters; set iteration.reference={start} or loss.policy_gradient.kl=0"
            )
        if self.loss.pt == "rewards" and self.trained_iterations and self.sampling.temperature == 0:
            refuse(
                "sampling.temperature=0: all answers to a prompt would be the same, and loss.pt=rewards compares them; "
                "set one above 0"
            )
        if self.filter.compares and self.filter.scorer == "none":
            refuse(f"filter.select={self.filter.select}: needs a scorer; set filter.scorer=reward_model or verifier")
        if self.strategy.stop is not None:
            refuse(
                f"strategy.stop={self.strategy.stop}: answers for training are as many to every prompt; to end chains "
                "early where they are evaluated, set eval.stop"
            )
        if self.strategy.name == "tree" and self.strategy.expand == "best" and self.filter.scorer == "none":
            refuse(
                f"strategy.expand=best: filter.name={self.filter.name} gives no scores to find the best node by; "
                "take strategy.expand=every or a filter that scores"
            )
        pairs = self.loss.pt == "pairs" and self.iteration.count > 0
        if not self.filter.compares and not self.strategy.refines and pairs:
            refuse(
                f"filter.name={self.filter.name}: prefers the last refinement, and strategy.name=parallel makes none; "
                "take a filter that scores"
            )
        if self.trained_iterations and self.strategy.answers < 2:
            refuse(f"strategy.answers={self.strategy.answers}: a pair, or a group of rewards, needs at least 2")
        if self.loss.sft and not self.data.sft_pairs:
            refuse("data.sft_pairs=0: the loss has an SFT term; set loss.sft_direct=0 loss.sft_refine=0 or more pairs")
        if self.trains_reward_model and not self.data.reward_model_pairs:
            refuse("data.reward_model_pairs=0: a reward model is to be trained; set reward_model.path or more pairs")
        if self.data.path == "embedded" and self.data.eval_path:
            refuse("data.eval_path: data.path=embedded makes its own held-out prompts; leave it null")
        if self.data.max_length <= self.data.max_response_tokens:
            refuse(
                f"data.max_length={self.data.max_length}: not above "
                f"data.max_response_tokens={self.data.max_response_tokens}; no pair would fit"
            )
        return self
