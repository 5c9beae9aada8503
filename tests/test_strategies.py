"""Strategies through `run`, with a fake engine whose answer to a request is a pure function of the request."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve import strategies
from evolve.config import Strategy
from evolve.engines import Completion

NAMES = tuple(strategies.STRATEGIES)


@st.composite
def settings(draw):
    branching, depth = draw(st.integers(1, 5)), draw(st.none() | st.integers(1, 4))
    most = 12 if depth is None else min(12, sum(branching**level for level in range(depth + 1)))
    answers = draw(st.integers(1, most))
    return Strategy(
        name=draw(st.sampled_from(NAMES)),
        answers=answers,
        branching=branching,
        expand=draw(st.sampled_from(["best", "every"])),
        depth=depth,
        chains=draw(st.sampled_from([n for n in range(1, answers + 1) if answers % n == 0])),
    )


def layout(prompt, earlier):
    return [prompt, *earlier]


class Echo:
    """Answers "prompt|earlier|...#seed"; gives answers back a few at a time, in an order drawn from `chaos`."""

    def __init__(self, chaos=0):
        self.random = random.Random(chaos)
        self.waiting, self.seen = [], []

    def submit(self, requests):
        self.seen += requests
        self.waiting += requests

    def poll(self):
        if not self.waiting:
            return []
        self.random.shuffle(self.waiting)
        size = self.random.randint(1, len(self.waiting))
        done, self.waiting = self.waiting[:size], self.waiting[size:]
        return [Completion(item.key, f"{'|'.join(item.messages)}#{item.seed % 997}", 1, "stop") for item in done]


def by_text(prompt, answer):
    """A score that any two answers are told apart by, and that has nothing to do with their order."""
    return random.Random(answer).random()


def answers_of(strategy, prompts=("p",), base=0, chaos=0):
    engine = Echo(chaos)
    found = list(strategies.run(strategy, prompts, base, layout, engine.submit, engine.poll, by_text))
    assert len(dict(found)) == len(found) == len(prompts)
    return dict(found), engine


def made(name, answers, branching=None, expand=None, **others):
    strategy = Strategy(name=name, answers=answers, branching=branching, expand=expand, **others)
    return answers_of(strategy)[0][0]


@given(settings(), st.integers(0, 2**32))
def test_every_strategy_makes_exactly_its_answers(strategy, chaos):
    prompts = ["p", "q", "r"]
    found, engine = answers_of(strategy, prompts, chaos=chaos)
    assert Counter(request.messages[0] for request in engine.seen) == dict.fromkeys(prompts, strategy.answers)
    for index, answers in found.items():
        assert len(answers) == strategy.answers
        assert answers[0].given == ()
        assert answers[0].turn == 1
        for number, answer in enumerate(answers):
            assert all(earlier < number for earlier in answer.given)
            # What the engine was shown is what the answer says it saw.
            shown = "|".join([prompts[index], *(answers[earlier].text for earlier in answer.given)])
            assert answer.text.startswith(f"{shown}#")
            assert answer.turn == 1 + max((answers[earlier].turn for earlier in answer.given), default=0)


@given(settings(), st.lists(st.text(max_size=5), min_size=1, max_size=6), st.integers(0, 2**32))
def test_neither_order_nor_company_changes_an_answer(strategy, prompts, chaos):
    together, _ = answers_of(strategy, prompts, chaos=chaos)
    for index, prompt in enumerate(prompts):
        alone, _ = answers_of(strategy, [prompt])
        assert together[index] == alone[0]


@given(settings(), settings(), st.integers(0, 9), st.text(max_size=8))
def test_seeds_are_of_base_prompt_and_answer(one, other, base, prompt):
    def seeds(strategy, prompts):
        _, engine = answers_of(strategy, prompts, base)
        return {request.key[1]: request.seed for request in engine.seen if request.messages[0] == prompt}

    first, second = seeds(one, [prompt]), seeds(other, [prompt + "x", prompt])
    shared = first.keys() & second.keys()
    assert 0 in shared
    assert all(first[number] == second[number] for number in shared)
    assert len(set(first.values())) == len(first)
    assert all(0 <= seed < 2**63 for seed in first.values())
    others = {strategies.seed(base + 1, prompt, 0), strategies.seed(base, prompt + "x", 0)}
    assert strategies.seed(base, prompt, 0) not in others


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_parallel_sees_nothing(answers):
    assert [(answer.given, answer.turn) for answer in made("parallel", answers)] == [((), 1)] * answers


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_chain_sees_just_the_one_before(answers):
    expected = [((), 1), *(((number,), number + 2) for number in range(answers - 1))]
    assert [(answer.given, answer.turn) for answer in made("chain", answers)] == expected


@given(st.integers(1, 5), st.integers(1, 5))
def test_chains_are_independent_and_in_order_of_turns(chains, turns):
    found = made("chain", chains * turns, chains=chains)
    for number, answer in enumerate(found):
        turn = number // chains
        assert (answer.turn, answer.given) == (turn + 1, (number - chains,) if turn else ())
    assert len({answer.text for answer in found}) == len(found)


class Edits(Echo):
    """Direct answers as given; a refinement is what the earlier answer is edited into."""

    def __init__(self, direct, edits):
        super().__init__()
        self.direct, self.edits = direct, edits

    def poll(self):
        shown = {request.key: request.messages[1:] for request in self.waiting}
        return [
            Completion(
                done.key, self.edits[shown[done.key][0]] if shown[done.key] else self.direct[done.key[1]], 1, "stop"
            )
            for done in super().poll()
        ]


def edited(direct, edits, turns, score=None, stop=None):
    engine = Edits(direct, edits)
    chains = len(direct)
    strategy = Strategy(name="chain", answers=turns * chains, branching=None, expand=None, chains=chains, stop=stop)
    ((_, found),) = strategies.run(strategy, ["p"], 0, layout, engine.submit, engine.poll, score)
    assert len(engine.seen) == len(found)  # what is not made is not asked for
    return found


def test_an_unchanged_answer_ends_its_chain():
    edits = {"a": "b", "b": "b"}
    assert [answer.text for answer in edited("a", edits, 5)] == ["a", "b", "b", "b", "b"]
    assert [answer.text for answer in edited("a", edits, 5, stop="unchanged")] == ["a", "b", "b"]


def test_a_drop_of_the_score_ends_its_chain():
    edits = {"1": "1.", "1.": "3", "3": "2", "2": "9"}
    found = edited("1", edits, 5, lambda prompt, text: float(text), "score_drop")
    assert [answer.text for answer in found] == ["1", "1.", "3", "2"]
    with pytest.raises(ValueError, match="no scorer was given"):
        edited("1", edits, 5, stop="score_drop")


def test_chains_end_one_by_one():
    edits = {"a": "a", "b": "c", "c": "d", "d": "e", "e": "h", "f": "g", "g": "g"}
    found = edited("abf", edits, 5, stop="unchanged")
    assert [(answer.text, answer.given) for answer in found] == [
        ("a", ()), ("b", ()), ("f", ()), ("a", (0,)), ("c", (1,)), ("g", (2,)), ("d", (4,)), ("g", (5,)),
        ("e", (6,)), ("h", (8,)),
    ]  # fmt: skip


@given(settings(), st.sampled_from(["unchanged", "score_drop"]))
def test_a_chain_that_ends_early_is_the_head_of_one_that_does_not(strategy, stop):
    strategy = Strategy(**{**dict(strategy), "name": "chain"})
    stopped, _ = answers_of(Strategy(**{**dict(strategy), "stop": stop}))
    whole, _ = answers_of(strategy)
    if strategy.chains == 1:
        assert stopped[0] == whole[0][: len(stopped[0])]
        for before, after in zip(stopped[0], stopped[0][1:-1], strict=False):
            assert stop == "unchanged" or by_text("p", after.text) >= by_text("p", before.text)
    assert {answer.turn for answer in stopped[0]} <= {answer.turn for answer in whole[0]}


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_few_shot_sees_all_before(answers):
    assert [answer.given for answer in made("few_shot", answers)] == [tuple(range(number)) for number in range(answers)]


def test_tree_expands_every_node_in_turn():
    assert [answer.given for answer in made("tree", 8, 2, "every")] == [(), (0,), (0,), (1,), (1,), (2,), (2,), (3,)]


@given(st.integers(2, 20), st.integers(1, 5))
def test_tree_expands_the_best_node_not_yet_expanded(answers, branching):
    tree = made("tree", answers, branching, "best")
    expanded = []
    for first in range(1, answers, branching):
        group = tree[first : first + branching]
        (node,) = {answer.given for answer in group}
        waiting = [number for number in range(first) if number not in expanded]
        assert node == (max(waiting, key=lambda number: by_text("p", tree[number].text)),)
        expanded.append(node[0])


@given(st.integers(1, 12), st.integers(1, 5))
def test_tree_takes_the_earlier_of_equals(answers, branching):
    """With equal scores, best is each in turn."""
    engine = Echo()
    strategy = Strategy(name="tree", answers=answers, branching=branching, expand="best")
    ((_, tree),) = strategies.run(strategy, ["p"], 0, layout, engine.submit, engine.poll, lambda prompt, answer: 1.0)
    assert tree == made("tree", answers, branching, "every")


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["best", "every"]), st.text(max_size=3))
def test_a_tree_is_full_and_no_deeper(branching, depth, expand, prompt):
    most = sum(branching**level for level in range(depth + 1))
    tree = Strategy(name="tree", answers=most, branching=branching, expand=expand, depth=depth)
    turns = Counter(answer.turn for answer in answers_of(tree, [prompt])[0][0])
    assert turns == {level + 1: branching**level for level in range(depth + 1)}


def test_a_tree_of_one_level_refines_the_direct_answer_alone():
    assert [answer.given for answer in made("tree", 4, 3, "best", depth=1)] == [(), (0,), (0,), (0,)]


def test_best_without_a_scorer_is_refused():
    engine = Echo()
    strategy = Strategy(name="tree", answers=3, branching=2, expand="best")
    with pytest.raises(ValueError, match="no scorer was given"):
        list(strategies.run(strategy, ["p"], 0, layout, engine.submit, engine.poll))


def test_a_prompt_goes_on_while_others_wait():
    """The second prompt's turns are all asked for before the first prompt's direct answer is there."""
    waiting = []

    def poll():
        waiting.sort(key=lambda request: request.messages[0], reverse=True)
        return [Completion(waiting.pop(0).key, "y", 1, "stop")] if waiting else []

    strategy = Strategy(name="chain", answers=3, branching=None, expand=None)
    finished = [index for index, _ in strategies.run(strategy, ["a", "b"], 0, layout, waiting.extend, poll)]
    assert finished == [1, 0]


@given(settings(), st.integers(1, 5), st.integers(0, 2**32))
def test_a_window_bounds_what_is_under_way_and_changes_no_answer(strategy, window, chaos):
    prompts = [f"p{number}" for number in range(9)]
    expected, _ = answers_of(strategy, prompts)
    engine, live, most = Echo(chaos), set(), 0

    def submit(requests):
        nonlocal most
        live.update(request.messages[0] for request in requests)
        most = max(most, len(live))
        engine.submit(requests)

    found = {}
    for index, answers in strategies.run(strategy, prompts, 0, layout, submit, engine.poll, by_text, window):
        live.discard(prompts[index])
        found[index] = answers
    assert found == expected
    assert most <= window
