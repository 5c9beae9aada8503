"""Functions that tell right answers from wrong ones: `ledger` grades the embedded world's, `math`, `exact` and `number`
compare with the data set's reference answer.

Each has `extract`, an answer's result in a form in which equal results are equal strings (None: it has none), so that
answers can vote.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from evolve import world
from evolve.config import ROOT
from evolve.scorers import Item, Score

BYTES = 4 * 2**30  # of address space, for Math-Verify
GAVE_UP = "wrong because the verifier gave up"


class Verifier:
    """A scorer by rule: what is right scores 1 where the rule knows no more. Raises ValueError for want of `gold`."""

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        for index, item in enumerate(items):
            yield index, self.grade(item)

    def grade(self, item: Item) -> Score:
        raise NotImplementedError

    def extract(self, answer: str) -> str | None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Ledger(Verifier):
    """The embedded world's reward: right, or how far."""

    def grade(self, item: Item) -> Score:
        return Score(*world.reward(item.prompt, item.answer))

    def extract(self, answer: str) -> str | None:
        balances = world.balances(answer)
        return None if balances is None else " ".join(map(str, balances))


class Exact(Verifier):
    """Whether the answer's result is `gold`, but for case, spaces, an enclosing $ and a full stop.

    The result is what stands in the last \\boxed{}; or else behind the last ####; or else behind the last "answer is",
    in its line; or else the last line.
    """

    def grade(self, item: Item) -> Score:
        right = self.extract(item.answer) == _plain(_gold(item))
        return Score(float(right), right)

    def extract(self, answer: str) -> str | None:
        lines = answer.strip().splitlines() or [""]
        stated = re.findall(r"####(.*)|answer is:?(.*?)(?:\.\s|$)", answer, re.IGNORECASE | re.MULTILINE)
        marked = [first for first, _ in stated if first] or [second for _, second in stated if second]
        inside = boxed(answer)
        return _plain(inside if inside is not None else (marked or lines)[-1]) or None


class Number(Verifier):
    """Whether the answer's number is `gold`'s, as decimals: 1,200.00 is 1200, and 0.75 is not 3/4.

    It is the one in the last \\boxed{}, or else behind the last ####, or else the last of the text. What holds no space
    is an answer by itself, and has to be a number but for $, % and a full stop.
    """

    def grade(self, item: Item) -> Score:
        found = self.extract(item.answer)
        right = found is not None and found == self.extract(_gold(item))
        return Score(float(right), right)

    def extract(self, answer: str) -> str | None:
        inside = boxed(answer)
        text = re.sub(r"\\?[$%]", "", _result(answer) if inside is None else inside).strip().removesuffix(".")
        numbers = re.findall(_NUMBER, text) if " " in text else re.findall(f"^{_NUMBER}$", text)
        return format(Decimal(numbers[-1].replace(",", "")).normalize(), "f") if numbers else None


_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,3})?"


def _plain(text: str) -> str:
    return " ".join(text.split()).strip("$. ").casefold()


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{}, braces within it balanced."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if found and depth == 0:
            return rest[:place]
    return None


def _gold(item: Item) -> str:
    if item.gold is None:
        raise ValueError(
            f"the verifier needs a reference answer, and the row of the prompt {item.prompt[:60]!r} has none; "
            "set data.gold to the column that holds it"
        )
    return item.gold


class Math(Verifier):
    """Whether Math-Verify reads the same value from the answer (behind a last ####, if any) as from `gold`.

    It does so in a process of its own, with `seconds` of CPU time for an answer, which are the same on a busy machine.
    An answer can send SymPy into hours or gigabytes, in places where no exception ends it and in threads that signals
    don't reach. So the process is one that its own timer ends; the answer is then wrong, as one that can't be read is:
    to leave it out would favour models that write such.
    """

    def __init__(self, seconds: float = 5.0):
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def grade(self, item: Item) -> Score:
        reply = self._ask("grade", _gold(item), _result(item.answer))
        right = reply is not None and bool(reply["value"])
        return Score(float(right), right, {GAVE_UP: 1} if reply is None else {})

    def extract(self, answer: str) -> str | None:
        """The value as SymPy writes it simplified: 0.5, 1/2 and \\frac{2}{4} are the same, 0.33 is not 1/3."""
        reply = self._ask("extract", _result(answer))
        return None if reply is None else reply["value"]

    def _ask(self, *call: str) -> dict[str, Any] | None:
        """The reply; None if the process ended over it."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "evolve.verifiers", str(self.seconds)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if self._read() is None:
                raise RuntimeError("Math-Verify's process did not start; its own message stands above")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        if reply is None:
            self._process.communicate()
            self._process = None
        return reply

    def _read(self) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None


VERIFIERS = {"ledger": Ledger, "exact": Exact, "math": Math, "number": Number}


def _result(answer: str) -> str:
    return answer.rpartition("####")[2].strip() or answer


def load(name: str) -> Verifier:
    return VERIFIERS[name]()


# ---- the process that Math asks: lines of JSON in and out, until its input ends


@lru_cache(8)  # a row's answers share their gold
def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _grade(gold: str, answer: str) -> bool:
    from math_verify import verify

    delimited = re.search(r"(?<!\\)\$|\\boxed", gold)  # \$ is a currency
    return bool(verify(_parsed(gold if delimited else f"${gold}$"), _parsed(answer), timeout_seconds=None))


def _extract(answer: str) -> str | None:
    import sympy

    value = next(iter(_parsed(answer)), None)
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs  # "x = 5" is 5, as in Math-Verify's comparison
    if isinstance(value, sympy.Expr):
        value = sympy.simplify(sympy.nsimplify(value, rational=True))
    return None if value is None else str(value)


def main() -> None:
    import logging

    import math_verify  # noqa: F401  before the clock starts

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no clock of its own
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"value": "ready"}), flush=True)
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, unhandled, ends the process wherever it is
        value = _grade(*arguments) if what == "grade" else _extract(*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"value": value}), flush=True)


if __name__ == "__main__":
    main()
