import itertools

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evolve import templates, world
from evolve.config import CONF, Template

TEMPLATES = sorted((CONF / "template").glob("*.yaml"))
PARTS = ("train", "rows", "test")
digits = st.sampled_from("0123")
movements = st.lists(digits, min_size=7, max_size=7)
balances = st.lists(digits, min_size=8, max_size=8)


def right(moves):
    """The eight balances that lead to 0, from the end: each is the one after it plus the movement between."""
    found = [0]
    for move in reversed(moves):
        found.insert(0, (found[0] + int(move)) % 4)
    return found


def words(numbers):
    return " ".join(map(str, numbers))


@given(movements, balances)
def test_reward_is_one_for_the_exact_answer_alone(moves, other):
    assert world.reward(words(moves), words(right(moves))) == (1.0, True)
    value, exact = world.reward(words(moves), words(other))
    assert 0 <= value <= 1
    assert exact == (value == 1) == (words(other) == words(right(moves)))


@given(movements, st.integers(0, 3))
def test_reward_of_a_walk_from_any_start(moves, off):
    shifted = [(balance + off) % 4 for balance in right(moves)]
    assert world.reward(words(moves), words(shifted))[0] == [1.0, 0.75, 0.5, 0.75][off]


@given(movements, st.integers(0, 7), st.integers(1, 3))
def test_a_broken_walk_is_below_every_whole_one(moves, place, by):
    spoilt = right(moves)
    spoilt[place] = (spoilt[place] + by) % 4
    value, exact = world.reward(words(moves), words(spoilt))
    assert not exact
    if place in (0, 7):  # one step is broken, and two where the balance stands between two
        assert value == pytest.approx(3 / 7)
    else:
        assert value == pytest.approx(2.5 / 7)


well_formed = st.one_of(movements, balances).map(words)


@given(st.one_of(st.text(), well_formed), st.one_of(st.text(), well_formed))
def test_reward_of_any_text_is_in_range_and_of_malformed_text_nothing(prompt, response):
    value, exact = world.reward(prompt, response)
    assert 0 <= value <= 1
    assert exact == (value == 1)
    shapes = [(prompt.split(), 7), (response.split(), 8)]
    if not all(len(found) == size and set(found) <= set("0123") for found, size in shapes):
        assert (value, exact) == (0.0, False)


@pytest.mark.parametrize("response", ["", "0", "0 0 0 0 0 0 0", "0 0 0 0 0 0 0 0 0", "0 0 0 0 0 0 0 4", "00000000"])
def test_malformed_answers_get_nothing(response):
    assert world.reward("0 0 0 0 0 0 0", response) == (0.0, False)


def test_parts_are_apart_and_together_everything():
    seen = {part: set(world.prompts(1900, 3, part)) for part in PARTS}
    for one, other in itertools.combinations(PARTS, 2):
        assert not seen[one] & seen[other]
    for prompts in seen.values():
        assert len(prompts) == 1900
        assert all(len(prompt.split()) == 7 and set(prompt.split()) <= set("0123") for prompt in prompts)


@given(st.sampled_from(PARTS), st.integers(0, 9), st.integers(0, 200), st.integers(0, 200))
def test_prompts_are_stable_by_prefix(part, seed, few, many):
    few, many = sorted((few, many))
    assert world.prompts(few, seed, part) == world.prompts(many, seed, part)[:few]


def test_seeds_order_prompts_and_rows():
    assert world.prompts(50, 0) != world.prompts(50, 1)
    assert world.rows(20, 0) != world.rows(20, 1)


def test_a_part_has_its_end():
    with pytest.raises(ValueError, match="part must be one of"):
        world.prompts(1, 0, "other")
    with pytest.raises(ValueError, match="n must lie in"):
        world.prompts(16_385, 0)
    with pytest.raises(ValueError, match="rows can be made"):
        world.rows(16_385, 0)


def test_rows_are_prompts_with_a_better_and_a_worse_answer():
    rows = world.rows(300, 5)
    assert world.rows(40, 5) == rows[:40]
    elsewhere = set(world.prompts(1900, 5, "test")) | set(world.prompts(9000, 5, "train"))
    assert len({row["prompt"] for row in rows} - elsewhere) == 300
    for row in rows:
        better, worse = (world.reward(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert better > worse
        assert not worse[1]
    assert 0.6 < sum(world.reward(row["prompt"], row["chosen"])[1] for row in rows) / 300 < 0.95


@pytest.fixture(scope="module")
def loaded(embedded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        embedded
    )


def test_the_embedded_model_goes_with_its_tokenizer(loaded):
    model, tokenizer = loaded
    made = world.tokenizer()
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.chat_template == made.chat_template
    assert model.config.vocab_size == len(tokenizer)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == ids
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_the_embedded_model_knows_the_form_and_not_the_answer(loaded):
    model, tokenizer = loaded
    prompts = world.prompts(64, 0, "test")
    ids = torch.tensor([templates.encode_prompt(tokenizer, templates.direct(prompt)) for prompt in prompts])
    made = model.generate(ids, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :]
    grades = [
        world.reward(p, tokenizer.decode(a, skip_special_tokens=True)) for p, a in zip(prompts, made, strict=True)
    ]
    assert sum(value >= 0.5 for value, _ in grades) > 48  # most are whole walks
    assert 0.05 < sum(exact for _, exact in grades) / 64 < 0.6


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_the_tokenizer_reads_each_template(loaded, file):
    """Nothing unknown; the prompt's and answers' digits are kept, each under its own heading."""
    _, tokenizer = loaded
    template = Template(**yaml.safe_load(file.read_text()))
    prompt, *earlier = words("3012012"), words("33221100"), words("01230123")
    ids = templates.encode_prompt(tokenizer, templates.refine(template, prompt, earlier))
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id not in ids
    read = tokenizer.convert_ids_to_tokens(ids)
    assert [word for word in read if word in set("0123")] == " ".join([prompt, *earlier]).split()
    headings = [word for word in read if word.endswith(":")]
    assert len(headings) == 4
    assert headings[1] == headings[2]
    assert len(set(headings)) == 3
    assert [read[0], *read[-2:]] == ["<s>", headings[-1], "<a>"]
