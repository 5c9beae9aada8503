import math
import random

import pytest
import torch

from evolve import losses, pairs, templates, trainer
from evolve.config import Optimiser, PreferenceWeights, SFTWeights

BOTH = PreferenceWeights(alpha=0.4, beta_direct=0.1, beta_refine=0.2, refine_contexts="both", refine_scale=1.0, nll=0.1)
SFT = SFTWeights(direct=1.0, refine=0.5)
PAIRS = 20  # with a batch of 8: the last step of an epoch has 4


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


@pytest.fixture
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(tokenizer, template):
    draw = random.Random(0)

    def ledger():
        return " ".join(draw.choices("0123", k=draw.randint(2, 12)))

    rows = [{"id": f"r{n}", "prompt": ledger(), "chosen": ledger(), "rejected": ledger()} for n in range(PAIRS)]
    return pairs.encode(tokenizer, template, rows, 128, 0.0)[0]


@pytest.fixture(scope="module")
def examples(tiny, encoded):
    """With the log-probabilities of the untrained model as reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    names = losses.DIRECT + losses.REFINE
    with torch.inference_mode():
        values = [pairs.log_probabilities(model, pairs.pad([p.sequences[n] for n in names], 0)) for p in encoded]
    return [
        {"pair": pair, "reference": dict(zip(names, row.tolist(), strict=True))}
        for pair, row in zip(encoded, values, strict=True)
    ]


def fit(model, objective, examples, *, micro=8, rate=1e-3, epochs=1, seed=0, checkpointing=False):
    settings = Optimiser(
        batch_size=8,
        micro_batch=micro,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=checkpointing,
    )
    seen = []
    steps = trainer.train(
        model,
        objective,
        examples,
        settings,
        epochs=epochs,
        learning_rate=rate,
        seed=seed,
        pad_id=0,
        bf16=False,
        device="cpu",
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(step["step"], len(steps)) for step in steps]
    return steps


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def fresh(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


@pytest.mark.parametrize(
    "objective",
    [trainer.preference_objective(BOTH, True), trainer.sft_objective(SFT)],
    ids=["preference", "sft"],
)
@pytest.mark.parametrize("other", [{"micro": 2}, {"micro": 100}, {"checkpointing": True}], ids=str)
def test_how_a_batch_is_cut_changes_nothing(tiny, examples, objective, other):
    whole, cut = fresh(tiny), fresh(tiny)
    expected = fit(whole, objective, examples, epochs=2)
    found = fit(cut, objective, examples, epochs=2, **other)
    assert len(expected) == len(found) == 6
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, abs=1e-5, rel=1e-5)
    assert expected[-1]["loss"] != pytest.approx(expected[0]["loss"], abs=1e-3)
    before = weights(fresh(tiny))
    for name, value in weights(whole).items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=0, atol=1e-4)
        assert not torch.equal(value, before[name]), name


def test_the_first_step_is_at_the_reference(model, examples):
    first = fit(model, trainer.preference_objective(BOTH, True), examples)[0]
    assert first["loss_direct"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss_refine_rejected"] == pytest.approx(0.25, abs=1e-5)
    assert first["loss_refine_chosen"] == pytest.approx(0.25, abs=1e-5)
    expected = 0.6 * math.log(2) + 0.4 * (0.25 + 0.25) + 0.1 * first["loss_nll"]
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("lengths", ["sum", "mean"])
@pytest.mark.parametrize(
    ("direct", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("simpo", 2.0), ("sppo", 0.001), ("srpo", 0.1)], ids=str
)
def test_each_direct_loss_starts_where_it_must(model, examples, direct, beta, lengths):
    """With no more of the reference than the loss needs, and at the betas of its conf file."""
    loss = PreferenceWeights(
        alpha=0.0,
        direct=direct,
        lengths=lengths,
        gamma=1.0 if direct == "simpo" else None,
        beta_direct=beta,
        beta_refine=None,
        refine_contexts=None,
        refine_scale=None,
        nll=0.0,
    )
    names = losses.needed_of_reference(loss)
    some = [{**e, "reference": {name: e["reference"][name] for name in names}} for e in examples]
    if not names:
        some = [{"pair": example["pair"]} for example in examples]
    before = weights(model)
    first = fit(model, trainer.preference_objective(loss, bool(names)), some)[0]
    for name, value in losses.at_reference(loss).items():
        assert first[name] == pytest.approx(value, rel=1e-5)
    assert first["loss"] == pytest.approx(first["loss_direct"], rel=1e-5)
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("names", [losses.DIRECT, losses.REFINE[:2], losses.REFINE[2:]], ids=str)
def test_a_wrong_reference_stops_the_first_step(model, examples, names):
    moved = [{**e, "reference": {**e["reference"], names[0]: e["reference"][names[0]] + 3}} for e in examples]
    before = weights(model)
    with pytest.raises(RuntimeError, match="at the first step and must be"):
        fit(model, trainer.preference_objective(BOTH, True), moved)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    # Where training does not start at its reference, nothing is known of the first step.
    assert len(fit(model, trainer.preference_objective(BOTH, False), moved)) == 3


def test_a_loss_that_is_not_a_number_names_step_and_prompts(model, examples):
    objective = trainer.preference_objective(BOTH, True)
    calls = []

    def broken(logp, batch, pairs):
        loss, metrics = objective.loss(logp, batch, pairs)
        calls.append(batch["ids"])
        return (loss * float("nan") if len(calls) == 2 else loss), metrics

    bad = trainer.Objective(objective.names, objective.items, broken, objective.expected)
    with pytest.raises(trainer.Diverged, match=r"^the loss is nan at step 2, prompts r\d+, ") as error:
        fit(model, bad, examples)
    assert ", ".join(calls[1]) in str(error.value)


@pytest.mark.parametrize("rate", [1e3, 1e38])
def test_a_huge_learning_rate_gives_finite_weights_or_raises(model, examples, rate):
    try:
        steps = fit(model, trainer.preference_objective(BOTH, True), examples, rate=rate, epochs=2)
    except trainer.Diverged:
        return
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_a_last_step_that_spoils_the_weights_raises(model, examples):
    """The loss is checked before an update; nothing comes after the last one but a checkpoint."""
    objective = trainer.preference_objective(BOTH, True)

    def steep(logp, batch, pairs):
        """A finite loss whose slope is not: the root of 0."""
        loss, metrics = objective.loss(logp, batch, pairs)
        return loss + (loss - loss.detach()).sqrt(), metrics

    bad = trainer.Objective(objective.names, objective.items, steep, {})
    with pytest.raises(trainer.Diverged):
        fit(model, bad, examples[:8])


def test_the_same_seed_gives_the_same_bits(tiny, examples):
    objective = trainer.preference_objective(BOTH, True)
    one, two, other = fresh(tiny), fresh(tiny), fresh(tiny)
    steps = fit(one, objective, examples, seed=3)
    torch.manual_seed(99)  # the state it is called in does not count
    assert fit(two, objective, examples, seed=3) == steps
    fit(other, objective, examples, seed=4)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in weights(one).items())
    assert not all(torch.equal(value, other.state_dict()[name]) for name, value in weights(one).items())


def test_a_saved_model_is_read_back(tiny, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = fresh(tiny)
    trainer.save(model, tokenizer, tmp_path, "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights(model).items())
    assert templates.load_tokenizer(tmp_path, None, False).get_vocab() == tokenizer.get_vocab()
