"""A task of lm-eval as a benchmark of this harness: what it needs of the configuration; harness.py does the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import harness, refinement
from evals.harness import EXPLAIN, METRICS, OBJECTIVE
from evals.needs import Asked, File, Measured, Needs
from evolve.config import Config, find


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
        server = config.engine.name == "openai" and config.engine.url
        if not answered and server:
            raise ValueError(
                f"{self.name}: weighs choices, which the server at engine.url isn't asked for; take engine=hf"
            )
        settings: dict[str, Any] = {"shots": own.shots, "chat": own.chat}
        tokens = own.max_new_tokens or config.data.max_response_tokens
        files = {"data": File(f"eval.harness.data.{self.name}", file)} if file else {}
        if file and (found := find(file)) and (beside := harness.examples(self.name, found, own.shots)):
            files["examples"] = File(f"eval.harness.data.{self.name}", str(beside))
        said = harness.protocol(self.name, data=file, tokens=tokens, limit=own.limit, **settings)
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
            settings={"settings": {**settings, "limit": own.limit, "definition": definition}},
        )

    def _data(self, data: str | None, examples: str | None) -> harness.Data:
        tested, shown = harness.splits(self.name)
        return {tested: data, str(shown): examples} if data and examples else data

    def questions(
        self, data: str | None = None, examples: str | None = None, definition: str = "", **settings: Any
    ) -> list[dict[str, Any]]:
        """`definition`: of the task, which is part of the questions' identity."""
        return harness.questions(self.name, data=self._data(data, examples), **settings)

    def measure(
        self,
        questions: Sequence[Mapping[str, Any]],
        protocol: str,
        answers: Sequence[Mapping[str, Any]] = (),
        likelihoods: Sequence[Mapping[str, Any]] = (),
        data: str | None = None,
        examples: str | None = None,
        definition: str = "",
        **settings: Any,
    ) -> Measured:
        files, given = self._data(data, examples), answers or likelihoods
        made = harness.measure(questions, given, protocol, self.name, data=files, **settings)
        return made._replace(metrics={**made.metrics, "benchmark": self.name})

    def records(
        self,
        out: Path,
        questions: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]] = (),
        likelihoods: Sequence[Mapping[str, Any]] = (),
        data: str | None = None,
        examples: str | None = None,
        definition: str = "",
        **settings: Any,
    ) -> None:
        """Writes lm_eval/turn_N/: results and samples of each turn as lm-eval writes them."""
        made = answers or likelihoods
        turns = max((len(row["answers"]) for row in answers), default=1)
        for turn in range(turns):
            where: dict[str, Any] = {
                "folder": out / "lm_eval",
                "name": f"turn_{turn + 1}",
                "turn": turn,
                "data": self._data(data, examples),
            }
            harness.results(questions, made, self.name, **where, **settings)

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return harness.headline(metrics)

    def summary(self, metrics: Mapping[str, Any]) -> str:
        return harness.summary(metrics)
