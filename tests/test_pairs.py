import copy
import random

import pytest
import torch

from evolve import losses, packing, pairs, templates
from evolve.templates import Encoded

NAMES = losses.DIRECT + losses.REFINE
LAYOUTS = pytest.mark.parametrize("how", ["padded", "packed", "shared"])


def ledger(size, seed):
    return " ".join(random.Random(seed).choices("0123", k=size))


def rows(sizes):
    return [
        {"id": f"r{n}", "prompt": ledger(4 + n, n), "chosen": ledger(size, n + 50), "rejected": ledger(3, n + 99)}
        for n, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sequences(tokenizer, template):
    """Of very different lengths."""
    encoded, _ = pairs.encode(tokenizer, template, rows([1, 12, 4, 30]), 128, 0.0)
    return [pair.sequences[name] for pair in encoded for name in NAMES]


@torch.inference_mode()
def alone(model, sequence):
    """One sequence, unpadded, every position's softmax, in float64."""
    model = model.double()
    try:
        logp = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
    finally:
        model.float()
    return sum(logp[place - 1, sequence.ids[place]].item() for place in range(sequence.answer, len(sequence.ids)))


@torch.inference_mode()
def batched(model, sequences, size, how, pad_id=0):
    """In batches of some sequences, each batch one group, so that 'shared' shares among all of its sequences."""
    prepared = pairs.prepare(copy.deepcopy(model), how)
    parts = [sequences[first : first + size] for first in range(0, len(sequences), size)]
    return torch.cat([pairs.log_probabilities(prepared, pairs.batch([part], how, pad_id)) for part in parts])


@LAYOUTS
def test_log_probabilities_are_those_of_each_sequence_alone(model, sequences, how):
    expected = torch.tensor([alone(model, sequence) for sequence in sequences])
    assert expected.std() > 5  # the sequences are told apart by far more than the tolerance
    torch.testing.assert_close(batched(model, sequences, len(sequences), how), expected, rtol=0, atol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("size", [1, 5])
def test_neither_batch_order_nor_padding_matters(model, sequences, size, how):
    whole = batched(model, sequences, len(sequences), how)
    order = random.Random(size).sample(range(len(sequences)), len(sequences))
    found = batched(model, [sequences[place] for place in order], size, how, pad_id=7)
    torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-4)


@LAYOUTS
def test_a_sequence_without_answer_tokens_is_certain(model, how):
    """As of a pair whose answer the tokenizer reads nothing in: its log-probability is 0, with others or alone."""
    empty, other = Encoded([1, 4, 3], 3), Encoded([1, 4, 3, 5, 2], 3)
    assert batched(model, [empty], 1, how).tolist() == [0.0]
    with_other = batched(model, [empty, other], 2, how)
    assert with_other[0] == 0.0
    assert with_other[1] == pytest.approx(alone(model, other), abs=1e-4)


def test_what_each_layout_runs(tokenizer, template):
    """Padded: the widest sequence for each; packed: every token; shared: every beginning of a pair's six once."""
    encoded, _ = pairs.encode(tokenizer, template, rows([1, 12, 4, 30]), 128, 0.0)
    groups = [list(pair.sequences.values()) for pair in encoded]
    lengths = [len(sequence.ids) for group in groups for sequence in group]
    beginnings = [{tuple(s.ids[:n]) for s in group for n in range(1, len(s.ids) + 1)} for group in groups]
    run = {how: pairs.batch(groups, how, 0).input_ids.numel() for how in ("padded", "packed", "shared")}
    assert run == {
        "padded": len(lengths) * max(lengths),
        "packed": sum(lengths),
        "shared": sum(len(found) for found in beginnings),
    }
    assert run["shared"] < 0.7 * run["packed"] < run["padded"]
    assert {pairs.batch(groups, how, 0).tokens for how in run} == {sum(lengths)}


# The check of a layout


def similar(model):
    """What `check` may not change."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return model.config._attn_implementation, model.forward, model.training, state


def assert_as_before(model, before):
    attention, forward, training, state = similar(model)
    assert (attention, forward, training) == before[:3]
    assert all(torch.equal(value, state[name]) for name, value in before[3].items())
    with torch.inference_mode():
        model(torch.tensor([[1, 3, 2]]))  # as any model, without a batch


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@LAYOUTS
def test_a_layout_that_holds_passes_and_leaves_no_trace(model, sequences, how, training):
    checked = copy.deepcopy(model).train(training)
    before = similar(checked)
    assert before[0] != packing.ATTENTION
    pairs.check(checked, [sequences[:6]], how, 0)
    assert_as_before(checked, before)


# Attention of their own, or none at all; stablelm asks the interface and doesn't hand on what it needs.
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bloom", {}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
        ("mamba", {"state_size": 4}),
        ("stablelm", {"num_key_value_heads": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_that_attends_otherwise_is_refused(sequences, tokenizer, kind, settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.3, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = similar(model)
    with pytest.raises(ValueError, match=rf"^this model \({kind}\) .*'shared'.* set trainer\.layout=padded$"):
        pairs.check(model, [sequences[:6]], "shared", 0)
    assert_as_before(model, before)
    pairs.check(model, [sequences[:6]], "padded", 0)


def test_attention_that_ignores_the_layout_is_refused(model, sequences):
    """A model that goes back to its own attention takes the row for one long text, and still gives numbers."""
    from transformers import LlamaForCausalLM

    class Stubborn(LlamaForCausalLM):
        def set_attn_implementation(self, *_):
            pass

    stubborn = Stubborn(model.config)
    stubborn.load_state_dict(model.state_dict())
    before = similar(stubborn)
    with pytest.raises(ValueError, match=r"^this model \(llama\) gives log-probabilities .* apart in the layouts"):
        pairs.check(stubborn, [sequences[:6]], "shared", 0)
    assert_as_before(stubborn, before)


# Log-probabilities of logits

CHUNK = pairs.LogProbability.CHUNK


def draw_logits(rows, scale=4.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    logits = (scale * torch.randn(rows, 11, generator=generator)).to(dtype)
    return logits, torch.randint(11, (rows,), generator=generator), torch.randn(rows, generator=generator)


def exact(logits, targets, weights):
    """log_softmax and the gradient of a weighted sum, in float64."""
    logits = logits.double().requires_grad_()
    found = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    found.backward(weights.double())
    return found.detach(), logits.grad


@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_log_probability_is_log_softmax_at_the_target(rows):
    logits, targets, weights = draw_logits(rows)
    expected, slope = exact(logits, targets, weights)
    logits.requires_grad_()
    found = pairs.LogProbability.apply(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
    found.backward(weights)
    torch.testing.assert_close(logits.grad.double(), slope, rtol=1e-5, atol=1e-6)


def test_log_probability_of_logits_in_bf16():
    """Arithmetic is float32's; the gradient is the exact one, rounded as the logits are."""
    logits, targets, weights = draw_logits(CHUNK + 1, dtype=torch.bfloat16)
    expected, slope = exact(logits, targets, weights)
    logits.requires_grad_()
    found = pairs.LogProbability.apply(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
    found.backward(weights)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), slope, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_log_probability_of_flat_and_of_huge_logits(scale):
    logits, targets, weights = draw_logits(5, scale)
    expected, slope = exact(logits, targets, weights)
    logits.requires_grad_()
    found = pairs.LogProbability.apply(logits, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
    found.backward(weights)
    torch.testing.assert_close(logits.grad.double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double:UserWarning")
def test_the_slope_of_log_probability_is_its_own():
    """By differences of the function itself, as coarse as float32 results ask for."""
    logits, targets, _ = draw_logits(3, 1.0)
    apply = pairs.LogProbability.apply
    assert torch.autograd.gradcheck(lambda x: apply(x, targets), logits.requires_grad_(), eps=1e-2, atol=1e-3)


# Pairs as tokens


def test_the_six_sequences_of_a_pair(tokenizer, template):
    row = rows([5])[0]
    ((pair,), dropped) = pairs.encode(tokenizer, template, [row], 128, 0.0)
    assert dropped == {"longer than max_length": 0}
    assert tuple(pair.sequences) == NAMES
    for name, sequence in pair.sequences.items():
        shown, answer = name.split("_")
        earlier = [] if shown == "direct" else [row[shown]]
        messages = templates.refine(template, row["prompt"], earlier) if earlier else templates.direct(row["prompt"])
        assert sequence == templates.encode(tokenizer, messages, row[answer])


def test_an_unfinished_answer_has_no_end_token(tokenizer, template):
    row = {**rows([5])[0], "rejected_finished": False}
    ((pair,), _) = pairs.encode(tokenizer, template, [row], 128, 0.0)
    for name, sequence in pair.sequences.items():
        assert (sequence.ids[-1] == tokenizer.eos_token_id) == name.endswith("chosen")


def test_a_pair_too_long_in_one_context_goes_as_a_whole(tokenizer, template):
    given = rows([5, 5, 40, 5])
    kept, _ = pairs.encode(tokenizer, template, given, 128, 0.0)
    longest = [max(len(sequence.ids) for sequence in pair.sequences.values()) for pair in kept]
    # Long enough for the answer itself, not for the context that shows it twice.
    limit = longest[2] - 1
    assert len(kept[2].sequences["direct_chosen"].ids) < limit
    left, dropped = pairs.encode(tokenizer, template, given, limit, 0.25)
    assert [pair.id for pair in left] == ["r0", "r1", "r3"]
    assert dropped == {"longer than max_length": 1}
    assert all(tuple(pair.sequences) == NAMES for pair in left)
    with pytest.raises(ValueError, match=rf"^1 of 4 pairs are longer than data\.max_length={limit}"):
        pairs.encode(tokenizer, template, given, limit, 0.24)
    with pytest.raises(ValueError, match="4 of 4"):
        pairs.encode(tokenizer, template, given, 5, 1.0)
