"""Scores a file of stored outputs to problems with one answer, and compares with the labels it holds, if any.

    python -m evals.math --outputs FILE [--prediction COLUMN] [--gold COLUMN] [--label COLUMN] [--rule gsm8k|math]

    {"gt": "\\\\frac{1}{9}", "pred": ["\\\\frac{1}{9}", "9"], "score": [true, false]}   accuracy 0.5, agreement 2 of 2

FILE is JSONL (.gz too) or a JSON list. Whose it is shows in its columns (FORMS); others are named by options. What is
printed is JSON: the accuracy, over all answers and by system, filter or turn; how many of the labels agree with it, and
each that does not. Exit code 2, and a line, where the file's columns are no known form or more than one.

An output is a text in which the answer stands, or the answer alone. The rule `math` is Math-Verify's comparison,
`gsm8k` that of plain numbers (verifiers.py). An output that is missing is wrong; one without a reference answer is
unscored.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from evals import statistics
from evolve import verifiers
from evolve.scorers import Item

RULES = {"math": "math", "gsm8k": "number"}  # by the verifier's name
DELIMITED = re.compile(r"(?<!\\)\$|\\boxed|####|\\\(|\\\[|\n")

Row = dict[str, Any]


class Output(NamedTuple):
    """One answer. group: whose it is, where a file has several systems', filters' or turns'."""

    prediction: Any
    gold: Any
    label: Any = None
    group: str = ""


class Form(NamedTuple):
    """A kind of file: its columns, those that it must not have, and a row's outputs.

    key: what names a question; None: the row. texts: predictions are texts, even if they look like an answer alone.
    """

    columns: tuple[str, ...]
    without: tuple[str, ...]
    outputs: Callable[[Row], list[Output]]
    key: str | None = None
    texts: bool = False


def _several(predictions: Any, gold: Any, labels: Any = None, group: str = "") -> list[Output]:
    """Of one prediction or a list, with a label for each, or none."""
    predictions = predictions if isinstance(predictions, list) else [predictions]
    labels = labels if isinstance(labels, list) else [labels] * len(predictions)
    return [Output(one, gold, label, group) for one, label in zip(predictions, labels, strict=True)]


def _systems(row: Row) -> list[Output]:
    return [
        Output(made["solution"], row["ground_truth"], made.get("is_correct"), system)
        for system, made in row.items()
        if isinstance(made, dict) and "solution" in made
    ]


def _sample(row: Row) -> list[Output]:
    [made, *_] = row["filtered_resps"]
    names = [*row.get("metrics", []), "exact_match", "acc"]
    label = next((row[name] for name in names if name in row), None)
    return _several(made, row["target"], label, row.get("filter", ""))


def _grades(labels: str) -> Callable[[Row], list[Output]]:
    return lambda row: _several(row["pred"], row["gt"], row.get(labels))


def _case(row: Row) -> list[Output]:
    return _several(row["pred"], row["gold"], row.get("expected", row.get("result")))


def _turns(row: Row) -> list[Output]:
    return [Output(made["text"], row["gold"], None, f"turn {made['turn']}") for made in row["answers"]]


FORMS = {
    "OpenAI's GSM8K example solutions": Form(("question", "ground_truth"), (), _systems),
    "ToRA's outputs": Form(("gt", "pred", "report"), ("score", "previous_score"), _grades("")),
    "Qwen's graded outputs": Form(("gt", "pred", "score"), ("previous_score",), _grades("score")),
    "RealCritic's rows": Form(("gt", "pred", "previous_score"), ("score",), _grades("previous_score")),
    "Math-Verify's cases": Form(("gold", "pred"), ("gt",), _case, texts=True),
    "lm-eval's samples": Form(("doc_id", "target", "filtered_resps"), (), _sample, "doc_id"),
    "our answers": Form(("id", "answers", "gold"), (), _turns, "id"),
}


class Refused(ValueError):
    """A file that can't be scored, as one line."""


def read(path: Path) -> list[Row]:
    """Raises Refused, naming file and line, for what isn't rows."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: can't be read: {error}") from None
    rows: list[Row] = []
    if text.lstrip().startswith("["):
        lines: list[tuple[str, str]] = [("", text)]
    else:
        lines = [(f", line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for where, line in lines:
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(f"{path}{where}: not JSON: {error}") from None
        rows += found if isinstance(found, list) else [found]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise Refused(f"{path}: holds {'something other than rows' if rows else 'no rows'}")
    return rows


def choose(rows: Sequence[Row], prediction: str | None, gold: str | None, label: str | None) -> tuple[str, Form]:
    """The form that every row has, or the one that the columns named make; and what it is called.

    Raises Refused where no form or more than one is possible.
    """
    common = [name for name in rows[0] if all(name in row for row in rows)]
    has = f"its rows have {', '.join(common) or 'no column in common'}"
    if prediction or gold:
        if not (prediction and gold):
            raise Refused(f"--prediction and --gold name both columns or neither; {has}")
        if missing := [name for name in (prediction, gold, label) if name and name not in common]:
            raise Refused(f"no column {missing[0]!r} in every row; {has}")

        def outputs(row: Row) -> list[Output]:
            made, labels = row[prediction], row[label] if label else None
            if isinstance(made, dict) and "solution" in made:
                made, labels = made["solution"], made.get("is_correct") if label is None else labels
            return _several(made, row[gold], labels)

        return f"columns {prediction}, {gold}{f', {label}' if label else ''}", Form((), (), outputs)
    fits = {
        name: form
        for name, form in FORMS.items()
        if all(column in common for column in form.columns) and not any(column in common for column in form.without)
    }
    if len(fits) != 1:
        why = f"could be {' or '.join(fits)}" if fits else "not a form that is known"
        raise Refused(f"{why}; name its columns with --prediction and --gold; {has}")
    [(name, form)] = fits.items()
    if label:
        raise Refused(f"--label goes with --prediction and --gold; the file was taken for {name}")
    return name, form


def reference(gold: Any) -> str | None:
    """A reference answer as text: of a solution that ends in "#### 18" or "A: 18", what stands there."""
    if isinstance(gold, list):
        gold = ", ".join(map(str, gold))
    if isinstance(gold, float):
        gold = f"{gold:g}"
    text = str("" if gold is None else gold)
    return re.split(r"####|\nA:", text)[-1].strip() or None


def said(prediction: Any, texts: bool = False) -> str:
    """An output as a text that shows its answer: an answer alone, which is of few words and not delimited, is boxed."""
    text = str("" if prediction is None else prediction)
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)
    alone = not (texts or DELIMITED.search(text) or len(words) > 2) and text.strip()
    return f"\\boxed{{{text}}}" if alone else text


def score(rows: Sequence[Row], form: Form, rule: str) -> dict[str, Any]:
    """Accuracy, over questions, and how the labels agree: as it is printed."""
    verifier = verifiers.load(RULES[rule])
    clusters: dict[str, list[float]] = {}
    groups: dict[str, dict[str, list[float]]] = {}
    labelled, unscored, gave_up = 0, 0, 0
    disagreements = []
    for number, row in enumerate(rows):
        key = str(row[form.key]) if form.key else str(number)
        try:
            outputs = form.outputs(row)
        except (ValueError, LookupError, TypeError) as error:
            raise Refused(f"row {number}: is not as the others of its form: {error!r}") from None
        for output in outputs:
            gold = reference(output.gold)
            if isinstance(output.prediction, dict | list):
                raise Refused(f"row {number}: its prediction is neither a text nor a number nor a list of such")
            if output.label not in (None, 0, 1):
                raise Refused(f"row {number}: its label {output.label!r} is neither true nor false")
            if gold is None:
                unscored += 1
                continue
            graded = verifier.grade(Item("", said(output.prediction, form.texts), gold))
            gave_up += bool(graded.counts)
            right = bool(graded.correct)
            clusters.setdefault(key, []).append(float(right))
            groups.setdefault(output.group, {}).setdefault(key, []).append(float(right))
            if output.label is None:
                continue
            labelled += 1
            if bool(output.label) != right:
                disagreements.append(
                    {
                        "row": number,
                        **({"of": output.group} if output.group else {}),
                        "prediction": output.prediction,
                        "gold": gold,
                        "label": output.label,
                        "ours": right,
                    }
                )
    if not clusters:
        raise Refused("no row has a reference answer")
    return {
        "n": len(clusters),
        "answers": sum(map(len, clusters.values())),
        "accuracy": _estimate(clusters),
        **({"by": {name: _estimate(group) for name, group in groups.items()}} if len(groups) > 1 else {}),
        "unscored": unscored,
        verifiers.GAVE_UP: gave_up,
        "agreement": {"labels": labelled, "agree": labelled - len(disagreements)} if labelled else None,
        "disagreements": disagreements,
    }


def _estimate(clusters: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Wilson's interval where each question has one answer, else over the questions' means."""
    alone = all(len(values) == 1 for values in clusters.values())
    return asdict((statistics.share if alone else statistics.mean)(clusters))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.math", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--outputs", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prediction", metavar="COLUMN", help="of texts or answers, or lists of them")
    parser.add_argument("--gold", metavar="COLUMN", help="of reference answers, or solutions that end in one")
    parser.add_argument("--label", metavar="COLUMN", help="whether it is right, to be compared with")
    parser.add_argument("--rule", choices=sorted(RULES), default="math")
    given = parser.parse_args(arguments)
    try:
        rows = read(given.outputs)
        name, form = choose(rows, given.prediction, given.gold, given.label)
        found = score(rows, form, given.rule)
    except Refused as error:
        print(error if str(given.outputs) in str(error) else f"{given.outputs}: {error}", file=sys.stderr)
        return 2
    about = {"file": given.outputs.name, "form": name, "rule": given.rule}
    print(json.dumps({**about, **found}, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
