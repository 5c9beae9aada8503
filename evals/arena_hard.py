"""Arena-Hard: how often a judge prefers an answer to a baseline's, on prompts that are hard (arXiv 2406.11939).

    prompt "Use ABC notation to write a melody ..."
    game 0, A the baseline's answer, B ours     the judge ends with [[A>B]]     0 of 1 row is won
    game 1, A ours, B the baseline's            the judge ends with [[A>>B]]    3 of 3 rows are won

Every prompt is judged in both orders, by a judge that first writes an answer of its own; much better counts as three
rows. The score is that of lmarena/arena-hard-auto: the chance to win against the baseline that a Bradley-Terry model
of all rows predicts. With one baseline its likelihood falls into one term a model, whose maximum is the share of rows
won, a tie being half a row, so no regression is run. The interval is that regression's too, clustered by prompt: a
prompt's rows stand or fall together, and upstream, which draws rows as if they were independent, gets one too narrow
(`unclustered`).

v2.0 takes the same share, from a judge's last label where v0.1 wants a single one, and leaves a prompt out unless both
of its games count. Its style control is not built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from evals import picks, refinement, statistics
from evals.arena_files import Parts, battles, load
from evals.arena_files import questions as questions  # of the benchmark's face
from evals.games import Ask, Replies, Reply
from evals.needs import Asked, File, Measured, Needs, samples
from evals.statistics import Estimate
from evolve.config import Config, ConfigError, Endpoint, find

METRICS = {"score": "Arena-Hard score"}
OBJECTIVE = ("refined",)
EXPLAIN = {
    "score": "share of rows won against the baseline, in percent",
    "gain": "refined - direct, paired",
    "best": picks.EXPLAIN["best"],
}

WON = {"A>>B": (3.0, 3.0), "A>B": (1.0, 1.0), "A=B": (0.5, 1.0), "B>A": (0.0, 1.0), "B>>A": (0.0, 3.0)}  # by A
MIRRORED = {"B<<A": WON["A>>B"], "B<A": WON["A>B"], "B=A": WON["A=B"], "A<B": WON["B>A"], "A<<B": WON["B>>A"]}
LABELS = {"v0.1": WON, "v2.0": WON | MIRRORED}

OWN = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
PLACES = {"prompt": "prompt", "first": "first", "second": "second"}
PLACES |= {"question_1": "prompt", "answer_1": "first", "answer_2": "second"}  # upstream's config of v0.1
PLACES |= {"QUESTION": "prompt", "ANSWER_A": "first", "ANSWER_B": "second"}  # and of v2.0


def needs(config: Config) -> Needs:
    own, turns, here = config.eval.arena_hard, config.eval.turns, "eval.arena_hard"
    template = None
    if own.prompt_file is not None:
        file = find(own.prompt_file)
        if file is None or not file.is_file():
            raise ConfigError(f"{here}.prompt_file={own.prompt_file}: no such file")
        template = file.read_text(encoding="utf-8")
    judged = f", prompt {prompt_hash(template)}" if isinstance(config.annotator, Endpoint) else ""
    files = {
        "path": File(f"{here}.path", own.path, own.revision),
        "baseline_path": File(f"{here}.baseline", own.baseline, own.revision),
    }
    said = f"Arena-Hard {own.version}{judged}"
    tokens = own.max_new_tokens or config.data.max_response_tokens
    some = f", {own.limit} questions" if own.limit else ""
    return Needs(
        refinement.chain(turns),
        f"{said}, against {own.baseline}{some}, chain of {turns} turns, at most {tokens} tokens",
        own.temperature,
        said if judged else own.version,
        asked=Asked(files, limit=own.limit),
        versus={"template": template},
        reading={"version": own.version},
        max_new_tokens=tokens,
        settings={"settings": {"version": own.version, "template": template}},
        samples=samples(config, own.pick),
    )


@lru_cache
def _template(text: str) -> tuple[str | None, str, dict[str, Any]]:
    """System part, user part, and a request's other fields."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the judge's prompt is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not ("user" in found or "prompt_template" in found):
        raise ValueError("the judge's prompt has no 'user' (or upstream's 'prompt_template')")
    system, user = found.get("system", found.get("system_prompt")), found.get("user", found.get("prompt_template"))
    if isinstance(user, list) and len(user) == 1:
        user = user[0]
    if not isinstance(user, str) or not isinstance(system, str | None):
        raise ValueError("the judge's prompt: 'system' and 'user' are texts")
    if missing := {"prompt", "first", "second"} - {PLACES.get(name) for name in re.findall(r"\{(\w+)\}", user)}:
        raise ValueError(f"the judge's prompt: 'user' has no {{{min(missing)}}}")
    if "A>B" not in f"{system}{user}":
        raise ValueError("the judge's prompt names no label such as [[A>B]]; upstream's v2.0 files keep theirs in code")
    return system, user, {"temperature": found.get("temperature", 0), "max_tokens": found.get("max_tokens", 4096)}


def prompt_hash(template: str | None = None) -> str:
    """Names what a judge is sent, for a metric's protocol: 8 hex digits."""
    return hashlib.sha256(json.dumps(_template(template or OWN)).encode()).hexdigest()[:8]


def asks(prompt: str, answer: str, reference: str, *, template: str | None = None) -> list[Ask]:
    """Game 0 shows the reference as A, game 1 the answer.

    Args:
        template: the text of a file like arena_hard.yaml, in its place.

    Raises:
        ValueError: the template is not of this form.
    """
    system, user, fields = _template(template or OWN)
    head = [{"role": "system", "content": system}] if system else []
    games = (False, {"first": reference, "second": answer}), (True, {"first": answer, "second": reference})
    return [
        Ask([*head, {"role": "user", "content": _fill(user, {"prompt": prompt, **shown})}], fields, answer_first)
        for answer_first, shown in games
    ]


def _fill(text: str, filled: Mapping[str, str]) -> str:
    """In one pass, so that braces in a prompt or an answer stay text."""
    return re.sub(r"\{(\w+)\}", lambda place: filled.get(PLACES.get(place[1], ""), place[0]), text)


def read(ask: Ask, reply: Reply, *, version: str = "v0.1") -> str | None:
    """The label as the judge wrote it, one of the five or not. v0.1: None where it wrote several; v2.0: the last."""
    if version == "v0.1":
        found = set(re.findall(r"\[\[([AB<>=]+)\]\]", reply.text))
        return found.pop() if len(found) == 1 else None
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
        if labels := re.findall(pattern, reply.text.upper()):
            return str(labels[-1])
    return None


def stand_in(sign: int) -> list[str]:
    """The two games' labels where another scorer finds the answer better (1), equal (0) or worse (-1)."""
    return {1: ["B>A", "A>B"], 0: ["A=B", "A=B"], -1: ["A>B", "B>A"]}[sign]


def _counted(verdicts: Sequence[str | None], version: str) -> list[tuple[int, str]]:
    """The games that count: (game, label). Of v2.0 both or none."""
    found = [(game, label) for game, label in enumerate(verdicts) if label and label in LABELS[version]]
    return found if version == "v0.1" or len(found) == 2 else []


def _parts(games: Iterable[tuple[str, Sequence[str | None]]], version: str) -> Parts:
    found: Parts = defaultdict(list)
    for question, verdicts in games:
        for game, label in _counted(verdicts, version):
            won, rows = LABELS[version][label]
            found[question].append((won if game == 1 else rows - won, rows))
    return found


def _sums(parts: Parts) -> dict[str, tuple[float, float]]:
    return {question: (sum(won for won, _ in games), sum(of for _, of in games)) for question, games in parts.items()}


def _percent(share: Estimate) -> dict[str, Any]:
    low, high = (bound if bound is None else 100 * bound for bound in (share.low, share.high))
    return asdict(Estimate(100 * share.value, low, high, share.n))


def score(parts: Parts) -> dict[str, Any]:
    """Score in percent, the interval that upstream's rows would give, and the rating (the baseline's is 1000).

    All None where no game counts, the rating also where all or nothing is won.
    """
    if not any(parts.values()):
        return {"score": None, "unclustered": None, "rating": None}
    share = statistics.ratio(_sums(parts))
    rows = [won / of for games in parts.values() for won, of in games for _ in range(int(of))]
    unclustered = statistics.ratio({str(number): (won, 1.0) for number, won in enumerate(rows)})
    won = share.value
    rating = 1000 + 400 * math.log10(won / (1 - won)) if 0 < won < 1 else None
    return {"score": _percent(share), "unclustered": _percent(unclustered), "rating": rating}


def judged(games: Sequence[tuple[str, Sequence[str | None]]], version: str = "v0.1") -> dict[str, Any]:
    """`score` of (question, labels of its two games), with what lies behind it.

    unscored: games that do not count; unplayed: questions without a game that does; labels: how often each was given;
    first_wins: by how much more of its games the answer shown first wins than the second, in percent of the games, over
    questions of which both games count (so that which answer is better cancels out).
    """
    counted = [(question, _counted(verdicts, version)) for question, verdicts in games]
    labels = Counter(label for _, found in counted for _, label in found)
    lead: dict[str, list[float]] = defaultdict(list)
    for question, found in counted:
        if len(found) == 2:
            ahead = [2 * won / of - 1 for won, of in (LABELS[version][label] for _, label in found)]
            lead[question].append(fmean(ahead))
    parts = _parts(games, version)
    return {
        **score(parts),
        "unscored": sum(len(verdicts) for _, verdicts in games) - labels.total(),
        "unplayed": len({question for question, _ in games} - parts.keys()),
        "labels": {label: labels[label] for label in LABELS[version] if label in WON or labels[label]},
        "first_wins": _percent(statistics.mean(lead)) if lead else None,
    }


def measure(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    protocol: str,
    *,
    best_answers: Sequence[Mapping[str, Any]] = (),
    best_verdicts: Sequence[Mapping[str, Any]] = (),
    best_replies: Replies | None = None,
    version: str = "v0.1",
    template: str | None = None,
    replies: Replies | None = None,
    judge: str = "",
) -> Measured:
    """The score of each turn that was judged, the gain of the last over the first, and the best of several.

    Args:
        questions: rows of `questions`.
        answers: rows of answers.jsonl (id, answers).
        verdicts: rows (id, verdicts: {turn: labels in the order of `asks`, None where there is none}).
        best_answers, best_verdicts, best_replies: the same of the answers that the stage `pick` took, as turn 1.
        template: what the judge was asked with; the records show it, with its replies.
        protocol: judge, prompt_hash, baseline, temperature ...: what a number must be quoted with.

    Raises:
        ValueError: a turn has no game that counts, or no turn was judged.
    """
    turns = sorted({int(turn) for row in verdicts for turn in row["verdicts"]})
    if not turns:
        raise ValueError("no turn was judged")
    metrics = [_turn(questions, answers, verdicts, turn, version) for turn in turns]
    first, last = metrics[0][1], metrics[-1][1]
    metrics += [_turn(questions, best_answers, best_verdicts, 1, version)] if best_answers else []
    common = first.keys() & last.keys()
    gain = None
    if common:
        sides = ({question: side[question] for question in first if question in common} for side in (last, first))
        after, before = ({key: [v] for key, v in statistics.by_prompt(side).items()} for side in sides)
        gain = _percent(statistics.paired(after, before))
    result = {
        "benchmark": "arena_hard",
        "protocol": protocol,
        "version": version,
        "turns": [{"turn": turn, **found} for turn, (found, _) in zip(turns, metrics, strict=False)],
        "gain": {"score": gain},
        **({"sizes": [picks.of_all(best_answers, {"best": metrics[-1][0]})]} if best_answers else {}),
    }
    dropped = {
        "games without a verdict that counts": sum(found["unscored"] for found, _ in metrics),
        "prompts without a game that counts": sum(found["unplayed"] for found, _ in metrics),
    }
    # A prompt's own share would not do: paired, much better would count no more than better, unlike in the score.
    items = {
        kind: {"score": {question: 100 * value for question, value in statistics.by_prompt(side).items()}}
        for kind, side in (("direct", first), ("refined", last), *([("best", metrics[-1][1])] if best_answers else []))
    }
    how = {"judge": judge, "baseline": "baseline", "version": version, "template": template}

    def records(out: Path) -> None:
        _records(questions, answers, verdicts, replies or {}, how, out)
        if best_answers:
            _records(questions, best_answers, best_verdicts, best_replies or {}, how, out / "best")

    return Measured(result, dropped, items, records)


def _turn(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    turn: int,
    version: str,
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """A turn's metrics, and (won, rows) by prompt. Raises ValueError where no game counts."""
    given = {row["id"]: row["verdicts"] for row in verdicts}
    games = [(row["id"], given.get(row["id"], {}).get(str(turn), [])) for row in questions]
    found = judged(games, version)
    if found["score"] is None:
        raise ValueError(
            f"turn {turn}: none of {found['unscored']} games has a verdict that counts; what the judge said "
            "stands in the comparison's replies.jsonl"
        )
    lengths = [len(row["answers"][turn - 1]["text"]) for row in answers if len(row["answers"]) >= turn]
    return {**found, "characters": fmean(lengths) if lengths else None}, _sums(_parts(games, version))


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direct answers, refined answers, and the gain of one over the other; the best of several."""
    turns = metrics["turns"]
    return {"direct": turns[0], "refined": turns[-1], "gain": metrics["gain"], **picks.headline(metrics)}


def summary(metrics: Mapping[str, Any]) -> str:
    found = headline(metrics)
    gain = found.pop("gain")["score"]
    said = ", ".join(f"{kind} {worth['score']['value']:.1f}" for kind, worth in found.items())
    text = f"Arena-Hard {metrics['version']} {said}"
    if gain and gain["low"] is not None:
        text += "; gain {value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**gain)
    return text


def judgments(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    *,
    turn: int,
    model: str,
    judge: str,
    baseline: str,
    template: str | None = None,
    version: str = "v0.1",
) -> Iterator[dict[str, Any]]:
    """One turn's games as rows of upstream's model_judgment files, for upstream's scoring and others'.

    Args: as of `measure`; a row of verdicts may have `replies` beside, {turn: the judge's texts}.
    """
    texts = {row["id"]: [answer["text"] for answer in row["answers"]] for row in answers}
    given = {row["id"]: row for row in verdicts}
    for row in questions:
        labels = given.get(row["id"], {"verdicts": {}})["verdicts"].get(str(turn))
        if labels is None:
            continue
        said = given[row["id"]].get("replies", {}).get(str(turn)) or [""] * len(labels)
        made = asks(row["prompt"], texts[row["id"]][turn - 1], row["reference"], template=template)
        played = list(zip(made, said, labels, strict=True))
        if version == "v0.1":
            head = {"question_id": row["uid"], "model": model, "judge": judge}
            games = [
                {"user_prompt": ask.messages[-1]["content"], "judgment": text or "", "score": label}
                for ask, text, label in played
            ]
        else:
            head = {"uid": row["uid"], "category": row.get("category"), "judge": judge, "model": model}
            head["baseline"] = baseline
            games = [
                {"score": label, "judgment": {"answer": text or ""}, "prompt": ask.messages}
                for ask, text, label in played
            ]
        yield {**head, "games": games}


def _records(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    replies: Replies,
    how: Mapping[str, Any],
    out: Path,
) -> None:
    """Writes judgments_turn_N.jsonl of each judged turn, in upstream's form. Games of a stand-in have no text."""
    out.mkdir(exist_ok=True)
    texts = {
        prompt: {turn: [reply.text if reply else "" for reply in games] for turn, games in turns.items()}
        for prompt, turns in replies.items()
    }
    said = [{**row, "replies": texts.get(row["id"], {})} for row in verdicts]
    for turn in sorted({int(turn) for row in verdicts for turn in row["verdicts"]}):
        rows = judgments(questions, answers, said, turn=turn, model=f"turn {turn}", **how)
        with (out / f"judgments_turn_{turn}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(words: Sequence[str] | None = None) -> int:
    """Scores judgments or battles that others have made, as JSON. The exit status: 0 done, 2 a file can't be used."""
    parser = argparse.ArgumentParser(prog="python -m evals.arena_hard", description=main.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--judgments", nargs="+", metavar="FILE", help="upstream's model_judgment/*.jsonl, or .gz")
    source.add_argument("--battles", metavar="FILE", help="upstream's arena_hard_battles.jsonl, or .gz")
    parser.add_argument("--version", choices=LABELS, default="v0.1", help="which release's scoring (v0.1)")
    parser.add_argument("--model", help="this one alone")
    parser.add_argument("--baseline", help="of battles (default: the only model_a)")
    asked = parser.parse_args(words)
    try:
        if asked.battles and asked.version != "v0.1":
            raise ValueError(f"{asked.battles}: battles are v0.1's; {asked.version} is scored from --judgments")
        if asked.battles:
            table = battles(asked.battles, asked.baseline)
            rows = [{"model": model, **score(parts), "unscored": None} for model, parts in table.items()]
        else:
            rows = [
                dict(zip(("model", "judge", "category"), key, strict=False)) | judged(games, asked.version)
                for key, games in load(asked.judgments, by_category=asked.version == "v2.0").items()
            ]
        models = sorted({row["model"] for row in rows})
        if not models:
            raise ValueError(f"{', '.join(asked.judgments)}: no judgments")
        if asked.model is not None and asked.model not in models:
            raise ValueError(f"no model {asked.model}; there are {', '.join(models)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for row in rows if asked.model in (None, row["model"])]
    rows.sort(key=lambda row: -row["score"]["value"] if row["score"] else math.inf)
    print(json.dumps({"benchmark": "arena_hard", "version": asked.version, "models": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
