"""A task of lm-eval as a benchmark of this harness: what it needs of the configuration; harness.py does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals import harness, refinement, sandbox, several
from evals.harness import EXPLAIN, METRICS, OBJECTIVE
from evals.needs import Asked, File, Measured, Needs, samples
from evolve.config import Config, Strategy, find


@dataclass(frozen=True)
class Task:
    """Raises ValueError from `needs` for a name that lm-eval doesn't know, and for a task that can't be measured."""

    name: str

    METRICS = METRICS
    OBJECTIVE = OBJECTIVE
    EXPLAIN = EXPLAIN

    def needs(self, config: Config) -> Needs:
        own, file = config.eval.harness, config.eval.harness.data.get(self.name)
        answered = harness.kind(self.name) == "generate"
        if harness.runs_programs(self.name):
            if not own.unsafe_code:
                allow = "eval.harness.unsafe_code=true allows it, in a sandbox"
                raise ValueError(f"{self.name}: runs programs that the model wrote; {allow}")
            if missing := sandbox.missing():
                raise ValueError(f"{self.name}: {missing}")
        server = config.engine.name == "openai" and config.engine.url
        if not answered and server:
            raise ValueError(
                f"{self.name}: weighs choices, which the server at engine.url isn't asked for; take engine=hf"
            )
        made = samples(config, own.pick) if answered else None
        vote = made is not None and "majority" in own.pick
        reader = harness.verifier(self.name) if vote else None
        if vote and not reader and not harness.extractions(self.name):
            raise ValueError(
                f"{self.name}: extracts nothing from an answer that could be voted on; take eval.harness.pick=[best]"
            )
        settings: dict[str, Any] = {"shots": own.shots, "chat": own.chat}
        tokens = own.max_new_tokens or config.data.max_response_tokens
        files = {"data": File(f"eval.harness.data.{self.name}", file)} if file else {}
        if file and (found := find(file)) and (beside := harness.examples(self.name, found, own.shots)):
            files["examples"] = File(f"eval.harness.data.{self.name}", str(beside))
        said = harness.protocol(harness.Setup(self.name, file, limit=own.limit, **settings), tokens)
        definition = harness.definition(self.name)
        return Needs(
            refinement.chain(config.eval.turns),
            f"{said}, chain of {config.eval.turns} turns" if answered else said,
            own.temperature,
            asked=Asked(
                files,
                {**settings, "definition": definition},
                own.limit,
                () if file else tuple(harness.datasets(self.name)),
                answered,
            ),
            files=files,
            max_new_tokens=tokens,
            until=harness.until(self.name) if answered else (),
            settings={
                "settings": {
                    **settings,
                    "limit": own.limit,
                    "definition": definition,
                    **({"majority": True} if vote else {}),
                },
                **({"strategy": made.strategy, "verifier": reader} if made else {}),
            },
            samples=made,
        )

    def setup(
        self, data: str | None = None, examples: str | None = None, definition: str = "", **settings: Any
    ) -> harness.Setup:
        """`definition`: of the task, which is part of the questions' identity."""
        tested, shown = harness.splits(self.name)
        files: harness.Data = {tested: data, str(shown): examples} if data and examples else data
        return harness.Setup(self.name, files, **settings)

    def check(self, **settings: Any) -> None:
        """Raises ValueError for files that are not as they should be, sooner than `questions` could."""
        harness.check(self.setup(**settings))

    def questions(self, **settings: Any) -> list[dict[str, Any]]:
        return harness.questions(self.setup(**settings))

    def measure(
        self,
        questions: Sequence[Mapping[str, Any]],
        protocol: str,
        answers: Sequence[Mapping[str, Any]] = (),
        likelihoods: Sequence[Mapping[str, Any]] = (),
        samples: Sequence[Mapping[str, Any]] = (),
        strategy: Strategy | None = None,
        select: Sequence[Mapping[str, Any]] = (),
        majority: bool = False,
        extract: Callable[[str], str | None] | None = None,
        **settings: Any,
    ) -> Measured:
        """`samples`: several answers to each question, made by `strategy`; how they are picked is several.py's."""
        setup = self.setup(**settings)
        made = harness.measure(setup, questions, answers or likelihoods, protocol)
        if strategy is None:
            return made
        how: dict[str, Any] = {"select": select, "majority": majority, "extract": extract}
        more = several.measure(setup, questions, samples, strategy, **how)
        return Measured(
            made.metrics | more.metrics,
            {what: count + more.dropped[what] for what, count in made.dropped.items()},
            made.items | more.items,
            made.records,
        )

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return harness.headline(metrics)

    def summary(self, metrics: Mapping[str, Any]) -> str:
        return harness.summary(metrics)
