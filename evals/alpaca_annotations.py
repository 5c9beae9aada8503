"""AlpacaEval's annotations.json: written for others' tools, read from theirs, and scored again.

    python -m evals.alpaca_eval --annotations FILE ... [--questions FILE] [--gamed FILE] [--difficulty FILE] [--c C]

A FILE holds rows of instruction, output_1 (the reference's), output_2, preference, and generator_2, or lengths alone
(model, row, preference, len_baseline, len_model), as JSON, JSONL or CSV, gzipped or not. A row without a preference is
unscored. What comes is JSON, an object for each model, a list where there are several.

An instruction's difficulty goes by its position in the full set. --questions, the file of reference outputs, tells it;
without, a FILE has to be complete. --by-position takes the rows of a FILE that misses some as if it were, as published
numbers do. --c is the regularisation, else found by cross-validation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evals import alpaca_eval, length_control, tables
from evals.games import Reply
from evals.length_control import Control, Controlled, Game, Unfitted
from evolve.data import row_id


def of(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    *,
    turn: int,
    generator: str,
    annotator: str,
    replies: Mapping[str, Reply] | None = None,
) -> list[dict[str, Any]]:
    """Rows of annotations.json for one turn of `measure`'s arguments, one for each question and in their order.

    What is unscored has preference None; the package's win rate leaves it out.

    Args:
        generator: the model's name. annotator: the judge's.
        replies: what the judge said, by the question's id.
    """
    texts = {row["id"]: row["answers"][turn - 1]["text"] for row in answers if len(row["answers"]) >= turn}
    found, _ = alpaca_eval.games(questions, answers, verdicts, turn)
    return [
        {
            "instruction": row["prompt"],
            "output_1": row["reference"],
            "generator_1": row["generator"],
            "dataset": row["dataset"],
            "output_2": texts.get(row["id"], ""),
            "generator_2": generator,
            "annotator": annotator,
            "preference": game.preference,
            "raw_completion": _raw((replies or {}).get(row["id"])),
        }
        for row, game in zip(questions, found, strict=True)
    ]


def _raw(reply: Reply | None) -> dict[str, Any] | None:
    if reply is None:
        return None
    logprobs = None if reply.logprobs is None else {"content": reply.logprobs}
    message = {"role": "assistant", "content": reply.text}
    return {"finish_reason": reply.end, "logprobs": logprobs, "message": message, "text": reply.text}


def read(path: str, order: Mapping[str, int] | None = None, by_position: bool = False) -> dict[str, list[Game]]:
    """The games of each model in a file.

    Instructions' positions are by `order` (of ids), or the file's, where it isn't AlpacaEval's set in another order;
    `by_position` takes them all the same.

    Raises OSError, or ValueError naming the file and row.
    """
    rows = [(f"{path}, row {count}", row) for count, row in enumerate(tables.rows(path), 1)]
    if "instruction" not in rows[0][1] and "len_model" in rows[0][1]:
        found: dict[str, list[Game]] = {}
        for where, row in rows:
            position, length, reference = (_whole(row, key, where) for key in ("row", "len_model", "len_baseline"))
            game = Game(str(position), _preference(row, where), length, reference, position)
            found.setdefault(tables.text(row, "model", where), []).append(game)
    else:
        models: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for where, row in rows:
            models.setdefault(str(row.get("generator_2") or ""), []).append((where, row))
        found = {model: _read(mine, order, by_position) for model, mine in models.items()}
    for model, games in found.items():
        tables.unique([game.id for game in games], "instruction", f"{path}, {model}" if len(found) > 1 else path)
    return found


def _read(
    rows: Sequence[tuple[str, Mapping[str, Any]]], order: Mapping[str, int] | None, by_position: bool
) -> list[Game]:
    prompts = [tables.text(row, "instruction", where) for where, row in rows]
    ids = [row_id(prompt) for prompt in prompts]
    if (
        order is not None
        and (new := next((place for place, key in enumerate(ids) if key not in order), None)) is not None
    ):
        raise ValueError(f"{rows[new][0]}: its instruction is not among the questions")
    positions: Sequence[int | None] = range(len(ids)) if by_position else length_control.positions(ids)
    if order is not None:
        positions = [order[key] for key in ids]
    games = []
    for (where, row), prompt, key, position in zip(rows, prompts, ids, positions, strict=True):
        length, reference = (len(tables.text(row, output, where, empty=True)) for output in ("output_2", "output_1"))
        first = alpaca_eval.shown_first(prompt)
        games.append(Game(key, _preference(row, where), length, reference, position, first))
    return games


def _whole(row: Mapping[str, Any], key: str, where: str) -> int:
    found = tables.number(row, key, where)
    if found < 0 or found != int(found):
        raise ValueError(f"{where}, {key}: {found:g} is not a whole number from 0")
    return int(found)


def _preference(row: Mapping[str, Any], where: str) -> float | None:
    value = row.get("preference")
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() in ("", "nan"):
        return None
    found = tables.number(row, "preference", where) or 1.5  # 0: a tie, in old files
    if not 1 <= found <= 2:
        raise ValueError(f"{where}, preference: {found:g} is neither from 1 to 2 nor 0")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.alpaca_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--questions", metavar="FILE", help="reference outputs")
    parser.add_argument("--gamed", metavar="FILE", help="the package's df_gamed.csv; the hub's, if not given")
    parser.add_argument(
        "--difficulty", metavar="FILE", help="its instruction_difficulty.csv; as in df_gamed.csv, if not"
    )
    parser.add_argument("--c", type=float, help="sklearn's C; by cross-validation, if not given")
    parser.add_argument("--by-position", action="store_true")
    parser.add_argument("--no-length-control", action="store_true")
    given = parser.parse_args(argv)
    try:
        found = _score(given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found[0] if len(found) == 1 else found, indent=1, ensure_ascii=False, allow_nan=False))
    return 0


def _score(given: argparse.Namespace) -> list[dict[str, Any]]:
    if given.c is not None and not 0 < given.c < math.inf:
        raise ValueError(f"--c {given.c:g}: has to be above 0")
    if given.questions and given.by_position:
        raise ValueError("--questions and --by-position say different things about where an instruction stands")
    order: dict[str, int] | None = None
    if given.questions:
        questions = alpaca_eval.questions(given.questions)
        order = {row["id"]: row["index"] for row in questions}
    read_all = [(path, read(path, order, given.by_position)) for path in given.annotations]
    # Last: the hub may be slow, and what is wrong with a file of the command is known without it.
    control: Control | Unfitted = Unfitted("not asked for")
    if not given.no_length_control:
        try:
            control = length_control.load(given.gamed, given.difficulty)
        except Unfitted as reason:
            control = reason
    found = []
    for path, model, mine in ((path, model, mine) for path, models in read_all for model, mine in models.items()):
        size = len(mine) if order is None else len(order)
        if isinstance(control, Control) and size > len(control.difficulty):
            raise ValueError(f"{path}: {size} instructions, but {len(control.difficulty)} difficulties")
        found.append({"model": model, "file": path, **_scored(mine, size, control, given)})
    return found


def _scored(games: Sequence[Game], size: int, control: Control | Unfitted, given: argparse.Namespace) -> dict[str, Any]:
    try:
        if isinstance(control, Control) and not given.by_position:
            control.cover(size)
    except Unfitted as reason:
        hint = "" if given.questions else "; --questions tells it, --by-position takes it from the row"
        control = Unfitted(f"{reason}{hint}")
    metrics, fitted = alpaca_eval.score(games, control, given.c)
    package = alpaca_eval.win_rate([game.preference for game in games if game.preference is not None])
    fit = {}
    if isinstance(fitted, Controlled):
        fit = {"lc_standard_error": fitted.standard_error, "c": fitted.c, "weights": fitted.weights}
    return {"n": package["n_total"], **metrics, **{key: package[key] for key in package if key != "win_rate"}, **fit}
