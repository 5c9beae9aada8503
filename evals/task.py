"""A task of lm-eval as a benchmark of this harness: what it needs of the configuration; harness.py does the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import harness, refinement
from evals.harness import EXPLAIN, METRICS, OBJECTIVE
from evals.needs import Asked, File, Measured, Needs
from evolve.config import Config


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
        settings: dict[str, Any] = {"shots": own.shots, "chat": own.chat}
        tokens = own.max_new_tokens or config.data.max_response_tokens
        files = {"data": File(f"eval.harness.data.{self.name}", file)} if file else {}
        said = harness.protocol(self.name, data=file, tokens=tokens, limit=own.limit, **settings)
        return Needs(
            refinement.chain(config.eval.turns),
            f"{said}, chain of {config.eval.turns} turns" if answered else said,
            own.temperature,
            asked=Asked(files, settings, own.limit, () if file else tuple(harness.datasets(self.name)), answered),
            files=files,
            max_new_tokens=tokens,
            until=harness.until(self.name) if answered else (),
            settings={"settings": {**settings, "limit": own.limit}},
        )

    def questions(self, **settings: Any) -> list[dict[str, Any]]:
        return harness.questions(self.name, **settings)

    def measure(
        self,
        questions: Sequence[Mapping[str, Any]],
        protocol: str,
        answers: Sequence[Mapping[str, Any]] = (),
        likelihoods: Sequence[Mapping[str, Any]] = (),
        data: str | None = None,
        **settings: Any,
    ) -> Measured:
        made = harness.measure(questions, answers or likelihoods, protocol, self.name, data=data, **settings)
        return made._replace(metrics={**made.metrics, "benchmark": self.name})

    def records(
        self,
        out: Path,
        questions: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]] = (),
        likelihoods: Sequence[Mapping[str, Any]] = (),
        data: str | None = None,
        **settings: Any,
    ) -> None:
        """Writes lm_eval/turn_N/: results and samples of each turn as lm-eval writes them."""
        made = answers or likelihoods
        turns = max((len(row["answers"]) for row in answers), default=1)
        for turn in range(turns):
            where: dict[str, Any] = {"folder": out / "lm_eval", "name": f"turn_{turn + 1}", "turn": turn, "data": data}
            harness.results(questions, made, self.name, **where, **settings)

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return harness.headline(metrics)

    def summary(self, metrics: Mapping[str, Any]) -> str:
        return harness.summary(metrics)
