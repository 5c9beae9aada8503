"""The members of a sweep -> one graph of stages, each once; what is reused, what is new and why, what it costs.

    activate (SFT) -> offline (PT on the data's own pairs) -> N x [respond -> score -> pair -> reference -> train]
    and after each of base, activation, offline and iterations: respond -> score -> evaluate on held-out prompts

Everything here is cheap: no model is loaded, nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve import sources
from evolve.config import Config, Sampling, Strategy
from evolve.stages import ModelSettings, stage
from evolve.store import Corrupt, Source, Stage, Store, flatten, settings


@dataclass(frozen=True)
class Step:
    """A stage in its place in a member: `phase` is setup, base, sft, offline, or iteration 1, 2, ..."""

    phase: str
    stage: Stage


@dataclass(frozen=True)
class Member:
    """One configuration of a sweep and the stages that make its numbers."""

    name: str
    config: Config
    steps: tuple[Step, ...]

    @property
    def evaluations(self) -> dict[str, Stage]:
        """The last evaluation of each phase, in order."""
        return {step.phase: step.stage for step in self.steps if step.stage.kind == "evaluate"}


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

    def users(self, stage_id: str) -> list[Member]:
        return [member for member in self.members if any(step.stage.id == stage_id for step in member.steps)]


def build(name: str, config: Config, resolve: sources.Resolver) -> Member:
    """A member's stages. Raises ConfigError if what it names outside can't be found."""
    steps: list[Step] = []

    def add(phase: str, node: Stage) -> Stage:
        steps.append(Step(phase, node))
        return node

    data, loss, chain = config.data, config.loss, config.strategy
    base = resolve.model(config.model.path, config.model.revision, "model.path")
    read = ModelSettings(
        dtype=config.model.dtype,
        chat_template=resolve.chat_template(config.model.chat_template),
        trust_remote_code=config.model.trust_remote_code,
    )
    source, eval_source = resolve.data(data)
    eval_apart = eval_source is not None or (data.eval_split is not None and not sources.is_file(data.path))

    def rows(pool: str, start: int, count: int) -> Stage:
        if eval_apart and pool == "eval":
            start = 0
        return stage(
            "data",
            {"data": source, **({"eval": eval_source} if eval_source else {})},
            pool=pool,
            start=start,
            count=count,
            reserve=0 if eval_apart or data.path == "embedded" else data.eval_prompts,
            seed=data.seed,
            split=data.split,
            eval_split=data.eval_split if eval_apart else None,
            max_characters=data.max_characters,
        )

    held_out = add("setup", rows("eval", 0, data.eval_prompts))
    after_offline = data.sft_pairs + data.offline_pairs

    # Who scores
    reward_model: Stage | Source | None = None
    if config.uses_reward_model:
        if config.reward_model.path is not None:
            reward_model = resolve.model(config.reward_model.path, config.reward_model.revision, "reward_model.path")
        else:
            embedded = data.path == "embedded"  # whose pairs never end, and whose held-out rows have no answers
            pairs = rows("pairs", after_offline if embedded else -data.reward_model_pairs, data.reward_model_pairs)
            judged = rows("pairs", after_offline + data.reward_model_pairs, data.eval_prompts) if embedded else held_out
            reward_model = add(
                "setup",
                stage(
                    "reward_model",
                    {"model": base, "pairs": add("setup", pairs), "held_out": add("setup", judged)},
                    model=read,
                    checkpoint_dtype=config.model.checkpoint_dtype,
                    epochs=config.reward_model.epochs,
                    batch_size=config.reward_model.batch_size,
                    micro_batch=config.reward_model.micro_batch,
                    learning_rate=config.model.learning_rate.reward_model,
                    max_length=data.max_length,
                    max_dropped=config.trainer.max_dropped,
                    seed=config.seed,
                ),
            )

    def scoring(scorer: str) -> dict[str, Any]:
        with_model = scorer == "reward_model"
        trained = config.reward_model.path is None
        return {
            "scorer": scorer,
            "verifier": None if with_model else data.verifier,
            # A model from outside brings its own chat template; a trained one has the policy's.
            "model": read.model_copy(update={} if trained else {"chat_template": None}) if with_model else None,
            "max_length": data.max_length,
            "batch_size": 4 * config.reward_model.micro_batch,
        }

    def score(phase: str, scorer: str, answers: Stage) -> Stage:
        inputs: dict[str, Stage | Source] = {"answers": answers}
        if scorer == "reward_model" and reward_model is not None:
            inputs["reward_model"] = reward_model
        return add(phase, stage("score", inputs, **scoring(scorer)))

    def respond(
        phase: str, model: Stage | Source, prompts: Stage, strategy: Strategy, sampling: Sampling, seed: int
    ) -> Stage:
        inputs: dict[str, Stage | Source] = {"model": model, "prompts": prompts}
        looks = strategy.expand == "best"
        if looks and config.filter.scorer == "reward_model" and reward_model is not None:
            inputs["reward_model"] = reward_model
        return add(
            phase,
            stage(
                "respond",
                inputs,
                model=read,
                engine=config.engine,
                strategy=strategy,
                template=config.template if strategy.name != "parallel" else None,
                sampling=sampling,
                scorer=scoring(config.filter.scorer) if looks else None,
                max_prompt_tokens=data.max_prompt_tokens,
                max_new_tokens=data.max_response_tokens,
                max_length=data.max_length,
                seed=seed,
            ),
        )

    def evaluate(phase: str, model: Stage | Source) -> None:
        turns = Strategy(name="chain", answers=config.eval.turns, branching=None, expand=None)
        sampling = Sampling(temperature=config.eval.temperature, top_k=0, top_p=1.0)
        judge = (
            data.verifier if config.eval_scorer == "verifier" else config.reward_model.path or "trained reward model"
        )
        for benchmark in config.eval.benchmarks:
            answers = respond(phase, model, held_out, turns, sampling, config.eval.seed)
            scores = score(phase, config.eval_scorer, answers)
            protocol = (
                f"chain of {config.eval.turns} turns, template {config.template.name}, temperature "
                f"{config.eval.temperature:g}, scored by {judge}"
            )
            inputs: dict[str, Stage | Source] = {"answers": answers, "scores": scores}
            add(phase, stage("evaluate", inputs, benchmark=benchmark, protocol=protocol))

    evaluate("base", base)
    policy: Stage | Source = base
    common: dict[str, Any] = {
        "model": read,
        "checkpoint_dtype": config.model.checkpoint_dtype,
        "template": config.template,
        "optimiser": config.trainer.optimiser,
        "max_length": data.max_length,
        "max_dropped": config.trainer.max_dropped,
        "seed": config.seed,
    }

    if loss.sft is not None:
        pairs = add("setup", rows("pairs", 0, data.sft_pairs))
        policy = add(
            "sft",
            stage(
                "activate",
                {"model": policy, "pairs": pairs},
                loss=loss.sft,
                epochs=config.trainer.epochs.sft,
                learning_rate=config.model.learning_rate.sft,
                **common,
            ),
        )
        evaluate("sft", policy)
    post_sft = policy

    def train(phase: str, start: Stage | Source, reference: Stage | Source, pairs: Mapping[str, Stage]) -> Stage:
        assert loss.preference is not None
        inputs: dict[str, Stage | Source] = {"model": start}
        for number, made in pairs.items():
            inputs[f"pairs_{number}"] = made
            for contexts, wanted in (
                ("direct", loss.alpha < 1 or loss.nll > 0),
                ("refine", loss.alpha > 0),
            ):
                if wanted:
                    inputs[f"reference_{contexts}_{number}"] = add(
                        phase,
                        stage(
                            "reference",
                            {"model": reference, "pairs": made},
                            model=read,
                            contexts=contexts,
                            template=config.template,
                            max_length=data.max_length,
                            max_dropped=config.trainer.max_dropped,
                            micro_batch=config.trainer.micro_batch,
                        ),
                    )
        return add(
            phase,
            stage(
                "train",
                inputs,
                loss=loss.preference,
                epochs=config.trainer.epochs.pt,
                learning_rate=config.model.learning_rate.pt,
                starts_at_reference=start.id == reference.id,
                **common,
            ),
        )

    if loss.preference is not None:
        if data.offline_pairs:
            pairs = add("setup", rows("pairs", data.sft_pairs, data.offline_pairs))
            policy = train("offline", policy, policy, {"0": pairs})
            evaluate("offline", policy)
        so_far: dict[str, Stage] = {}
        for turn in range(1, config.iteration.count + 1):
            phase = f"iteration {turn}"
            first = (turn - 1) * data.prompts + (0 if data.path == "embedded" else after_offline)
            prompts = add("setup", rows("prompts", first, data.prompts))
            answers = respond(phase, policy, prompts, chain, config.sampling, config.seed)
            inputs = {"answers": answers}
            if config.filter.scorer != "none":
                inputs["scores"] = score(phase, config.filter.scorer, answers)
            made = add(phase, stage("pair", inputs, filter=config.filter))
            so_far = {**(so_far if config.iteration.data == "all" else {}), str(turn): made}
            models = {"previous": policy, "initial": base, "post_sft": post_sft}
            policy = train(phase, models[config.iteration.start], models[config.iteration.reference], so_far)
            evaluate(phase, policy)
    return Member(name, config, tuple(steps))


@dataclass(frozen=True)
class Verdict:
    """What a plan says of a stage: reused, or new and why."""

    reused: bool
    why: str = ""
    seconds: float | None = None  # expected, from earlier records of its kind; None: nothing to go by


def judge(graph: Graph, store: Store) -> dict[str, Verdict]:
    """Reused or new for every stage; for a new one the setting that made it so, compared with what the store has."""
    records = {node.id: store.record(node) for node in graph.stages.values()}
    others: dict[str, list[dict[str, Any]]] = {}
    if any(record is None for record in records.values()):
        for stage_id in store.ids():
            try:
                record = store.read(stage_id)
            except Corrupt:
                continue
            if record is not None:
                others.setdefault(stage_id.split("/")[0], []).append(record)
    verdicts: dict[str, Verdict] = {}
    for node in graph.stages.values():
        if records[node.id] is not None:
            verdicts[node.id] = Verdict(True)
        else:
            peers = others.get(node.kind, [])
            verdicts[node.id] = Verdict(False, _why(node, peers, verdicts), _expected(node, peers))
    return verdicts


def _why(node: Stage, peers: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Verdict]) -> str:
    for name, item in node.inputs.items():
        if isinstance(item, Stage) and not verdicts[item.id].reused:
            return (
                f"its {name} is new" if verdicts[item.id].why.startswith(("its ", "first")) else verdicts[item.id].why
            )
    if not peers:
        return f"first {node.kind}"
    mine = flatten(node.identity)
    best: list[str] | None = None
    for peer in peers:
        theirs = flatten(peer["identity"])
        differing = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if best is None or len(differing) < len(best):
            best = [
                f"{key.split('.', 1)[-1]}: {_short(theirs.get(key))} -> {_short(mine.get(key))}" for key in differing
            ]
    return "; ".join((best or ["its result was lost or damaged"])[:3])


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 32 else text[:29] + "..."


def _expected(node: Stage, peers: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean time of records of its kind, of the same model where there is any: [seconds]."""

    def weight(identity: Mapping[str, Any]) -> Any:
        config = identity["config"]
        return (config.get("engine"), config.get("max_length"), config.get("max_new_tokens"), config.get("model"))

    same = [peer["seconds"] for peer in peers if weight(peer["identity"]) == weight(node.identity)]
    return sum(same) / len(same) if same else None


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
        "identity": settings(member.config, defaults=False),
        "steps": [{"phase": step.phase, "kind": step.stage.kind, "id": step.stage.id} for step in member.steps],
    }


def store_of(config: Config) -> Store:
    return Store(Path(config.output).absolute() / "store", config.resources.lease_timeout)
