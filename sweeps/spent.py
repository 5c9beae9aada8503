"""What training a member has cost up to each phase: tokens and time of every stage that leads there, not evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sweeps.collect import MemberResult, Sweep

FOR_TRAINING = ("reward_model", "activate", "reference", "train", "reinforce", "pair")


@dataclass(frozen=True)
class Spent:
    """tokens: by what was done with them, generated, trained, read; seconds: of stages, times the devices of each.

    A device is a process, and each of its GPUs where it has several. A server that runs already counts as one.
    """

    tokens: dict[str, int]
    seconds: float
    records: tuple[str, ...]

    @property
    def made(self) -> int:
        """Tokens generated and trained on."""
        return self.tokens.get("generated", 0) + self.tokens.get("trained", 0)


def spent(sweep: Sweep, member: MemberResult) -> dict[str, Spent]:
    """By phase, up to the first that lacks a record. What members share counts for each of them."""
    records: dict[str, dict[str, Any]] = {}
    found: dict[str, Spent] = {}
    for step in member.steps:
        if step["kind"] == "evaluate":
            tokens: dict[str, int] = {}
            for record in records.values():
                for what, count in record["tokens"].items():
                    tokens[what] = tokens.get(what, 0) + count
            seconds = sum(record["seconds"] * _devices(member, record) for record in records.values())
            found[step["phase"]] = Spent(tokens, seconds, tuple(records))
        elif step["kind"] in FOR_TRAINING:
            own = sweep.record(step["id"])
            made = {step["id"]: own} | {
                key: sweep.record(key)
                for key in (own["inputs"].values() if own and step["kind"] == "pair" else ())
                if key.startswith(("respond/", "score/"))
            }
            if None in made.values():
                break
            records |= {key: of for key, of in made.items() if of is not None}
    return found


def _devices(member: MemberResult, record: dict[str, Any]) -> int:
    """Those that a stage was made with; of a record from before these were noted, what the member's settings say."""
    if "devices" in record:
        return int(record["devices"])
    kind, config = record["id"].partition("/")[0], member.config
    if kind in ("activate", "train"):
        return int(config["trainer"].get("devices", 1))
    of: dict[str, Any] = config["engine"] if kind == "respond" else {}
    if kind == "score":
        scorers = {"reward_model": config["reward_model"], "judge": config["judge"].get("engine") or {}}
        of = scorers.get(record["config"]["scorer"], {})
    return int(of.get("processes") or 1) * int(of.get("tensor_parallel") or 1)
