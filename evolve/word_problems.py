"""python -m evolve.word_problems [FILE] [--rows N] [--seed S]: sums in a sentence, with answers right and wrong.

The smallest task on which a real model of a hundred million parameters is right at times, so that training can be seen
to change something: "Anna has 7 stamps and gets 5 more. How many ..." [reconstructed: the paper trains on UltraFeedback
and measures GSM8K]. A row has `prompt`, `gold` (the number), `chosen` (a worked answer) and `rejected` (the same with a
slip in its sum). Equal seeds make equal files; a file's prompts differ.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

DEFAULT = "data/word_problems.jsonl"
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack"]
THINGS = ["apples", "stamps", "marbles", "books", "coins", "shells", "cards", "pencils", "eggs"]
MORE = ("gets {b} more", "finds {b} more", "buys {b} more")
FEWER = ("gives away {b}", "loses {b}", "sells {b}")
LARGEST = 20  # of what there is at first
SLIPS = (-2, -1, 1, 2)


def rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Raises ValueError where there are not so many problems."""
    most = (
        len(NAMES) * len(THINGS) * (LARGEST - 1) * (len(MORE) + len(FEWER))
    )  # at least, for each has a change that fits
    if not 0 < count <= most:
        raise ValueError(f"{count:,} rows: from 1 to {most:,}")
    draw, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        name, thing, a = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, LARGEST)
        more = draw.random() < 0.5
        b = draw.randint(2, 9) if more else draw.randint(1, min(a, 9))
        happens = draw.choice(MORE if more else FEWER).format(b=b)
        prompt = f"{name} has {a} {thing} and {happens}. How many {thing} does {name} have now?"
        if prompt in seen:
            continue
        seen.add(prompt)
        right = a + b if more else a - b
        wrong = draw.choice([right + slip for slip in SLIPS if right + slip >= 0])
        worked = f"{name} has {a} {'+' if more else '-'} {b} = {{0}} {thing} now. The answer is {{0}}."
        answers = {"chosen": worked.format(right), "rejected": worked.format(wrong)}
        yield {"prompt": prompt, **answers, "gold": str(right)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evolve.word_problems", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path(DEFAULT), metavar="FILE", help=DEFAULT)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        made = list(rows(given.rows, given.seed))
    except ValueError as error:
        parser.error(str(error))
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.write_text("".join(json.dumps(row) + "\n" for row in made))
    print(f"{len(made):,} problems in {given.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
