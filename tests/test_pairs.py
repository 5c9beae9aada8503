import random

import pytest
import torch

from evolve import losses, pairs, templates
from evolve.templates import Encoded

NAMES = losses.DIRECT + losses.REFINE


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
def batched(model, sequences, size, pad_id=0):
    parts = [sequences[first : first + size] for first in range(0, len(sequences), size)]
    return torch.cat([pairs.log_probabilities(model, pairs.pad(part, pad_id)) for part in parts])


def test_log_probabilities_are_those_of_each_sequence_alone(model, sequences):
    expected = torch.tensor([alone(model, sequence) for sequence in sequences])
    assert expected.std() > 5  # the sequences are told apart by far more than the tolerance
    torch.testing.assert_close(batched(model, sequences, len(sequences)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 5])
def test_neither_batch_order_nor_padding_matters(model, sequences, size):
    whole = batched(model, sequences, len(sequences))
    order = random.Random(size).sample(range(len(sequences)), len(sequences))
    found = batched(model, [sequences[place] for place in order], size, pad_id=7)
    torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-4)


def test_a_sequence_without_answer_tokens_is_certain(model):
    """As of a pair whose answer the tokenizer reads nothing in: its log-probability is 0, with others or alone."""
    empty, other = Encoded([1, 4, 3], 3), Encoded([1, 4, 3, 5, 2], 3)
    assert batched(model, [empty], 1).tolist() == [0.0]
    assert batched(model, [empty, other], 2)[0] == 0.0


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
