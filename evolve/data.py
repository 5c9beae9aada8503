"""Data sets: where rows come from, and which split each is in.

A row is {"prompt", "chosen", "rejected"}, texts or lists of messages; with a reference answer ("gold"), the pair may be
missing where none is asked for. Rows with the same prompt count once. Their order
is by a hash of seed and prompt, so that it doesn't depend on the file's; splits are consecutive stretches of it:
held-out rows first (unless they have a file or split of their own, whose prompts are then kept out of the rest), then
pairs for SFT, pairs for offline training, and a stretch of prompts for each iteration; a reward model's pairs are
taken from the end.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from typing import Any

Row = dict[str, Any]
EMBEDDED_VERSION = 1  # raised when world.py makes other prompts, teacher answers or rewards
NO_PAIRS = "set data.sft_pairs, data.offline_pairs and data.reward_model_pairs to what the data set has, or 0"
FILES = (".jsonl", ".jsonl.gz", ".json")


class DataError(ValueError):
    """A data set that can't be used, as one line."""


def is_file(path: str) -> bool:
    return path.endswith(FILES)


def as_text(value: Any, where: str) -> str:
    """A text, or the last message of a list of messages (a prompt's only one: earlier turns would be lost)."""
    if isinstance(value, list) and len(value) > 1 and where.endswith("prompt"):
        raise DataError(f"{where}: a conversation of {len(value)} messages; only prompts of one message are used")
    if isinstance(value, list) and value and isinstance(value[-1], dict) and isinstance(value[-1].get("content"), str):
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise DataError(f"{where}: neither a text nor a list of messages")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a character (a lone surrogate)") from None
    return value


def _gold(value: Any, where: str) -> str:
    """A reference answer: what stands behind the last ####, if there is one (GSM8K's form), or else all of it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    gold = as_text(value, where).rpartition("####")[2].strip()
    if not gold:
        raise DataError(f"{where}: an empty reference answer")
    return gold


def read(path: str, split: str, prompt: str = "prompt", gold: str | None = None) -> list[Row]:
    """All rows of a JSONL file (or JSON list) or of a hub data set's split, as texts.

    `prompt` and `gold` name the columns of prompts and reference answers. A row with a reference answer has a pair or
    none. Raises DataError naming the file and line where something is wrong.
    """
    if is_file(path):
        raw = parse(path)
    else:
        from datasets import load_dataset

        name, _, revision = path.partition("@")
        raw = list(enumerate(load_dataset(name, revision=revision or None, split=split), 1))
    rows = []
    for number, row in raw:
        where = f"{path}, row {number}"
        pair = ("chosen", "rejected") if gold is None or (isinstance(row, dict) and "chosen" in row) else ()
        needed = (prompt, *pair) if gold is None else (prompt, gold, *pair)
        missing = [key for key in needed if key not in row] if isinstance(row, dict) else ["keys"]
        if missing:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where}: no '{missing[0]}'; it has {has}")
        found = {"prompt": as_text(row[prompt], f"{where}, {prompt}")}
        found |= {key: as_text(row[key], f"{where}, {key}") for key in pair}
        rows.append(found if gold is None else {**found, "gold": _gold(row[gold], f"{where}, {gold}")})
    return rows


def parse(path: str) -> list[tuple[int, Any]]:
    """The rows of a JSONL file or JSON list, each with its number. Raises DataError naming file and line."""
    number = 0
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                content = json.load(file)
                if not isinstance(content, list):
                    raise DataError(f"{path}: holds a {type(content).__name__}, not a list of rows")
                return list(enumerate(content, 1))
            raw = []
            for number, line in enumerate(file, 1):
                if line.strip():
                    raw.append((number, json.loads(line)))
            return raw
    except DataError:
        raise
    except (ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{path}, line {number or 1}: not JSON in UTF-8, or damaged ({error})") from None


def row_id(prompt: str) -> str:
    """Names a prompt wherever it turns up."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def ordered(rows: list[Row], seed: int, max_characters: int | None) -> tuple[list[Row], dict[str, int]]:
    """Usable rows, one a prompt, in the order that splits are taken from; and counts of those left out."""
    dropped = {"empty": 0, "too many characters": 0, "chosen is rejected": 0, "prompt seen before": 0}
    kept: dict[str, Row] = {}
    # In an order of their own, so that which of two rows with one prompt is kept is not the file's order either.
    for row in sorted(rows, key=lambda row: [row.get(key, "") for key in ("prompt", "chosen", "rejected", "gold")]):
        key = same(row["prompt"])
        if not all(text.strip() for text in row.values()):
            dropped["empty"] += 1
        elif max_characters is not None and max(map(len, row.values())) > max_characters:
            dropped["too many characters"] += 1
        elif has_pair(row) and row["chosen"] == row["rejected"]:
            dropped["chosen is rejected"] += 1
        elif key in kept:
            dropped["prompt seen before"] += 1
        else:
            kept[key] = row
    order = sorted(kept.values(), key=lambda row: hashlib.sha256(f"{seed}\x00{row['prompt']}".encode()).digest())
    return order, {reason: count for reason, count in dropped.items() if count}


def has_pair(row: Row) -> bool:
    return "chosen" in row


def same(prompt: str) -> str:
    """A prompt without what does not make it another one: case and spacing."""
    return " ".join(prompt.split()).lower()


def slice_rows(
    path: str,
    eval_path: str | None,
    *,
    pool: str,
    start: int,
    count: int,
    reserve: int,
    tail: int = 0,
    seed: int,
    split: str,
    eval_split: str | None,
    max_characters: int | None,
    prompt: str = "prompt",
    gold: str | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """`count` rows of a pool from `start` on, each with its id, and counts of what was left out of the whole source.

    Raises DataError if the pool has too few rows, or pairs are asked of rows without.
    """
    dropped: dict[str, int] = {}
    if path == "embedded":
        from evolve import world

        if pool == "pairs":
            rows = world.rows(start + count, seed)
        else:
            part = "test" if pool == "eval" else "train"
            rows = [{"prompt": prompt} for prompt in world.prompts(start + count, seed, part)]
        rows = rows[start:]
    else:
        rows, dropped = ordered(read(path, split, prompt, gold), seed, max_characters)
        own_eval = eval_path is not None or eval_split is not None
        if own_eval:
            theirs = read(eval_path or path, eval_split or split, prompt, gold)
            held_out, eval_dropped = ordered(theirs, seed, max_characters)
            if pool == "eval":
                rows, dropped = held_out, eval_dropped
            else:
                prompts = {same(row["prompt"]) for row in held_out}
                clean = [row for row in rows if same(row["prompt"]) not in prompts]
                if len(clean) < len(rows):
                    dropped["prompt is held out"] = len(rows) - len(clean)
                rows = clean
        elif pool == "eval":
            rows = rows[:reserve]
        else:
            rows = rows[reserve:]
        if start >= 0 and pool != "eval":
            rows = rows[: len(rows) - tail]
        first = len(rows) + start if start < 0 else start
        if first < 0 or first + count > len(rows):
            raise DataError(
                f"{path}: {count} rows from row {first} on are asked of '{pool}', which has {len(rows)} "
                f"(left out: {dropped or 'none'}); make data.eval_prompts, data.sft_pairs, data.offline_pairs, "
                "data.prompts or iteration.count smaller"
            )
        rows = rows[first : first + count]
        if pool == "pairs" and not all(map(has_pair, rows)):
            raise DataError(f"{path}: pairs are asked of rows without 'chosen' and 'rejected'; {NO_PAIRS}")
    return [{"id": row_id(row["prompt"]), **row} for row in rows], dropped
