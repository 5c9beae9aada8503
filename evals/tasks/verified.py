r"""Prompts, answers and scorer of this folder's tasks.

    {"problem": "What is $1+1$?", "solution": "... is $\\boxed{2}$."}  "so it is \\boxed{\\frac{4}{2}}"  ->  right

The scorer is evolve's verifier `math`: Math-Verify in a process of its own, with a time limit. lm-eval's own scorers of
these data sets take the text between an answer's first and last $ (hendrycks_math, aime24) or want another antlr4 than
Hydra does (minerva_math).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from evolve import verifiers
from evolve.scorers import Item


def prompt(row: dict[str, Any]) -> str:
    return problem(row) + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def problem(row: dict[str, Any]) -> str:
    """Of a row of any of the data sets. Raises ValueError where there is none."""
    asked = row.get("problem") or row.get("question")
    if not asked:
        raise ValueError(f"no 'problem' or 'question'; it has {', '.join(row)}")
    context = row.get("context")  # OlympiadBench: what several questions share
    return "\n\n".join(text for text in (context, asked) if text)


def answer(row: dict[str, Any]) -> str:
    """The reference answer as LaTeX or text: a column of its own, or what the solution has in its last box.

    Raises ValueError if there is neither.
    """
    found = row.get("final_answer", row.get("answer"))  # OlympiadBench's is a list
    if isinstance(found, list):
        return ", ".join(found)
    if isinstance(found, float):  # AMC's
        return f"{found:g}"
    boxed = verifiers.boxed(row.get("solution") or "") if found is None else str(found)
    if not boxed:
        raise ValueError(f"no answer, nor a \\boxed{{}} in the solution: {problem(row)[:60]!r}")
    return boxed


@lru_cache(1)
def _verifier() -> verifiers.Verifier:
    return verifiers.load("math")


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Raises RuntimeError where the verifier gave up, for whoever counts such."""
    graded = _verifier().grade(Item(problem(doc), results[0], answer(doc)))
    if graded.counts:
        raise RuntimeError(*graded.counts)
    return {"exact_match": float(bool(graded.correct))}
