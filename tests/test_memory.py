"""A model that can't be held is refused before its weights are read, with a sum that a reader can follow."""

import re

import pytest

from evolve import engines
from evolve.config import HF, VLLM, Sampling
from evolve.engines import memory
from evolve.stages import ModelSettings

GREEDY = Sampling(temperature=0, top_k=0, top_p=1)


def task(folder, length=128, dtype="float32"):
    read = ModelSettings(dtype=dtype, chat_template=None, trust_remote_code=False)
    return engines.Task(folder, read, GREEDY, 12, length, "cpu")


def test_weights_are_counted_from_the_files_headers(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert memory.parameters(tiny) == sum(weight.numel() for weight in model.parameters())
    assert memory.weights(HF(name="hf", batch_size=1), task(tiny)) == 4 * memory.parameters(tiny)
    assert memory.weights(HF(name="hf", batch_size=1), task(tiny, dtype="bfloat16")) == 2 * memory.parameters(tiny)
    fp8 = VLLM(name="vllm", batch_size=1, quantization="fp8")
    assert memory.weights(fp8, task(tiny, dtype="bfloat16")) == memory.parameters(tiny)


def test_keys_and_values_are_what_a_cache_holds(tiny):
    """Against the bytes of a cache that transformers fills."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    cache = model(torch.ones((3, 7), dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * 7 * memory.per_token(task(tiny))
    assert memory.per_sequence(task(tiny, length=50)) == 50 * memory.per_token(task(tiny))


@pytest.mark.parametrize("settings", [HF(name="hf", batch_size=1), VLLM(name="vllm", batch_size=10**9)])
def test_what_fits_is_let_through(tiny, settings):
    memory.check(settings, task(tiny))


def test_a_batch_that_does_not_fit_names_one_that_does(tiny):
    with pytest.raises(ValueError) as caught:
        engines.load(HF(name="hf", batch_size=10**9), task(tiny))
    text = str(caught.value)
    assert "\n" not in text
    weights, cache, total, free = (float(number) for number in re.findall(r"([\d.]+) GiB", text))
    assert abs(weights + cache - total) < 0.02
    assert total > free
    assert f"{10**9} x 128 tokens x {memory.per_token(task(tiny)):,} bytes" in text
    fitting = int(re.search(r"engine\.batch_size=(\d+) would fit", text)[1])
    memory.check(HF(name="hf", batch_size=fitting // 2), task(tiny))
    with pytest.raises(ValueError, match="doesn't fit"):
        memory.check(HF(name="hf", batch_size=fitting * 2), task(tiny))


def test_a_model_that_does_not_fit_at_all_says_what_else_to_do(tiny):
    nothing = 1e-12
    with pytest.raises(ValueError, match=r"doesn't fit: weights .* take a smaller model"):
        memory.check(HF(name="hf", batch_size=1, memory_share=nothing), task(tiny))
    with pytest.raises(ValueError, match=r"doesn't fit: weights .* raise engine\.tensor_parallel"):
        memory.check(VLLM(name="vllm", batch_size=1, memory_share=nothing), task(tiny))


def test_a_context_that_the_model_does_not_read_is_refused(tiny):
    memory.check(HF(name="hf", batch_size=1), task(tiny, length=256))
    with pytest.raises(ValueError, match=r"max_length=257 \(of engine or data\): .* reads 256 tokens"):
        engines.load(HF(name="hf", batch_size=1), task(tiny, length=257))
