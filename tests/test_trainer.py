"""Training: the same steps however they are cut, laid out or interrupted; what must stop it; what it leaves behind.

`python tests/test_trainer.py MODEL CHECKPOINTS OUT WAY [STEP]` is one run, which kills itself at a step.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.training import optimiser
from evolve import losses, pairs, templates, trainer
from evolve.config import CONF, ROOT, Lora, PreferenceWeights, SFTWeights, Template, accumulation

BOTH = PreferenceWeights(alpha=0.4, beta_direct=0.1, beta_refine=0.2, refine_contexts="both", refine_scale=1.0, nll=0.1)
SFT = SFTWeights(direct=1.0, refine=0.5)
LORA = Lora(rank=4, alpha=8, dropout=0.0, targets="all-linear")
NAMES = losses.DIRECT + losses.REFINE
PAIRS = 20  # with a batch of 8: the last step of an epoch has 4
STEPS = 6  # of two epochs
LAYOUTS = ("padded", "packed", "shared")


def fresh(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_examples(path, template, bf16=False, layout="shared"):
    """Pairs with the log-probabilities of the untrained model as reference."""
    draw = random.Random(0)

    def ledger():
        return " ".join(draw.choices("0123", k=draw.randint(2, 12)))

    rows = [{"id": f"r{n}", "prompt": ledger(), "chosen": ledger(), "rejected": ledger()} for n in range(PAIRS)]
    encoded, _ = pairs.encode(templates.load_tokenizer(path, None, False), template, rows, 128, 0.0)
    model = pairs.prepare(fresh(path).eval(), layout, bf16)
    with torch.inference_mode():
        batches = [pairs.batch([[pair.sequences[name] for name in NAMES]], layout, 0) for pair in encoded]
        values = [pairs.log_probabilities(model, batch).tolist() for batch in batches]
    return [
        {"pair": pair, "reference": dict(zip(NAMES, row, strict=True))}
        for pair, row in zip(encoded, values, strict=True)
    ]


def fit(model, objective, examples, folder, *, rate=1e-3, epochs=1, seed=0, bf16=False, on_step=None, **changed):
    return trainer.train(
        model,
        objective,
        examples,
        optimiser(**{"batch_size": 8, "micro_batch": 8, "schedule": "linear", **changed}),
        epochs=epochs,
        learning_rate=rate,
        seed=seed,
        pad_id=0,
        bf16=bf16,
        device="cpu",
        folder=folder,
        on_step=on_step or (lambda done, total: None),
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


@pytest.fixture
def model(tiny):
    return fresh(tiny)


@pytest.fixture(scope="module")
def examples(tiny, template):
    return make_examples(tiny, template)


@pytest.fixture(scope="module")
def objective():
    return trainer.preference_objective(BOTH, True)


# ---- which pairs make a step, and on which device


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 16), st.integers(0, 5))
def test_every_epoch_is_a_permutation_cut_into_batches(count, epochs, batch_size, seed):
    steps = trainer.order(count, epochs, batch_size, seed)
    assert steps == trainer.order(count, epochs, batch_size, seed)
    each = -(-count // batch_size)
    assert len(steps) == epochs * each
    for epoch in range(epochs):
        here = steps[epoch * each : (epoch + 1) * each]
        assert sorted(index for step in here for index in step) == list(range(count))
        assert [len(step) for step in here[:-1]] == [batch_size] * (each - 1)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = trainer.order(20, 2, 20, 0)
    (other,) = trainer.order(20, 1, 20, 1)
    assert first != second != other != first
    assert first == trainer.order(20, 1, 20, 0)[0]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.data())
def test_a_step_is_dealt_out_once_however_many_devices_there_are(rounds, devices, micro, data):
    batch_size = rounds * devices * micro
    assert accumulation("trainer", batch_size, micro, devices) == rounds
    step = data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=batch_size))
    dealt = trainer.deal(step, rounds, devices)
    assert len(dealt) == rounds * devices
    assert [index for group in dealt for index in group] == step
    assert max(len(group) for group in dealt) <= micro
    assert len(dealt[0]) > 0
    if len(step) == batch_size:
        assert {len(group) for group in dealt} == {micro}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_a_batch_that_does_not_divide_is_told_what_would(batch_size, micro, devices):
    """Each number that the error names is accepted in the place of the one that it is about."""
    try:
        rounds = accumulation("trainer", batch_size, micro, devices)
    except ValueError as error:
        about, fits = re.fullmatch(r"trainer\.(\w+)=.*; (?:these do: )?([\d ,or]+)(?: would)?", str(error)).groups()
        for number in map(int, re.findall(r"\d+", fits)):
            if about == "micro_batch":
                assert number * accumulation("trainer", batch_size, number, devices) * devices == batch_size
            else:
                assert accumulation("trainer", number, 1, devices) * devices == number
    else:
        assert rounds * devices * min(micro, batch_size // devices) == batch_size


# ---- what changes nothing


@pytest.fixture(scope="module")
def plain(tiny, examples, objective, tmp_path_factory):
    """Each objective, and the model and steps of a run of two epochs with nothing special."""
    found = {}
    for name, minimised in (("preference", objective), ("sft", trainer.sft_objective(SFT))):
        model = fresh(tiny)
        found[name] = minimised, model, fit(model, minimised, examples, tmp_path_factory.mktemp("c"), epochs=2).steps
    return found


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        ("preference", {"micro_batch": 2}),
        ("preference", {"micro_batch": 100}),
        ("preference", {"gradient_checkpointing": True}),
        ("preference", {"layout": "packed"}),
        ("preference", {"layout": "padded"}),
        ("preference", {"layout": "padded", "micro_batch": 2, "gradient_checkpointing": True}),
        ("sft", {"micro_batch": 2, "gradient_checkpointing": True}),
        ("sft", {"layout": "padded"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_how_a_batch_is_cut_and_laid_out_changes_nothing(tiny, examples, plain, tmp_path, loss, other):
    objective, whole, expected = plain[loss]
    cut, seen = fresh(tiny), []
    found = fit(cut, objective, examples, tmp_path, epochs=2, on_step=lambda *at: seen.append(at), **other).steps
    assert [step["step"] for step in expected] == list(range(1, STEPS + 1))
    assert seen == [(step["step"], STEPS) for step in found]
    assert len(expected) == len(found)
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys()
        # At the reference margins are 0 but for rounding, so that which of them are positive means nothing.
        names = [name for name in one if one["step"] > 1 or not name.startswith("accuracy")]
        assert {name: one[name] for name in names} == pytest.approx({n: two[n] for n in names}, abs=1e-5, rel=1e-5)
    assert expected[-1]["loss"] != pytest.approx(expected[0]["loss"], abs=1e-3)
    before = weights(fresh(tiny))
    for name, value in weights(whole).items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=0, atol=1e-4)
        assert not torch.equal(value, before[name]), name


def test_the_same_seed_gives_the_same_bits(tiny, examples, objective, tmp_path):
    one, two, other = fresh(tiny), fresh(tiny), fresh(tiny)
    steps = fit(one, objective, examples, tmp_path, seed=3).steps
    torch.manual_seed(99)  # the state it is called in does not count
    assert fit(two, objective, examples, tmp_path, seed=3).steps == steps
    fit(other, objective, examples, tmp_path, seed=4)
    assert same_bits(one, two)
    assert not same_bits(one, other)


def test_what_layouts_save_and_waste(tiny, examples, objective, tmp_path):
    run = {how: fit(fresh(tiny), objective, examples, tmp_path, layout=how).timing for how in LAYOUTS}
    assert [timing["padding_share"] > 0 for timing in run.values()] == [True, False, False]
    assert [timing["shared_share"] > 0 for timing in run.values()] == [False, False, True]
    groups = [list(example["pair"].sequences.values()) for example in examples]
    shared = pairs.batch(groups, "shared", 0)
    assert run["shared"]["shared_share"] == pytest.approx(1 - shared.input_ids.numel() / shared.tokens)


def test_a_model_that_cannot_be_laid_out_trains_on_padded_rows_alone(examples, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "bloom", vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4, initializer_range=0.3
        )
    )
    before, objective = weights(model), trainer.sft_objective(SFT)
    with pytest.raises(ValueError, match=r"^this model \(bloom\) .*set trainer\.layout=padded$"):
        fit(model, objective, examples, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    steps = fit(model, objective, examples, tmp_path, layout="padded", epochs=2).steps
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_window_that_only_long_pairs_meet_is_found(examples, tokenizer, tmp_path):
    """PhiMoE keeps its window to itself: it stands in its mask, not in what it hands to the attention interface."""
    from transformers import AutoConfig, AutoModelForCausalLM

    longest = [max(len(sequence.ids) for sequence in example["pair"].sequences.values()) for example in examples]
    window = sorted(longest)[-2]
    assert window < max(longest)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "phimoe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, initializer_range=0.3,
            sliding_window=window, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^this model \(phimoe\) gives log-probabilities .* apart"):
        fit(model, trainer.sft_objective(SFT), examples, tmp_path)
    assert len(fit(model, trainer.sft_objective(SFT), examples[:2], tmp_path).steps) == 1


# ---- the first step


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_first_step_is_at_the_reference(model, examples, objective, tmp_path, lora):
    first = fit(model, objective, examples, tmp_path, lora=lora).steps[0]
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
def test_each_direct_loss_starts_where_it_must(model, examples, tmp_path, direct, beta, lengths):
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
    first = fit(model, trainer.preference_objective(loss, bool(names)), some, tmp_path).steps[0]
    for name, value in losses.at_reference(loss).items():
        assert first[name] == pytest.approx(value, rel=1e-5)
    assert first["loss"] == pytest.approx(first["loss_direct"], rel=1e-5)
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("names", [losses.DIRECT, losses.REFINE[:2], losses.REFINE[2:]], ids="-".join)
def test_a_wrong_reference_stops_the_first_step(tiny, model, examples, objective, tmp_path, names):
    moved = [{**e, "reference": {**e["reference"], names[0]: e["reference"][names[0]] + 3}} for e in examples]
    before = weights(model)
    with pytest.raises(RuntimeError, match="at the first step and must be"):
        fit(model, objective, moved, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    # Where training does not start at its reference, nothing is known of the first step.
    assert len(fit(fresh(tiny), trainer.preference_objective(BOTH, False), moved, tmp_path).steps) == 3


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_bf16_starts_at_a_reference_of_the_same_precision(tiny, template, objective, tmp_path, layout):
    """Within the trainer's own tolerance, or it would stop; what it trains stays float32."""
    examples, model = make_examples(tiny, template, bf16=True, layout=layout), fresh(tiny)
    exact = make_examples(tiny, template)
    apart = [abs(a["reference"][n] - b["reference"][n]) for a, b in zip(examples, exact, strict=True) for n in NAMES]
    assert max(apart) > 0.01  # it is another precision
    steps = fit(model, objective, examples, tmp_path, bf16=True, layout=layout, micro_batch=2, epochs=2).steps
    assert steps[0]["loss_direct"] == pytest.approx(math.log(2), abs=0.05)
    assert steps[0]["loss_refine_rejected"] == pytest.approx(0.25, abs=0.05)
    assert len(steps) == STEPS
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# ---- what must stop it


def spoilt(objective, at, how):
    """The objective, but for the loss of one micro-batch, the `at`th; and the ids of each that was run."""
    calls = []

    def loss(logp, batch, items):
        value, metrics = objective.loss(logp, batch, items)
        calls.append(batch["ids"])
        return (how(value) if len(calls) == at else value), metrics

    return trainer.Objective(objective.names, objective.items, loss, objective.expected), calls


def test_a_loss_that_is_not_a_number_names_step_prompts_and_checkpoint(model, examples, objective, tmp_path):
    """The 5th of micro-batches of 4 is the 3rd step's first."""
    bad, calls = spoilt(objective, 5, lambda loss: loss * float("nan"))
    with pytest.raises(trainer.Diverged) as error:
        fit(model, bad, examples, tmp_path, epochs=2, micro_batch=4, checkpoint_minutes=0)
    prompts = ", ".join(calls[4])
    assert len(calls[4]) == 2  # the rest of an epoch, dealt out evenly
    assert str(error.value) == (
        f"the loss is nan at step 3, prompts {prompts}; the last good checkpoint is {tmp_path / 'checkpoint-1'}; "
        "a smaller learning rate (model.learning_rate) is the usual remedy"
    )


def test_a_loss_out_of_bounds_names_step_and_prompts(model, examples, objective, tmp_path):
    bad, calls = spoilt(objective, 3, lambda loss: loss * 1000)
    with pytest.raises(trainer.Diverged) as error:
        fit(model, bad, examples, tmp_path, micro_batch=4, max_loss_growth=50.0)
    assert str(error.value).startswith("the loss is ")
    assert "more than trainer.max_loss_growth=50 times the first step's" in str(error.value)
    assert f"at step 2, prompts {', '.join(calls[2] + calls[3])}; there is no good checkpoint" in str(error.value)
    assert len(calls) == 4


def test_growth_within_bounds_is_let_be(model, examples, objective, tmp_path):
    grown, _ = spoilt(objective, 2, lambda loss: loss * 30)
    steps = fit(model, grown, examples, tmp_path, max_loss_growth=50.0).steps
    assert 10 < steps[1]["loss"] / steps[0]["loss"] < 50


@pytest.mark.parametrize("rate", [1e3, 1e38])
def test_a_huge_learning_rate_gives_finite_weights_or_raises(model, examples, objective, tmp_path, rate):
    try:
        steps = fit(model, objective, examples, tmp_path, rate=rate, epochs=2).steps
    except trainer.Diverged:
        return
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_a_last_step_that_spoils_the_weights_raises(model, examples, objective, tmp_path):
    """The loss is checked before an update; nothing comes after the last one but what is saved."""
    # A finite loss whose slope is not: the root of 0.
    bad, calls = spoilt(objective, 1, lambda loss: loss + (loss - loss.detach()).sqrt())
    with pytest.raises(trainer.Diverged, match=r"^the gradient is not finite at step 1, prompts r\d+, ") as error:
        fit(model, bad, examples[:8], tmp_path)
    assert ", ".join(calls[0]) in str(error.value)


# ---- interruption


class Killed(BaseException):
    pass


def killed_at(step):
    def on_step(done, total):
        if done == step:
            raise Killed

    return on_step


def interrupted(path, objective, examples, folder, step, **settings):
    """A run that writes a checkpoint after every step and is gone in the midst of one."""
    with pytest.raises(Killed):
        fit(fresh(path), objective, examples, folder, on_step=killed_at(step), checkpoint_minutes=0, **settings)


def resumed(path, objective, examples, folder, **settings):
    """The model, its steps, and those of them that were taken now."""
    model, seen = fresh(path), []
    trained = fit(
        model, objective, examples, folder, on_step=lambda done, _: seen.append(done), checkpoint_minutes=0, **settings
    )
    return trained.trainer.model, trained.steps, seen


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, 1),
        ({}, 4),
        ({"micro_batch": 2, "schedule": "cosine", "warmup": 0.5, "weight_decay": 0.1}, 3),
        ({"lora": LORA}, 4),
        ({"gradient_checkpointing": True}, STEPS),
    ],
    ids=["before-any-checkpoint", "plain", "accumulating", "lora", "at-the-last-step"],
)
def test_a_run_cut_short_ends_as_one_that_was_not(tiny, examples, objective, tmp_path, settings, step):
    whole = fit(fresh(tiny), objective, examples, tmp_path / "whole", epochs=2, **settings)
    folder = tmp_path / "cut"
    interrupted(tiny, objective, examples, folder, step, epochs=2, **settings)
    model, steps, seen = resumed(tiny, objective, examples, folder, epochs=2, **settings)
    assert seen == list(range(step, STEPS + 1))
    assert json.dumps(steps) == json.dumps(whole.steps)
    assert same_bits(model, whole.trainer.model)


def test_a_checkpoint_half_written_does_not_count(tiny, examples, objective, tmp_path):
    whole = fresh(tiny)
    expected = fit(whole, objective, examples, tmp_path / "whole", epochs=2).steps
    folder = tmp_path / "cut"
    interrupted(tiny, objective, examples, folder, 4, epochs=2)
    assert trainer.last_checkpoint(folder) == folder / "checkpoint-3"
    (folder / "checkpoint-3" / trainer.COMPLETE).unlink()
    state = folder / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (folder / "checkpoint-30").mkdir()
    assert trainer.last_checkpoint(folder) == folder / "checkpoint-2"
    model, steps, seen = resumed(tiny, objective, examples, folder, epochs=2)
    assert seen == [3, 4, 5, 6]
    assert steps == expected
    assert same_bits(model, whole)
    assert trainer.last_checkpoint(folder) == folder / "checkpoint-5"  # what comes after the last step is the stage's


def test_a_checkpoint_that_was_damaged_is_not_trained_from(tiny, examples, objective, tmp_path):
    whole = fresh(tiny)
    expected = fit(whole, objective, examples, tmp_path / "whole", epochs=2).steps
    folder = tmp_path / "cut"
    interrupted(tiny, objective, examples, folder, 4, epochs=2)
    path = folder / "checkpoint-3" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of a weight: it loads as well as before
    path.write_bytes(content)
    model, steps, seen = resumed(tiny, objective, examples, folder, epochs=2)
    assert seen == [3, 4, 5, 6]
    assert steps == expected and same_bits(model, whole)


def test_growth_is_measured_from_the_first_step_of_all(tiny, examples, objective, tmp_path):
    interrupted(tiny, objective, examples, tmp_path, 3, epochs=2)
    grown = trainer.Objective(
        objective.names,
        objective.items,
        lambda *given_: (lambda loss, metrics: (20 * loss, metrics))(*objective.loss(*given_)),
        objective.expected,
    )
    with pytest.raises(trainer.Diverged, match=r"at step 3, .*; the last good checkpoint is .*checkpoint-1; "):
        resumed(tiny, grown, examples, tmp_path, epochs=2, max_loss_growth=10.0)


@pytest.mark.parametrize("minutes", [None, 1000.0])
def test_no_checkpoint_is_written_before_it_is_time(model, examples, objective, tmp_path, minutes):
    folder = tmp_path / "checkpoints"
    fit(model, objective, examples, folder, epochs=2, checkpoint_minutes=minutes)
    assert list(folder.glob("*")) == []
    assert trainer.last_checkpoint(folder) is None


def test_two_checkpoints_are_kept(model, examples, objective, tmp_path):
    fit(model, objective, examples, tmp_path, epochs=2, checkpoint_minutes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def process(tiny, tmp_path, name, way, *step):
    """This file as a program: its exit status."""
    words = [sys.executable, __file__, str(tiny), str(tmp_path / f"{name}-checkpoints"), str(tmp_path / name), way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*words, *map(str, step)], env=environment, timeout=300).returncode


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_process_killed_and_started_again_saves_the_same_bits(tiny, tmp_path, way):
    assert process(tiny, tmp_path, "whole", way) == 0
    assert process(tiny, tmp_path, "cut", way, 4) == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert trainer.last_checkpoint(tmp_path / "cut-checkpoints").name == "checkpoint-3"
    assert process(tiny, tmp_path, "cut", way) == 0
    found, expected = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("cut", "whole"))
    assert json.loads(found.pop("seen.json")) == [4, 5, 6]
    assert json.loads(expected.pop("seen.json")) == [1, 2, 3, 4, 5, 6]
    assert "model.safetensors" in expected
    assert found == expected


# ---- what is left behind


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_a_plain_one(tiny, tokenizer, examples, objective, tmp_path, lora, dtype):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    groups, out = [list(examples[0]["pair"].sequences.values())], tmp_path / "out"
    trained = fit(fresh(tiny), objective, examples, tmp_path / "c", rate=1e-2 if lora else 3e-3, epochs=2, lora=lora)
    with torch.inference_mode():
        expected = pairs.log_probabilities(trained.trainer.model.eval(), pairs.batch(groups, "shared", 0))
    trainer.save(trainer.whole(trained, lambda: fresh(tiny)), tokenizer, out, dtype)
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert "evolve_forest" not in path.read_text(), path
    saved, given_ = (json.loads((path / "config.json").read_text()) for path in (out, tiny))
    assert saved == {**given_, "dtype": dtype}
    assert not list(out.glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.state_dict().keys() == fresh(tiny).state_dict().keys()
    assert templates.load_tokenizer(out, None, False).get_vocab() == tokenizer.get_vocab()
    with torch.inference_mode():
        padded = pairs.batch(groups, "padded", 0)
        found = pairs.log_probabilities(pairs.prepare(loaded.float().eval(), "padded"), padded)
        before = pairs.log_probabilities(pairs.prepare(fresh(tiny).eval(), "padded"), padded)
    near = 1e-4 if dtype == "float32" else 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=near)
    assert (before - expected).abs().max() > 4 * near


def test_a_saved_model_has_the_weights_that_were_trained(model, tiny, tokenizer, examples, objective, tmp_path):
    trained = fit(model, objective, examples, tmp_path / "c")
    trainer.save(trainer.whole(trained, lambda: fresh(tiny)), tokenizer, tmp_path / "out", "float32")
    assert same_bits(fresh(tmp_path / "out"), model)


def test_adapters_alone_are_trained(tiny, examples, objective, tmp_path):
    before = weights(fresh(tiny))
    trained = fit(fresh(tiny), objective, examples, tmp_path, lora=LORA)
    adapted = trained.trainer.model
    found = {name.removeprefix("base_model.model."): value for name, value in adapted.named_parameters()}
    adapters = {name: value for name, value in found.items() if "lora_" in name}
    assert all(value.requires_grad == (name in adapters) for name, value in found.items())
    linear = [name.removesuffix(".weight") for name in before if "proj" in name]
    assert len(adapters) == 2 * len(linear) == 28
    for name in linear:
        assert torch.equal(found[f"{name}.base_layer.weight"], before[f"{name}.weight"])
        assert found[f"{name}.lora_A.default.weight"].shape[0] == LORA.rank
        assert found[f"{name}.lora_B.default.weight"].abs().max() > 0  # 0 before the first step
    for name in before.keys() - {f"{name}.weight" for name in linear}:
        assert torch.equal(found[name], before[name])


def main(model_path, checkpoints, out, way, step=None):
    """One run in a process of its own: the model, its steps, and which of them were taken here."""
    template = Template(**yaml.safe_load((CONF / "template" / "rewrite.yaml").read_text()))
    seen = []

    def on_step(done, total):
        if step is not None and done == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(done)

    model_path, out = Path(model_path), Path(out)
    trained = fit(
        fresh(model_path),
        trainer.preference_objective(BOTH, True),
        make_examples(model_path, template),
        Path(checkpoints),
        epochs=2,
        checkpoint_minutes=0,
        lora=LORA if way == "lora" else None,
        on_step=on_step,
    )
    tokenizer = templates.load_tokenizer(model_path, None, False)
    trainer.save(trainer.whole(trained, lambda: fresh(model_path)), tokenizer, out, "float32")
    (out / "steps.json").write_text(json.dumps(trained.steps))
    (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
