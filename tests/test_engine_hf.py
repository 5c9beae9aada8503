import random

import conftest
import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from evolve import engines, strategies, templates
from evolve.config import CONF, HF, Sampling, Template
from evolve.engines import Completion, Request
from evolve.engines.draw import draw, uniform
from evolve.stages import ModelSettings

GREEDY = Sampling(temperature=0, top_k=0, top_p=1)
SAMPLED = Sampling(temperature=0.7, top_k=0, top_p=1)


def ledger(seed):
    draw = random.Random(seed)
    return " ".join(draw.choices("0123", k=draw.randint(1, 12)))


@pytest.fixture(scope="module")
def load(tiny):
    def load(sampling, batch=8, new=12, length=128, until=()):
        read = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)
        task = engines.Task(tiny, read, sampling, new, length, "cpu", until)
        return engines.load(HF(name="hf", batch_size=batch), task)

    return load


def drain(engine, requests):
    found = conftest.drain(engine, requests)
    engine.close()
    assert found.keys() == {request.key for request in requests}
    return found


def asks(key, prompt, earlier, seed):
    template = Template(**yaml.safe_load((CONF / "template" / "rewrite.yaml").read_text()))
    return Request(key, templates.asking(template, prompt, earlier), seed)


REQUESTS = [
    asks(
        (prompt, sample), ledger(prompt), [ledger(90 + prompt)] * (sample % 3), strategies.seed(0, str(prompt), sample)
    )
    for prompt in range(8)
    for sample in range(5)
]


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


def test_greedy_is_generates_own(load, model, tokenizer):
    """transformers' greedy decoding of each prompt alone and unpadded; short and long answers are both among them."""
    found = drain(load(GREEDY, batch=16), REQUESTS)
    for request in REQUESTS:
        ids = templates.encode_prompt(tokenizer, request.messages)
        made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        finished = made[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(made, skip_special_tokens=True).strip()
        end = "stop" if finished else "length"
        assert found[request.key] == Completion(request.key, text, len(made), end, len(ids), tuple(made))
    assert {completion.end for completion in found.values()} == {"stop", "length"}
    assert len({completion.text for completion in found.values()}) > 8


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(temperature=1.2, top_k=8, top_p=0.9)], ids=["plain", "cut"])
def test_an_answer_depends_on_its_own_request_alone(load, sampling):
    expected = drain(load(sampling, batch=64), REQUESTS)
    assert len({(key[0], completion.text) for key, completion in expected.items()}) > 25  # seeds do count
    for batch in (1, 7):
        shuffled = random.Random(batch).sample(REQUESTS, len(REQUESTS))
        assert drain(load(sampling, batch=batch), shuffled) == expected
    few = REQUESTS[3::9]
    assert drain(load(sampling), few) == {request.key: expected[request.key] for request in few}


def cut(probabilities, top_k, top_p):
    """The rule by its words: the k likeliest, of them the fewest that make up p; renormalised."""
    order = np.argsort(-probabilities)
    kept = order[: top_k or len(order)]
    share = np.cumsum(probabilities[kept] / probabilities[kept].sum())
    kept = kept[: int(np.searchsorted(share, top_p)) + 1]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (2.5, 0, 1.0), (2.5, 4, 1.0), (2.5, 0, 0.7), (2.0, 6, 0.8)]
)
def test_first_tokens_are_drawn_from_the_softmax(load, model, tokenizer, temperature, top_k, top_p):
    draws = 4000
    requests = [asks((0, n), "3 1", [], strategies.seed(0, "3 1", n)) for n in range(draws)]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = drain(load(sampling, batch=1000, new=1), requests)

    ids = templates.encode_prompt(tokenizer, templates.direct("3 1"))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    probabilities = cut((logits / temperature).softmax(-1).numpy(), top_k, top_p)
    by_text = {}
    for token, probability in enumerate(probabilities):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        by_text[text] = by_text.get(text, 0) + probability
    counts = {text: 0 for text in by_text}
    for completion in found.values():
        counts[completion.text] += 1
    assert all(counts[text] == 0 for text, probability in by_text.items() if probability == 0)
    likely = [text for text, probability in by_text.items() if probability * draws >= 5]
    assert len(likely) > 2
    rest = 1 - sum(by_text[text] for text in likely)
    observed, expected = [counts[text] for text in likely], [by_text[text] * draws for text in likely]
    if rest > 1e-9:
        observed.append(draws - sum(observed))
        expected.append(rest * draws)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


SEEDS = torch.tensor([strategies.seed(0, "p", n) for n in range(60_000)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature):
    logits = torch.linspace(2, -2, 13) / temperature
    logits[[0, 6, 12]] = float("-inf")  # what top-k and top-p leave out, also at the ends
    possible = torch.isfinite(logits).numpy()
    for step in (0, 1, 200):
        counts = draw(logits.expand(len(SEEDS), -1), uniform(SEEDS, step)).bincount(minlength=13).numpy()
        assert counts[~possible].sum() == 0
        expected = logits.double().softmax(0).numpy()[possible] * len(SEEDS)
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_a_number_takes_the_token_whose_stretch_it_is_in():
    """Chances of 0.1, 0.2, 0, 0.7 in a row."""
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log()
    numbers = torch.tensor([1e-9, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 1e-9], dtype=torch.float64)
    assert draw(logits.expand(6, -1), numbers).tolist() == [0, 0, 1, 1, 3, 3]


def test_numbers_are_uniform_and_each_steps_own():
    numbers = [uniform(SEEDS, step).numpy() for step in (0, 1, 2, 500)]
    for one in numbers:
        assert 0 < one.min() <= one.max() < 1
        assert stats.kstest(one, "uniform").pvalue > 1e-3
        assert stats.kstest(one * 2**26 % 1, "uniform").pvalue > 1e-3  # the lower half of the bits
        assert len(np.unique(one)) == len(one)
    correlation = np.corrcoef(numbers) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(SEEDS))
    table = np.histogram2d(numbers[0], numbers[1], bins=8)[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_neighbouring_seeds_have_nothing_in_common():
    for seeds in (torch.arange(20_000), torch.arange(20_000) << 32, 2**63 - 1 - torch.arange(20_000)):
        numbers = uniform(seeds, 0).numpy()
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / np.sqrt(len(seeds))


def test_numbers_are_a_pure_function():
    expected = uniform(SEEDS, 3)
    assert torch.equal(uniform(SEEDS.flip(0), 3).flip(0), expected)
    assert torch.equal(uniform(SEEDS[:1], 3), expected[:1])
    assert not torch.equal(uniform(SEEDS, 4), expected)


def test_a_prompt_without_room_is_too_long(load, tokenizer):
    fits = "0 1 2 3"
    room = len(templates.encode_prompt(tokenizer, templates.direct(fits))) + 12
    requests = [asks((0, 0), fits, [], 1), asks((1, 0), f"{fits} 0", [], 1), asks((2, 0), fits, [fits], 1)]
    found = drain(load(GREEDY, length=room), requests)
    assert found[0, 0].end in ("stop", "length")
    for key in ((1, 0), (2, 0)):
        assert found[key] == Completion(key, "", 0, "too long")


def test_an_answer_at_the_limit_is_cut_off(load):
    found = drain(load(Sampling(temperature=9, top_k=0, top_p=1), new=1), REQUESTS)
    assert {completion.tokens for completion in found.values()} == {1}
    assert {completion.end for completion in found.values()} == {"length", "stop"}
    assert all(completion.text == "" for completion in found.values() if completion.end == "stop")


@pytest.mark.parametrize("batch", [1, 16])
def test_an_answer_ends_before_the_first_stop_string(load, tokenizer, batch):
    """As if the text had gone on and been cut; but nothing behind the string is generated, where a batch lets it."""
    whole = drain(load(SAMPLED), REQUESTS)
    words = sorted({word for completion in whole.values() for word in completion.text.split()})
    until = (f"{words[0]} {words[-1]}", words[1], "never said")
    found = drain(load(SAMPLED, batch=batch, until=until), REQUESTS)
    cut = 0
    for key, completion in found.items():
        said = whole[key].text
        places = [said.index(stop) for stop in until if stop in said]
        assert completion.text == (said[: min(places)].strip() if places else said)
        if places:
            cut += 1
            assert completion.end == "stop"
            assert completion.ids == whole[key].ids[: completion.tokens]
            ends = [
                any(stop in tokenizer.decode(completion.ids[:n]) for stop in until)
                for n in range(1 + len(completion.ids))
            ]
            assert ends == [False] * completion.tokens + [True]
        else:
            assert completion == whole[key]
    assert 5 < cut < len(REQUESTS)


def test_generation_stops_at_a_stop_string_and_not_at_the_prompts(load):
    engine = load(GREEDY, batch=1, new=100, until=("1",))
    steps = []
    engine.model.register_forward_hook(lambda *_: steps.append(1))
    [completion] = drain(engine, [asks((0, 0), "1 1 1", [], 0)]).values()
    assert 0 < len(steps) <= completion.tokens < 100
