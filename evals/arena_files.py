"""Arena-Hard's files as lmarena/arena-hard-auto and its forks write them, in the forms of 2024 and of 2025.

    question.jsonl            {uid, category, prompt}                    {question_id, category, turns: [{content}]}
    model_answer/*.jsonl      {uid, model, messages: [.., {content: {answer}}]}
                              {question_id, model_id, choices: [{turns: [{content}]}]}
    model_judgment/*.jsonl    {uid, category, model, judge, games: [{score, judgment: {answer}}, null]}
                              {question_id, model, judge, games: [{score, judgment}, ...]}
    arena_hard_battles.jsonl  {question_id, model_a, model_b, winner}    of v0.1 alone; much better is three such rows

Each may be gzipped. What can't be used is one ValueError that names file and row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from evolve import data

Parts = dict[str, list[tuple[float, float]]]  # {question: [(rows won by the model, rows), ...]}
Games = list[tuple[str, list[str | None]]]  # [(question, labels of its games)]
WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


def questions(path: str, baseline_path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` questions, each with the baseline's answer: {id, prompt, reference, uid, category}.

    An id or a prompt for the second time and a question without a baseline answer are errors.
    """
    answers: dict[str, str] = {}
    for where, row in _rows(baseline_path):
        uid = _uid(row, where)
        if uid in answers:
            raise ValueError(f"{where}: a second answer to {uid}")
        answers[uid] = _answer(row, where)
    found: list[dict[str, Any]] = []
    seen: dict[tuple[str, str], str] = {}
    for where, row in islice(_rows(path), limit):
        uid = _uid(row, where)
        prompt = data.as_text(_one(row, where, "prompt", "turns"), f"{where}, prompt")
        identity = data.row_id(prompt)
        for key in (("id", uid), ("prompt", identity)):
            if key in seen:
                raise ValueError(f"{where}: the {key[0]} of {seen[key]} again")
            seen[key] = where
        if uid not in answers:
            raise ValueError(f"{where}: {baseline_path} has no answer to {uid}")
        made = {"id": identity, "prompt": prompt, "reference": answers[uid], "uid": uid}
        found.append(made | ({"category": row["category"]} if "category" in row else {}))
    if not found:
        raise ValueError(f"{path}: no questions")
    return found


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in data.parse(path):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}, not an object")
        yield where, row


def _one(row: Mapping[str, Any], where: str, *keys: str) -> Any:
    """The first of `keys` that the row has."""
    for key in keys:
        if key in row:
            return row[key]
    raise ValueError(f"{where}: no {' or '.join(map(repr, keys))}; it has {', '.join(row) or 'nothing'}")


def _uid(row: Mapping[str, Any], where: str) -> str:
    return str(_one(row, where, "uid", "question_id"))


def _answer(row: Mapping[str, Any], where: str) -> str:
    turns = _one(row, where, "messages", "choices")
    try:
        content = turns[-1]["content"] if "messages" in row else turns[0]["turns"][-1]["content"]
        content = content["answer"] if isinstance(content, dict) else content
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{where}: no answer where Arena-Hard's model_answer files have it") from None
    return data.as_text(content, f"{where}, answer")


def load(paths: Iterable[str], by_category: bool = False) -> dict[tuple[str | None, ...], Games]:
    """Judgments by (model, judge), or (model, judge, category). A null game, and a null score, is the label None."""
    found: dict[tuple[str | None, ...], Games] = defaultdict(list)
    for path in paths:
        for where, row in _rows(path):
            games = _one(row, where, "games")
            if not isinstance(games, list) or len(games) > 2:
                raise ValueError(f"{where}: 'games' is not a list of at most two")
            labels = [None if game is None else _label(game, where) for game in games]
            key = (str(_one(row, where, "model")), row.get("judge"), *([row.get("category")] if by_category else []))
            found[key].append((_uid(row, where), labels))
    return found


def _label(game: Any, where: str) -> str | None:
    label = _one(game, where, "score") if isinstance(game, dict) else game
    if label is not None and not (isinstance(game, dict) and isinstance(label, str)):
        raise ValueError(f"{where}: a game's score is {label!r}, not a label")
    return label


def battles(path: str, baseline: str | None = None) -> dict[str, Parts]:
    """Battles against the baseline, by model. `baseline` is the only model_a where it is not said.

    A battle without the baseline is an error: such a table's Bradley-Terry model is not a share.
    """
    rows = list(_rows(path))
    firsts = {str(_one(row, where, "model_a")) for where, row in rows}
    if baseline is None and len(firsts) != 1:
        raise ValueError(f"{path}: {len(firsts)} models are model_a; say which one is the baseline (--baseline)")
    baseline = baseline or firsts.pop()
    found: dict[str, Parts] = defaultdict(lambda: defaultdict(list))
    for where, row in rows:
        sides, winner = [str(_one(row, where, name)) for name in ("model_a", "model_b")], _one(row, where, "winner")
        if sides.count(baseline) != 1 or winner not in WINNERS:
            raise ValueError(f"{where}: {sides[0]} against {sides[1]}, winner {winner}: not a battle with {baseline}")
        ours = 1 - sides.index(baseline)
        won = WINNERS[winner] if ours == 0 else 1 - WINNERS[winner]
        found[sides[ours]][_uid(row, where)].append((won, 1.0))
    return found
