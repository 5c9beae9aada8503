"""The typed configuration: what Hydra composed, checked and frozen.

DictConfig ends in this file. Every section of conf/ is a frozen model below; a wrong key, type, value or combination
raises `ConfigError`, one line that names the key, the value and the choices, before any work is done.

A field marked `RUNTIME` says where and how a stage runs (devices, micro-batches, folders), never what comes out of it:
it stays out of every stage's identity. A field that has a default here was added after the first records were made;
its default is the behaviour from before it existed, so old records keep their identity (see store.py).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
RUNTIME = "runtime"  # metadata of fields that never enter an identity
HERE = "{here}"  # in the message of a section that stands in several places: where it stands

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Benchmark = Literal["refinement", "test_time"]
Stop = Literal["unchanged", "score_drop"]
DirectLoss = Literal["dpo", "ipo", "simpo", "sppo", "srpo"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(Exception):
    """A setting that can't be run, as one line: what is wrong, where, what to do."""


def refuse(what: str) -> None:
    raise ValueError(what)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


def accumulation(section: str, batch_size: int, micro_batch: int, devices: int = 1) -> int:
    """How many micro-batches each device runs for a step. Raises ValueError where the batch doesn't divide."""
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        fits = " or ".join(str(n) for n in sorted({below, above} - {0}))
        raise ValueError(
            f"{section}.batch_size={batch_size}: doesn't divide over {section}.devices={devices}; {fits} would"
        )
    each = batch_size // devices
    micro = min(micro_batch, each)
    if each % micro:
        fits = ", ".join(str(n) for n in range(1, each + 1) if each % n == 0)
        over = f" over {section}.devices={devices}" if devices > 1 else ""
        raise ValueError(
            f"{section}.micro_batch={micro_batch}: doesn't divide {section}.batch_size={batch_size}{over}; "
            f"these do: {fits}"
        )
    return each // micro


class LearningRates(Section):
    sft: Rate
    pt: Rate
    reward_model: Rate


class Model(Section):
    name: str
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    checkpoint_dtype: Literal["float32", "bfloat16"]
    chat_template: str | None
    trust_remote_code: bool
    beta: Rate
    learning_rate: LearningRates


class Data(Section):
    name: str
    path: str
    revision: str | None
    split: str
    eval_path: str | None
    eval_split: str | None
    verifier: Literal["ledger", "math", "exact"] | None
    prompt: str = "prompt"
    gold: str | None = None
    seed: Seed
    eval_prompts: Positive
    sft_pairs: Count
    offline_pairs: Count
    prompts: Positive
    reward_model_pairs: Count
    max_characters: Positive | None
    max_prompt_tokens: Positive
    max_response_tokens: Positive
    max_length: Positive


class Strategy(Section):
    name: Literal["parallel", "chain", "tree", "few_shot"]
    answers: Annotated[int, Field(ge=1, le=64)]
    branching: Positive | None
    expand: Literal["best", "every"] | None
    depth: Positive | None = None
    chains: Positive = 1
    stop: Stop | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_counts(cls, values: Any) -> Any:
        """A setting that only trees or chains have is no part of another strategy: it can't make its answers new."""
        if isinstance(values, dict) and values.get("name") != "tree":
            values = {**values, "branching": None, "expand": None, "depth": None}
        if isinstance(values, dict) and values.get("name") != "chain":
            values = {**values, "chains": 1, "stop": None}
        return values

    @model_validator(mode="after")
    def _gives_its_answers(self) -> Strategy:
        answers, branching = f"{HERE}.answers={self.answers}", self.branching or 1
        if self.answers % self.chains:
            fits = ", ".join(str(n) for n in range(1, self.answers + 1) if self.answers % n == 0)
            raise ValueError(f"{HERE}.chains={self.chains}: doesn't divide {answers}; these do: {fits}")
        if self.depth is not None:
            most = sum(branching**level for level in range(self.depth + 1))
            if most < self.answers:
                raise ValueError(
                    f"{HERE}.depth={self.depth}: gives at most {most} answers with {HERE}.branching={branching}, and "
                    f"{answers}; raise one of the first two"
                )
        return self


class Sampling(Section):
    temperature: Weight
    top_k: Count
    top_p: Annotated[float, Field(gt=0, le=1)]


def _text_of(section: str, values: Any) -> Any:
    """A section's values with the content of the file at `path`, where there is one, in place of `text`."""
    if isinstance(values, dict) and isinstance(values.get("path"), str):
        file = find(values["path"])
        if file is None or not file.is_file():
            raise ValueError(f"{section}.path={values['path']}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{section}.path={values['path']}: not a text in UTF-8") from None
        except OSError as error:
            raise ValueError(f"{section}.path={values['path']}: can't be read ({error.strerror})") from None
        if not text.strip():
            raise ValueError(f"{section}.path={values['path']}: an empty file")
        return {**values, "name": file.stem, "text": text}
    return values


def _check_fields(section: str, name: str, path: str | None, text: str, fields: Sequence[str]) -> None:
    for field in fields:
        if text.count(field) != 1:
            where = f"{section}.path={path}" if path else f"{section}.text of '{name}'"
            raise ValueError(f"{where}: holds {field} {text.count(field)} times; it must stand there once")


class Template(Section):
    name: Annotated[str, RUNTIME]
    text: str
    separator: str
    path: Annotated[str | None, RUNTIME]  # its content replaces `text`, which is what counts

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, values: Any) -> Any:
        return _text_of("template", values)

    @model_validator(mode="after")
    def _has_fields(self) -> Template:
        _check_fields("template", self.name, self.path, self.text, ("{prompt}", "{response}"))
        return self


class SFTWeights(Section):
    """L_SFT's terms."""

    direct: float
    refine: float


class PreferenceWeights(Section):
    """L = (1 - alpha) L_direct + alpha L_refine + nll L_NLL; None stands where a weight of 0 makes a setting idle."""

    alpha: float
    direct: DirectLoss | None = "dpo"
    lengths: Literal["sum", "mean"] | None = "sum"
    gamma: float | None = None
    beta_direct: float | None
    beta_refine: float | None
    refine_contexts: Literal["both", "rejected"] | None
    refine_scale: float | None
    nll: float

    @property
    def reference_contexts(self) -> tuple[str, ...]:
        """Where log-probabilities under the reference model are needed: of direct answers, of refinements, or both."""
        direct, refines = self.direct not in (None, "simpo"), self.alpha > 0 or self.direct == "srpo"
        return ("direct",) * direct + ("refine",) * refines


class PolicyGradient(Section):
    """Policy gradient on scores of the policy's own answers, in the terms of TRL's GRPOTrainer."""

    loss_type: Literal["grpo", "dapo", "dr_grpo"]  # TRL's bnpo goes by the micro-batch, which no result may
    importance: Literal["token", "sequence"]
    clip_low: Weight
    clip_high: Weight
    kl: Weight
    updates: Positive
    scale_rewards: Literal["group", "batch", "none"]


class Loss(Section):
    name: str
    sft_direct: Weight
    sft_refine: Weight
    pt: Literal["pairs", "rewards", "none"]
    direct: DirectLoss
    lengths: Literal["sum", "mean"]
    gamma: Weight
    alpha: Share
    beta_direct: Rate
    beta_refine: Rate
    refine_contexts: Literal["both", "rejected"]
    refine_scale: Rate
    nll: Weight
    policy_gradient: PolicyGradient | None

    @model_validator(mode="after")
    def _has_policy_gradient(self) -> Loss:
        if self.pt == "rewards" and self.policy_gradient is None:
            raise ValueError(
                "loss.pt=rewards: loss.policy_gradient is null; take loss=grpo, loss=dapo or loss=gspo, which set it"
            )
        return self

    @property
    def sft(self) -> SFTWeights | None:
        """What activation minimises; None: there is none."""
        if self.sft_direct == self.sft_refine == 0:
            return None
        return SFTWeights(direct=self.sft_direct, refine=self.sft_refine)

    @property
    def preference(self) -> PreferenceWeights | None:
        """What preference training on pairs minimises; None: there is none."""
        if self.pt != "pairs":
            return None
        directs, refines = self.alpha < 1, self.alpha > 0
        return PreferenceWeights(
            alpha=self.alpha,
            direct=self.direct if directs else None,
            lengths=self.lengths if directs else None,
            gamma=self.gamma if directs and self.direct == "simpo" else None,
            beta_direct=self.beta_direct if directs else None,
            beta_refine=self.beta_refine if refines else None,
            refine_contexts=self.refine_contexts if refines else None,
            refine_scale=self.refine_scale if refines else None,
            nll=self.nll,
        )

    @property
    def rewards(self) -> PolicyGradient | None:
        """What training on scores of own answers goes by; None: there is none."""
        return self.policy_gradient if self.pt == "rewards" else None


class Filter(Section):
    name: Annotated[str, RUNTIME]
    scorer: Literal["reward_model", "verifier", "judge", "none"]
    select: Literal["best_worst", "last_first", "best_random", "all"]
    margin: Weight
    unfinished: Literal["drop", "keep"]


class RewardModel(Section):
    path: str | None
    revision: str | None
    epochs: Positive
    batch_size: Positive
    micro_batch: Annotated[Positive, RUNTIME]
    dtype: Literal["float32", "bfloat16"] | None = None
    trust_remote_code: bool = False
    engine: Literal["hf", "vllm"] = "hf"
    processes: Annotated[Positive, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @model_validator(mode="after")
    def _divides(self) -> RewardModel:
        accumulation("reward_model", self.batch_size, self.micro_batch)
        return self


class Iteration(Section):
    count: Count
    reference: Literal["previous", "initial", "post_sft"]
    start: Literal["previous", "initial", "post_sft"]
    data: Literal["this", "all"]


class HF(Section):
    """transformers' generate."""

    name: Literal["hf"]
    batch_size: Annotated[Positive, RUNTIME]
    max_length: Positive | None = None
    processes: Annotated[Positive, RUNTIME] = 1
    retries: Annotated[Count, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run)."""
        return {"processes": self.processes, "retries": self.retries}


class VLLM(Section):
    """vLLM, in a process of its own."""

    name: Literal["vllm"]
    batch_size: Annotated[Positive, RUNTIME]
    max_length: Positive | None = None
    quantization: str | None = None
    tensor_parallel: Annotated[Positive, RUNTIME] = 1
    processes: Annotated[Positive, RUNTIME] = 1
    retries: Annotated[Count, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run)."""
        return {
            "apart": True,
            "processes": self.processes,
            "devices": self.tensor_parallel,
            "retries": self.retries,
        }


class Server(Section):
    """Any server that speaks OpenAI's protocol: one that runs, or one that is started for each stage's model."""

    name: Literal["openai"]
    url: Annotated[str | None, RUNTIME]
    serve: str | None
    model: str | None
    endpoint: Literal["completions", "chat"]
    key: Annotated[str, RUNTIME]
    max_length: Positive | None = None
    batch_size: Annotated[Positive, RUNTIME]
    timeout: Annotated[Rate, RUNTIME]
    retries: Annotated[Count, RUNTIME]

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run): the server has its own."""
        return {}

    @model_validator(mode="after")
    def _has_a_server(self) -> Server:
        if (self.url is None) == (self.serve is None):
            raise ValueError(
                f"engine.url, engine.serve: {'neither' if self.url is None else 'each'} is set; set one: the url of a "
                "server that runs, or a command that starts one, with {model} and {port} in it"
            )
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"engine.url={self.url}: no such address; one is http://localhost:8000/v1")
            if parts.username is not None or parts.query:  # they would stand in logs and records
                raise ValueError("engine.url: holds more than an address; a key is in the variable engine.key names")
        else:
            assert self.serve is not None
            try:
                words = shlex.split(self.serve)
            except ValueError as error:
                raise ValueError(f"engine.serve={self.serve}: {str(error).lower()}") from None
            for field in ("{model}", "{port}"):
                if not any(field in word for word in words):
                    raise ValueError(f"engine.serve={self.serve}: doesn't say where {field} goes")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key, re.ASCII):  # its value isn't shown: it may be a key
            raise ValueError("engine.key: not the name of an environment variable; the key itself is that one's value")
        return self


Engine = Annotated[HF | VLLM | Server, Field(discriminator="name")]


class Epochs(Section):
    sft: Positive
    pt: Positive


class Lora(Section):
    """Low-rank adapters (PEFT), merged into the weights that a stage saves."""

    rank: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: str


class Optimiser(Section):
    """How a loss is minimised; AdamW's own settings are torch's."""

    batch_size: Positive
    micro_batch: Annotated[Positive, RUNTIME]
    schedule: Literal["linear", "cosine", "constant"]
    warmup: Share
    weight_decay: Weight
    max_grad_norm: Rate
    lora: Lora | None = None
    gradient_checkpointing: Annotated[bool, RUNTIME]
    layout: Annotated[Literal["shared", "packed", "padded"], RUNTIME]
    devices: Annotated[Positive, RUNTIME]
    sharding: Annotated[Literal["none", "fsdp", "deepspeed"], RUNTIME]
    checkpoint_minutes: Annotated[float | None, Field(ge=0), RUNTIME]
    max_loss_growth: Annotated[float, Field(gt=1), RUNTIME]


class Trainer(Optimiser):
    epochs: Epochs
    max_dropped: Share

    @property
    def optimiser(self) -> Optimiser:
        return Optimiser(**{name: getattr(self, name) for name in Optimiser.model_fields})

    @model_validator(mode="after")
    def _divides(self) -> Trainer:
        accumulation("trainer", self.batch_size, self.micro_batch, self.devices)
        if self.sharding != "none" and self.devices == 1:
            raise ValueError(f"trainer.sharding={self.sharding}: needs trainer.devices above 1")
        return self


class NoJudge(Section):
    name: Annotated[str, RUNTIME]
    mode: Literal["none"]


class JudgePrompt(Section):
    name: Annotated[str, RUNTIME]
    text: str
    path: Annotated[str | None, RUNTIME]  # its content replaces `text`, which is what counts

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, values: Any) -> Any:
        return _text_of("judge.prompt", values)


class Judge(Section):
    """A language model that scores answers. `model` and `revision` are no identity: the model itself is an input."""

    name: Annotated[str, RUNTIME]
    mode: Literal["graded", "pairwise"]
    model: Annotated[str | None, RUNTIME]
    revision: Annotated[str | None, RUNTIME]
    engine: Engine
    prompt: JudgePrompt
    highest: Rate | None
    samples: Positive
    temperature: Weight
    max_new_tokens: Positive
    max_length: Positive

    @model_validator(mode="after")
    def _agrees(self) -> Judge:
        fields = {"graded": ("{prompt}", "{response}"), "pairwise": ("{prompt}", "{first}", "{second}")}[self.mode]
        _check_fields("judge.prompt", self.prompt.name, self.prompt.path, self.prompt.text, fields)
        if self.mode == "graded" and self.highest is None:
            raise ValueError("judge.highest=null: judge.mode=graded needs the highest grade that the prompt names")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"judge.samples={self.samples}: all would be the same at judge.temperature=0; set 1")
        if self.model is not None and self.engine.name == "openai" and self.engine.url:
            raise ValueError(
                f"judge.model={self.model}: a server that runs has a model of its own; set judge.model=null, or "
                "judge.engine.serve in place of judge.engine.url"
            )
        if self.model is None and not (self.engine.name == "openai" and self.engine.url):
            raise ValueError(
                "judge.model=null: only a server that runs has a model of its own (engine@judge.engine=openai "
                "judge.engine.url=...); set judge.model to `policy`, a folder or a hub id"
            )
        return self


class Eval(Section):
    benchmarks: tuple[Benchmark, ...]
    turns: Annotated[int, Field(ge=1, le=64)]
    temperature: Weight
    seed: Seed
    scorer: Literal["auto", "verifier", "reward_model", "judge"]
    stop: Stop | None = None
    test_time: Strategy | None = None
    select: Literal["verifier", "reward_model"] = "reward_model"


class Resources(Section):
    workers: Positive
    threads: Positive
    device: Literal["auto", "cpu", "cuda"]
    retries: Count
    lease_timeout: Annotated[float, Field(ge=5)]


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
    def trained_iterations(self) -> int:
        return self.iteration.count if self.loss.pt != "none" else 0

    @property
    def uses_reward_model(self) -> bool:
        needs = [self.eval_scorer] + ([self.filter.scorer] if self.trained_iterations else [])
        needs += [self.eval.select] if "test_time" in self.eval.benchmarks else []
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

    @model_validator(mode="after")
    def _training_agrees(self) -> Config:
        """What is trained on, by which loss."""
        if self.loss.pt == "rewards" and self.filter.scorer == "none":
            refuse(
                f"loss.pt=rewards: filter.name={self.filter.name} gives no scores, which are the rewards; "
                "take filter=reward_model or filter=verifier"
            )
        if self.loss.pt == "rewards" and self.trained_iterations and self.trainer.devices > 1:
            refuse(
                f"trainer.devices={self.trainer.devices}: loss.name={self.loss.name} trains on one device; "
                "take trainer.devices=1 trainer.sharding=none"
            )
        start, reference = self.iteration.start, self.iteration.reference
        if self.loss.rewards and self.loss.rewards.kl and self.trainer.lora and start != reference:
            refuse(
                f"iteration.reference={reference}: of loss.pt=rewards with trainer.lora, the reference is the model "
                f"without its adapters; set iteration.reference={start} or loss.policy_gradient.kl=0"
            )
        if self.loss.pt == "rewards" and self.trained_iterations and self.sampling.temperature == 0:
            refuse(
                "sampling.temperature=0: all answers to a prompt would be the same, and loss.pt=rewards compares them; "
                "set one above 0"
            )
        if self.filter.select != "last_first" and self.filter.scorer == "none":
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
        if self.filter.select == "last_first" and self.strategy.name == "parallel" and pairs:
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


def find(path: str) -> Path | None:
    """A file or folder by the user's path, from the working directory or else the project's; None where it is not."""
    for base in (Path.cwd(), ROOT):
        candidate = base / os.path.expanduser(path)
        if candidate.exists():
            return candidate.resolve()
    return None


def load(composed: Any) -> Config:
    """The frozen `Config` of a composed DictConfig (or plain dict). Raises ConfigError."""
    if not isinstance(composed, dict):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            composed = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(str(error))) from None
    composed = {str(key): value for key, value in composed.items() if key != "hydra"}
    try:
        return Config.model_validate(composed)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _explain(error: ValidationError) -> str:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part != "function-before"]
    # Behind a section that is one of several stands which.
    key = ".".join(
        part for place, part in enumerate(parts) if place == 0 or parts[place - 1] not in ("engine", "judge")
    )
    if first["type"] == "extra_forbidden":
        return unknown_key(key)
    if first["type"] == "missing":
        return f"{key}: not set; conf/{key.split('.')[0]}/ should give it"
    message = first["msg"].removeprefix("Value error, ")
    if parts[:1] == ["judge"] and message.startswith("engine."):  # a section that stands in two places
        message = message.replace("engine.", "judge.engine.")
    if first["type"] == "value_error":
        return message.replace(HERE, key)
    return f"{key}={first['input']}: {message[0].lower()}{message[1:]}"


def unknown_key(key: str) -> str:
    """One line for a key that the configuration does not have, with the keys that stand beside it."""
    sections: list[Any] = [Config]  # several: one for each choice
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        found = [section.model_fields[parent] for section in sections if parent in section.model_fields]
        kinds = [kind for field in found for kind in (field.annotation, *get_args(field.annotation))]  # or null
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            parents, last = parents[:depth], parent
            break
        sections = inner
    choices = sorted({name for section in sections for name in section.model_fields})
    where = ".".join(parents)
    if last in choices:  # a key that exists, where this choice has none
        return f"{key}: not a setting of this choice of {parents[0]}; take one that has it"
    close = difflib.get_close_matches(last, choices, n=1)
    prefix = f"{where}." if where else ""
    hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
    return f"{key}: unknown key{hint}; {where or 'the configuration'} has: {', '.join(choices)}"


def one_line(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One line for an error of Hydra's or OmegaConf's own, with the choices where there are any."""
    for override in overrides:  # Hydra says that some group is null, and not which
        group, _, choice = override.partition("=")
        if choice in ("", "null") and (CONF / group).is_dir():
            choices = ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))
            return f"{override}: a group can't be empty; {group} is one of: {choices}"

    text = _one_line(str(error.__cause__ or error) if "Error merging" in str(error) else str(error))
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        options = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
        choices = ", ".join(options[1].split()) if options else "none"
        return f"{match[1]}={match[2]}: no such choice; {match[1]} is one of: {choices}"
    if "expecting" in text:  # the override grammar's own words name no key
        return (
            f"{text.split(' See http')[0]}; a value with spaces or special characters goes in quotes: 'key=\"value\"'"
        )
    return text
