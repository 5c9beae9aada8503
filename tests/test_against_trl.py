"""Training here equals TRL's: the same data in the same steps gives every step the same loss."""

import random

import pytest
import torch

from evolve import pairs, templates, trainer
from evolve.config import PreferenceWeights, SFTWeights

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds

DPO = {"direct": "dpo", "lengths": "sum", "gamma": None, "beta_direct": 0.1, "nll": 0.0}
DIRECT = PreferenceWeights(alpha=0.0, beta_refine=None, refine_contexts=None, refine_scale=None, **DPO)
BOTH = PreferenceWeights(alpha=0.8, beta_refine=0.2, refine_contexts="both", refine_scale=2.0, **DPO)
BATCH, MICRO, STEPS = 8, 2, 9
OPTIMISER = {"weight_decay": 0.01, "max_grad_norm": 1.0}
RATE = 1e-3
WARMUP = 3  # steps


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(0)

    def ledger():
        return " ".join(draw.choices("0123", k=draw.randint(2, 12)))

    return [
        {"id": f"r{number}", "prompt": ledger(), "chosen": ledger(), "rejected": ledger()}
        for number in range(BATCH * STEPS)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


@pytest.fixture(scope="module")
def encoded(tokenizer, template, rows):
    return pairs.encode(tokenizer, template, rows, 128, 0.0)[0]


def fresh(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def ours(tiny, objective, encoded, folder):
    """Each step's loss, and the ids of its pairs: which those are is the trainer's choice, so it is read from it."""
    from benchmarks.training import optimiser, recorded, references

    model = fresh(tiny)
    examples = references(model, encoded, 0, False, "cpu", MICRO, "shared")
    objective, seen = recorded(objective)
    trained = trainer.train(
        model,
        objective,
        examples,
        optimiser(batch_size=BATCH, micro_batch=MICRO, schedule="linear", warmup=WARMUP / STEPS, **OPTIMISER),
        epochs=1,
        learning_rate=RATE,
        seed=0,
        pad_id=0,
        bf16=False,
        device="cpu",
        folder=folder,
        on_step=lambda done, total: None,
    )
    order = [seen[start : start + BATCH] for start in range(0, len(seen), BATCH)]
    assert len(trained.steps) == len(order) == STEPS
    return [step["loss"] for step in trained.steps], order


def theirs(kind, tiny, tokenizer, rows, order, **settings):
    """Each step's loss under TRL's trainer `kind` ('DPO' or 'SFT'), on conversations, from the model's folder."""
    import trl
    from datasets import Dataset

    def turn(role, text):
        return [{"role": role, "content": text}]

    by_id = {row["id"]: row for row in rows}
    found = []
    for row in (by_id[name] for step in order for name in step):
        answers = {name: turn("assistant", row[name]) for name in ("chosen", "rejected")}
        if kind == "SFT":
            answers = {"completion": answers["chosen"]}
        found.append({"prompt": turn("user", row["prompt"]), **answers})
    made = getattr(trl, f"{kind}Trainer")(
        model=str(tiny),
        args=getattr(trl, f"{kind}Config")(
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
            train_sampling_strategy="sequential",
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            num_train_epochs=1,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **OPTIMISER,
            **settings,
        ),
        train_dataset=Dataset.from_list(found),
        processing_class=tokenizer,
    )
    made.train()
    return [logged["loss"] for logged in made.state.log_history if "loss" in logged]


CASES = {
    "dpo": ("DPO", trainer.preference_objective(DIRECT, True), {"beta": 0.1}, {"beta": 0.11}),
    "sft": ("SFT", trainer.sft_objective(SFTWeights(direct=1.0, refine=0.0)), {}, {"completion_only_loss": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_the_loss_of_trl(tiny, tokenizer, rows, encoded, tmp_path, case):
    kind, objective, settings, others = CASES[case]
    found, order = ours(tiny, objective, encoded, tmp_path / "ours")
    expected = theirs(kind, tiny, tokenizer, rows, order, output_dir=str(tmp_path), **settings)
    assert len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
    assert max(found) - min(found) > 1e-2, "the model learns, so that equal losses mean equal gradients"
    wrong = theirs(kind, tiny, tokenizer, rows, order, output_dir=str(tmp_path), **others)
    assert found != pytest.approx(wrong, abs=1e-4, rel=0)


def test_the_benchmarks_stock_side_minimises_the_same_loss(tiny, tokenizer, encoded, tmp_path):
    """Three rows a pair through DPOTrainer are the whole objective."""
    from benchmarks import stock_trl

    found, order = ours(tiny, trainer.preference_objective(BOTH, True), encoded, tmp_path)
    by_id = {pair.id: pair for pair in encoded}
    steps = [[by_id[name] for name in step] for step in order]
    settings = {
        "rows": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "bf16": False,
        "use_cpu": True,
        **OPTIMISER,
    }
    for loss, same in ((BOTH, True), (BOTH.model_copy(update={"beta_refine": 0.21}), False)):
        stock = stock_trl.trainer(fresh(tiny), tokenizer, steps, loss, lambda: None, **settings)
        stock.train()
        assert len(stock.losses) == STEPS
        assert (found == pytest.approx(stock.losses, abs=1e-5, rel=0)) is same
        # The first step is at the reference.
        assert stock.losses[0] == pytest.approx(0.2 * torch.tensor(2.0).log().item() + 0.8 * 2 * 2 / 4, abs=1e-5)
