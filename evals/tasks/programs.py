"""Filters and scorer of this folder's code tasks: each program runs by itself, in evals/sandbox.py.

    {"prompt": "def add(a, b):\\n", "test": "def check(f): assert f(1, 1) == 2", "entry_point": "add"}    HumanEval's
    {"text": "Write a function ...", "test_list": ["assert add(1, 1) == 2", ...]}                          MBPP's

lm-eval's own run them in the process that scores, through a script that they fetch from the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from evals import sandbox

Doc = dict[str, Any]
FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def completed(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[str]:
    """HumanEval: the answer goes on where the prompt ends."""
    return _started(answers, docs, lambda answer, doc: doc["prompt"] + answer)


def whole(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[str]:
    """MBPP: the answer is the program."""
    return _started(answers, docs, lambda answer, doc: answer)


def fenced(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[str]:
    """The answer's first block of code, or all of it; before it HumanEval's prompt, whose imports it may need."""
    return _started(answers, docs, lambda answer, doc: f"{doc.get('prompt', '')}{_block(answer)}")


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Raises RuntimeError where the sandbox failed, for whoever counts such."""
    return {"pass@1": float(_run(_tested(doc, results[0])).result())}


def _block(answer: str) -> str:
    found = FENCED.search(answer)
    return found[1] if found else answer


def _started(answers: Sequence[Sequence[str]], docs: Sequence[Doc], program: Callable[[str, Doc], str]) -> list[str]:
    """Programs that a filter makes, of each document's only answer; they start here to run side by side."""
    found = []
    for [answer], doc in zip(answers, docs, strict=True):
        found.append(program(answer, doc))
        if answer:
            _run(_tested(doc, found[-1]))
    return found


def _tested(doc: Doc, program: str) -> str:
    """As lm-eval has it: of MBPP the three tests that its prompt shows."""
    tests = [doc["test"], f"check({doc['entry_point']})"] if "entry_point" in doc else doc["test_list"][:3]
    return "\n".join([program, *tests])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


@cache
def _run(program: str) -> Future[bool]:
    return _pool().submit(sandbox.passes, program)
