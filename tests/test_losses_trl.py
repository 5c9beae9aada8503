"""Our losses against TRL's own trainers: the same weights, reference and tokens must give the same loss and gradient.

TRL has the equations inside its trainers' steps, so real trainers are asked, with a random model of two layers as the
policy and another as the reference. The refinement loss and SRPO's are in no library (tests/test_losses.py).
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolve import losses, pairs
from evolve.config import PreferenceWeights
from evolve.templates import Encoded

PAIRS = 6
EVERYWHERE = {"per_device_train_batch_size": PAIRS, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None}


def weights(direct: str, lengths: str, beta: float, gamma: float | None = None, nll: float = 0.0) -> PreferenceWeights:
    return PreferenceWeights(
        alpha=0.0,
        direct=direct,
        lengths=lengths,
        gamma=gamma,
        beta_direct=beta,
        beta_refine=None,
        refine_contexts=None,
        refine_scale=None,
        nll=nll,
    )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    draw = random.Random(0)

    def ledger() -> str:
        return " ".join(draw.choices("0123", k=draw.randint(1, 9)))

    return [{"prompt": f"{ledger()} ", "chosen": ledger(), "rejected": ledger()} for _ in range(PAIRS)]


@pytest.fixture
def policy(tiny):
    """The tiny model with other weights, so that its log-ratios to the reference are far from 0."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return model.train()  # TRL keeps its metrics by mode; there is no dropout


@pytest.fixture
def reference(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def dpo_trainer(policy, reference, tokenizer, rows, folder, **settings):
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(output_dir=str(folder), precompute_ref_log_probs=True, **EVERYWHERE, **settings)
    return DPOTrainer(
        policy, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def logp(model, ids, attention, answers):
    """Log-probabilities and lengths of a batch of TRL's, which holds the chosen answers, then the rejected ones."""
    sequences = []
    for row, real, answer in zip(ids, attention.bool(), answers.bool(), strict=True):
        assert answer[real].sort(stable=True).values.equal(answer[real])  # the answer comes last
        sequences.append(Encoded(row[real].tolist(), int((~answer[real]).sum())))
    prepared = pairs.prepare(copy.copy(model), "padded")  # a copy with the same weights: TRL goes on with the model
    summed = pairs.log_probabilities(prepared, pairs.batch([sequences], "padded", 0))
    lengths = answers.sum(1).chunk(2)
    return dict(zip(losses.DIRECT, summed.chunk(2), strict=True)), dict(
        zip(("chosen", "rejected"), lengths, strict=True)
    )


def gradient(model) -> torch.Tensor:
    found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return found


def agree(policy, theirs, ours):
    theirs.backward()
    expected = gradient(policy)
    ours.backward()
    found = gradient(policy)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("w", "loss_type"),
    [
        (weights("dpo", "sum", 0.3), "sigmoid"),
        (weights("dpo", "mean", 0.3), "sigmoid_norm"),
        (weights("ipo", "mean", 0.3), "ipo"),
        (weights("sppo", "sum", 0.3), "sppo_hard"),
        (weights("sppo", "sum", 0.001), "sppo_hard"),
    ],
    ids=["dpo", "dpo of means", "ipo", "sppo", "sppo of the paper"],
)
def test_as_in_trls_dpo_trainer(policy, reference, tokenizer, rows, tmp_path, w, loss_type):
    trainer = dpo_trainer(policy, reference, tokenizer, rows, tmp_path, loss_type=[loss_type], beta=w.beta_direct)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["ref_chosen_logps"].shape == (PAIRS,)
    theirs = trainer.compute_loss(trainer.model, batch)
    ids, attention, answers = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    own, tokens = logp(policy, ids, attention, answers)
    with torch.no_grad():
        under_reference, _ = logp(reference, ids, attention, answers)
    assert len(set(tokens["chosen"].tolist())) > 1 and not torch.equal(tokens["chosen"], tokens["rejected"])
    total, metrics = losses.preference(own, under_reference, w, tokens)
    if w.lengths == "sum":
        for name in ("chosen", "rejected"):
            expected = trainer._metrics["train"][f"rewards/{name}"][-1]
            assert metrics[f"{name}_reward_direct"].mean().item() == pytest.approx(expected, rel=1e-4)
        accuracy = trainer._metrics["train"]["rewards/accuracies"][-1]
        assert metrics["accuracy_direct"].mean().item() == pytest.approx(accuracy)
    agree(policy, theirs, total.mean())


@pytest.mark.parametrize("same_length", [True, False], ids=["same length", "any length"])
def test_dpo_with_nll_is_trls_sigmoid_and_sft(policy, reference, tokenizer, rows, tmp_path, same_length):
    """TRL's NLL is a mean over the batch's chosen tokens; ours, as in the RPO paper, over each answer's, then pairs.

    So the two are one where the chosen answers are equally long, or for one pair at a time.
    """
    if same_length:
        rows = [{**row, "chosen": " ".join(row["chosen"][0] * 4)} for row in rows]
    w = weights("dpo", "sum", 0.3, nll=0.7)
    trainer = dpo_trainer(
        policy, reference, tokenizer, rows, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.3
    )
    whole = next(iter(trainer.get_train_dataloader()))

    def theirs_and_ours(pick):
        batch = {
            key: value[torch.cat([pick, pick + PAIRS])] if len(value) == 2 * PAIRS else value[pick]
            for key, value in whole.items()
        }
        ids, attention, answers = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        own, tokens = logp(policy, ids, attention, answers)
        under_reference = dict(
            zip(losses.DIRECT, (batch["ref_chosen_logps"], batch["ref_rejected_logps"]), strict=True)
        )
        total, _ = losses.preference(own, under_reference, w, tokens)
        return trainer.compute_loss(trainer.model, batch), total.mean()

    everything = torch.arange(PAIRS)
    theirs, ours = theirs_and_ours(everything)
    if same_length:
        agree(policy, theirs, ours)
    else:
        assert abs(theirs - ours) > 1e-2
        alone = torch.stack([theirs_and_ours(everything[n : n + 1])[0] for n in range(PAIRS)])
        agree(policy, alone.mean(), ours)


def test_simpo_is_trls(policy, tokenizer, rows, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    w = weights("simpo", "mean", 2.0, gamma=1.0)
    arguments = CPOConfig(
        output_dir=str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
        simpo_gamma=1.0,
        **{**EVERYWHERE, "max_length": 64},
    )
    trainer = CPOTrainer(policy, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    both = trainer.concatenated_inputs(batch, padding_value=tokenizer.pad_token_id)
    answers = both["concatenated_labels"] != -100
    own, tokens = logp(policy, both["concatenated_input_ids"], both["concatenated_attention_mask"], answers)
    assert len(set(tokens["chosen"].tolist())) > 1
    total, metrics = losses.preference(own, {}, w, tokens)
    stored = trainer._stored_metrics["train"]
    assert metrics["chosen_reward_direct"].mean().item() == pytest.approx(stored["rewards/chosen"][-1], rel=1e-4)
    assert metrics["accuracy_direct"].mean().item() == pytest.approx(stored["rewards/accuracies"][-1])
    agree(policy, theirs, total.mean())
