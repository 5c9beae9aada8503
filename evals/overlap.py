"""Contamination: which evaluation prompts were trained on.

A prompt is `exact` where a training text is the same but for case and spacing (evolve.data.same), and `ngram` where it
shares n words in a row with one, case and punctuation aside: 13 of them, as in GPT-3's appendix C. Of a prompt with
fewer words all must stand there in a row; what matches by a very short one says little. Exact matches count as both.

    training "What is the capital of France? Be brief."   evaluation "what is the capital of france"   ngram

Training prompts are counted apart from training answers: a model that was trained on prompts alone has not seen what
is asked for, one that has the prompt within an answer may have.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evolve import data

Row = Mapping[str, Any]


def overlap(
    training: Sequence[Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]], n: int = 13
) -> dict[str, Any]:
    """How many evaluation rows are in the training rows, and the ids of up to three.

    Args:
        training: rows with a prompt, and chosen and rejected if there are answers.
        evaluation: rows with a prompt; an id, or it is named as the pipeline names prompts.
        n: words in a row that make a match.

    Returns:
        {evaluation: rows, training: rows, exact, ngram, examples, answers: {exact, ngram, examples} or None}
    """
    if n < 1:
        raise ValueError(f"n={n}: at least one word makes a match")
    index = _Index(evaluation, n)
    answers = [row[key] for row in training for key in ("chosen", "rejected") if key in row]
    return {
        "evaluation": len(evaluation),
        "training": len(training),
        **index.matches(row["prompt"] for row in training),
        "answers": index.matches(answers) if answers else None,
    }


class _Index:
    """Evaluation rows by the texts, and the runs of words, that would give them away."""

    def __init__(self, rows: Sequence[Row], n: int) -> None:
        self.rows, self.n = rows, n
        self.same: dict[str, list[int]] = defaultdict(list)
        self.runs: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.shorter: dict[str, set[int]] = defaultdict(set)  # first word -> lengths of runs below n
        for number, row in enumerate(rows):
            self.same[data.same(row["prompt"])].append(number)
            words = _words(row["prompt"])
            if 0 < len(words) < n:
                self.shorter[words[0]].add(len(words))
            for run in {tuple(words)} if len(words) < n else set(_runs(words, n)):
                self.runs[run].append(number)

    def matches(self, texts: Iterable[str]) -> dict[str, Any]:
        exact: set[int] = set()
        shared: set[int] = set()
        for text in texts:
            exact.update(self.same.get(data.same(text), ()))
            words = _words(text)
            for run in filter(self.runs.__contains__, _runs(words, self.n)):
                shared.update(self.runs[run])
            for start, word in enumerate(words):
                for length in self.shorter.get(word, ()):
                    shared.update(self.runs.get(tuple(words[start : start + length]), ()))
        shared |= exact
        examples = sorted(shared, key=lambda number: (number not in exact, number))[:3]
        named = [self.rows[number] for number in examples]
        ids = [row.get("id", data.row_id(row["prompt"])) for row in named]
        return {"exact": len(exact), "ngram": len(shared), "examples": ids}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    """All runs of n words. (zip, so that ten thousand rows take seconds.)"""
    return zip(*(words[start:] for start in range(n)), strict=False)


def read(path: str, prompt: str = "prompt") -> list[dict[str, Any]]:
    """Rows of a JSONL file or JSON list, as texts: of conversations, all messages of a prompt, the last of an answer.

    Unlike evolve.data.read it takes rows without a pair and prompts of several messages. Raises ValueError naming the
    file and row.
    """
    rows = []
    for number, row in data.parse(path):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or prompt not in row:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{where}: no '{prompt}'; it has {has}")
        turns = row[prompt] if isinstance(row[prompt], list) else [row[prompt]]
        texts = [data.as_text(turn if isinstance(turn, str) else [turn], f"{where}, {prompt}") for turn in turns]
        answers = {key: row[key] for key in ("chosen", "rejected") if row.get(key) is not None}
        found = {key: data.as_text(value, f"{where}, {key}") for key, value in answers.items()}
        rows.append({"prompt": "\n".join(texts), **found} | ({"id": row["id"]} if "id" in row else {}))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Counts evaluation prompts that are in training data, as JSON. The exit status: 0 done, 2 a file can't be used."""
    parser = argparse.ArgumentParser(prog="python -m evals.overlap", description=main.__doc__)
    for name in ("training", "evaluation"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE", help=f"{' '.join(data.FILES)}")
        parser.add_argument(f"--{name}-prompt", default="prompt", metavar="COLUMN", help="of its prompts (prompt)")
    parser.add_argument("-n", type=int, default=13, help="words in a row that make a match (13)")
    asked = parser.parse_args(words)
    try:
        rows = read(asked.training, asked.training_prompt), read(asked.evaluation, asked.evaluation_prompt)
        counts = overlap(*rows, n=asked.n)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
