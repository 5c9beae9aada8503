"""How K answers to one prompt are made: parallel, chain, tree, few-shot. Pure functions over requests.

A strategy is a generator for one prompt: it yields the asks that can be made now, is sent their answers, and goes on.
It knows nothing of engines or batches; `run` feeds any number of strategies from one engine, and a prompt's next turn
starts as soon as the engine has its last one, whatever the others do.

Every strategy makes the same number of answers, so that comparisons spend equal budgets; a rule that ends a chain early
is for evaluation alone, which then counts what was spent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from evolve.config import Strategy
from evolve.engines import Completion, Request
from evolve.templates import Messages


@dataclass(frozen=True)
class Ask:
    """One answer wanted: to the prompt alone, or given earlier answers (by their index)."""

    given: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer: its text, the answers it saw, its turn (1 = direct), tokens generated, how it ended, tokens read.

    end: 'stop' (of itself), 'length' (cut off at the token limit) or 'too long' (not made: its prompt left no room, or
    an answer that it was to see was not made).
    """

    text: str
    given: tuple[int, ...]
    turn: int
    tokens: int
    end: str
    read: int = 0


Script = Generator[list[Ask], list[Answer], None]
Scorer = Callable[[Answer], float]


def parallel(strategy: Strategy, score: Scorer) -> Script:
    """y_k ~ pi(.|x), independent. [paper]"""
    yield [Ask() for _ in range(strategy.answers)]


def chain(strategy: Strategy, score: Scorer) -> Script:
    """y_1 ~ pi(.|x); y_{k+1} ~ pi(.|x, y_k, z). [paper: each turn sees the prompt and the turn before]

    Several chains go side by side, so that their answers are in order of their turns. One that `stop` ends makes no
    more answers.
    """

    def ends(first: int, answers: list[Answer]) -> list[tuple[int, str, float]]:
        value = score if strategy.stop == "score_drop" else lambda _: 0.0
        return [(index, answer.text, value(answer)) for index, answer in enumerate(answers, start=first)]

    live = ends(0, (yield [Ask() for _ in range(strategy.chains)]))
    made = len(live)
    for _ in range(strategy.answers // strategy.chains - 1):
        later = ends(made, (yield [Ask((index,)) for index, _, _ in live]))
        made += len(later)
        live = [new for old, new in zip(live, later, strict=True) if not stops(strategy.stop, old[1:], new[1:])]
        if not live:
            return


def stops(rule: str | None, before: tuple[str, float], after: tuple[str, float]) -> bool:
    """Whether a chain ends with `after`, which refines `before`: each a text and its score."""
    if rule == "unchanged":
        return after[0] == before[0]
    return rule == "score_drop" and after[1] < before[1]


def few_shot(strategy: Strategy, score: Scorer) -> Script:
    """y_{k+1} ~ pi(.|x, y_1..y_k, z): all earlier answers in the context. [reconstructed]"""
    yield [Ask()]
    for last in range(strategy.answers - 1):
        yield [Ask(tuple(range(last + 1)))]


def tree(strategy: Strategy, score: Scorer) -> Script:
    """Several refinements of a node; the best node so far, or each in turn, is refined next. [reconstructed]

    A node is expanded once, so with branching b and expand=best: the direct answer, b refinements of it, then b of the
    best of the answers not yet refined, until `answers` are made. None is more than `depth` refinements from the
    direct answer.
    """
    answers = yield [Ask()]
    made: list[Answer] = list(answers)
    scores = [score(answer) for answer in made] if strategy.expand == "best" else [0.0]
    waiting = [0]
    branching = strategy.branching or 1
    while len(made) < strategy.answers:
        node = max(waiting, key=scores.__getitem__)  # the earlier of equals
        waiting.remove(node)
        width = min(branching, strategy.answers - len(made))
        answers = yield [Ask((node,)) for _ in range(width)]
        first = len(made)
        made += answers
        waiting += [
            new for new in range(first, len(made)) if strategy.depth is None or made[new].turn <= strategy.depth
        ]
        scores += [score(answer) for answer in answers] if strategy.expand == "best" else [0.0] * width


STRATEGIES: dict[str, Callable[[Strategy, Scorer], Script]] = {
    "parallel": parallel,
    "chain": chain,
    "tree": tree,
    "few_shot": few_shot,
}


def seed(base: int, prompt: str, sample: int) -> int:
    """A seed that goes with (run seed, prompt, which of its answers), so results don't depend on batch or order.

    The first answer has the same seed under every strategy: comparisons start from common random numbers.
    """
    text = f"{base}\x00{sample}\x00{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def run(
    strategy: Strategy,
    prompts: Sequence[str],
    base_seed: int,
    layout: Callable[[str, Sequence[str]], Messages],
    submit: Callable[[list[Request]], None],
    poll: Callable[[], Iterable[Completion]],
    score: Callable[[str, str], float] | None = None,
    window: int | None = None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Runs the strategy on each prompt; yields (prompt's index, its answers in the order they were asked) when done.

    Args:
        layout: (prompt, earlier answers) -> messages.
        submit, poll: an engine's: hand over requests; wait for some completions (none: nothing is under way).
        score: (prompt, answer) -> score, for a strategy that looks at scores on the way.
        window: how many prompts are under way at once, at most, so that prompts are finished, and can be kept, long
            before the last one is begun. None: all.
    """
    scripts: dict[int, Script] = {}
    opening = iter(range(len(prompts)))
    made: list[list[Answer]] = [[] for _ in prompts]
    pending: list[dict[int, Ask]] = [{} for _ in prompts]
    arrived: list[dict[int, Answer]] = [{} for _ in prompts]
    ready: list[Completion] = []  # of asks that no engine has to see

    def ask(index: int, asks: list[Ask]) -> list[Request]:
        first = len(made[index])
        pending[index] = {first + offset: wanted for offset, wanted in enumerate(asks)}
        prompt = prompts[index]
        requests = []
        for number, wanted in pending[index].items():
            earlier = [made[index][given] for given in wanted.given]
            if any(answer.end == "too long" for answer in earlier):
                ready.append(Completion((index, number), "", 0, "too long"))
                continue
            messages = layout(prompt, [answer.text for answer in earlier])
            requests.append(Request((index, number), messages, seed(base_seed, prompt, number)))
        return requests

    def begin() -> list[Request]:
        requests: list[Request] = []
        for index in islice(opening, len(prompts) if window is None else window - len(scripts)):
            prompt = prompts[index]
            judge = (lambda answer, prompt=prompt: score(prompt, answer.text)) if score else _unscored
            scripts[index] = STRATEGIES[strategy.name](strategy, judge)
            requests += ask(index, next(scripts[index]))
        return requests

    following = begin()
    while True:
        if following:
            submit(following)
        completions, ready[:] = list(ready), []
        completions = completions or list(poll())
        if not completions:
            return
        following = []
        for completion in completions:
            index, number = completion.key
            given = pending[index][number].given
            turn = 1 + max((made[index][earlier].turn for earlier in given), default=0)
            arrived[index][number] = Answer(
                completion.text, given, turn, completion.tokens, completion.end, completion.read
            )
            if len(arrived[index]) < len(pending[index]):
                continue
            answers = [arrived[index][number] for number in sorted(arrived[index])]
            made[index] += answers
            arrived[index] = {}
            try:
                following += ask(index, scripts[index].send(answers))
            except StopIteration:
                del scripts[index]
                yield index, made[index]
                made[index] = []
                following += begin()


def _unscored(answer: Answer) -> float:
    raise ValueError("the strategy looks at scores on the way, and no scorer was given")
