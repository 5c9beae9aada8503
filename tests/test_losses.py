"""Each loss and its gradient against float64 arithmetic written from the equations, without torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolve import losses
from evolve.config import PreferenceWeights, SFTWeights

NAMES = losses.DIRECT + losses.REFINE
PAIRS = 3
numbers = st.floats(-60, 60)
columns = st.lists(numbers, min_size=PAIRS, max_size=PAIRS)
tables = st.fixed_dictionaries({name: columns for name in NAMES})
betas = st.floats(0.01, 2)
weights = st.builds(
    PreferenceWeights,
    alpha=st.floats(0, 1),
    beta_direct=betas,
    beta_refine=betas,
    refine_contexts=st.sampled_from(["both", "rejected"]),
    refine_scale=st.floats(0.1, 5),
    nll=st.sampled_from([0.0, 0.3]),
)
LENGTHS = [3, 7, 12]


def tensors(table, grad=False):
    return {name: torch.tensor(values, dtype=torch.float64, requires_grad=grad) for name, values in table.items()}


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return np.exp(-softplus(-x))


def reference_loss(policy, reference, w):
    """The equations and, by hand, their derivatives by each of the policy's log-probabilities."""
    p = {name: np.array(policy[name]) for name in NAMES}
    h = {name: p[name] - np.array(reference[name]) for name in NAMES}
    gradient = {name: np.zeros(PAIRS) for name in NAMES}

    margin = w.beta_direct * (h["direct_chosen"] - h["direct_rejected"])
    total = (1 - w.alpha) * softplus(-margin)
    slope = (1 - w.alpha) * -sigmoid(-margin) * w.beta_direct
    gradient["direct_chosen"] += slope
    gradient["direct_rejected"] -= slope

    for context in ("rejected", "chosen") if w.refine_contexts == "both" else ("rejected",):
        distance = 0.5 - w.beta_refine * (h[f"{context}_chosen"] - h[f"{context}_rejected"])
        total = total + w.alpha * w.refine_scale * distance**2
        slope = w.alpha * w.refine_scale * -2 * w.beta_refine * distance
        gradient[f"{context}_chosen"] += slope
        gradient[f"{context}_rejected"] -= slope

    total = total - w.nll * p["direct_chosen"] / LENGTHS
    gradient["direct_chosen"] -= w.nll / np.array(LENGTHS)
    return total, gradient


@given(tables, tables, weights)
def test_preference_loss_and_gradient(policy, reference, w):
    logp = tensors(policy, grad=True)
    total, metrics = losses.preference(logp, tensors(reference), w, torch.tensor(LENGTHS))
    expected, gradient = reference_loss(policy, reference, w)
    np.testing.assert_allclose(total.detach(), expected, rtol=1e-9, atol=1e-9)
    total.sum().backward()
    for name in NAMES:
        found = np.zeros(PAIRS) if logp[name].grad is None else logp[name].grad.numpy()
        np.testing.assert_allclose(found, gradient[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert not any(value.requires_grad for value in metrics.values())


@given(tables, weights)
def test_metrics_are_the_terms(policy, w):
    logp = tensors(policy)
    total, m = losses.preference(logp, tensors({name: [0.0] * PAIRS for name in NAMES}), w, torch.tensor(LENGTHS))
    squares = m["loss_refine_rejected"] + m.get("loss_refine_chosen", 0)
    nll = w.nll * m["loss_nll"] if w.nll else 0
    torch.testing.assert_close(total, (1 - w.alpha) * m["loss_direct"] + w.alpha * squares + nll)
    torch.testing.assert_close(m["loss_direct"], -torch.log(torch.sigmoid(m["margin_direct"])), rtol=1e-6, atol=1e-6)
    assert ("loss_refine_chosen" in m) == (w.refine_contexts == "both")
    assert ("loss_nll" in m) == (w.nll > 0)


@given(tables, weights)
def test_at_the_reference_terms_are_exact(policy, w):
    logp = tensors(policy)
    _, metrics = losses.preference(logp, logp, w, torch.tensor(LENGTHS))
    expected = losses.at_reference(w)
    assert expected["loss_direct"] == math.log(2)
    assert expected["loss_refine_rejected"] == expected["loss_refine_chosen"] == w.refine_scale / 4
    for name in expected.keys() & metrics.keys():
        torch.testing.assert_close(metrics[name], torch.full_like(metrics[name], expected[name]), rtol=0, atol=1e-15)


@given(tables, tables, weights, st.floats(-30, 30))
def test_a_shift_of_policy_and_reference_together_changes_nothing(policy, reference, w, shift):
    w = w.model_copy(update={"nll": 0.0})  # the one term that is not relative to the reference
    moved = [{name: [value + shift for value in table[name]] for name in NAMES} for table in (policy, reference)]
    lengths = torch.tensor(LENGTHS)
    before, _ = losses.preference(tensors(policy), tensors(reference), w, lengths)
    after, _ = losses.preference(tensors(moved[0]), tensors(moved[1]), w, lengths)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@given(columns, columns, betas)
def test_swapped_answers_make_up_the_margin(chosen, rejected, beta):
    """softplus(-m) - softplus(m) = -m."""
    w, l_ = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    difference = losses.dpo(w, l_, beta) - losses.dpo(l_, w, beta)
    torch.testing.assert_close(difference, -beta * (w - l_), rtol=1e-9, atol=1e-9)
    assert (losses.dpo(w, l_, beta) >= 0).all()


@given(betas, st.floats(0.1, 5), numbers, numbers)
def test_refine_is_least_where_the_margin_is_one_half(beta, scale, rejected, away):
    l_ = torch.tensor([rejected], dtype=torch.float64)
    best = (l_ + 0.5 / beta).requires_grad_()
    least = losses.refine(best, l_, beta, scale)
    least.backward()
    assert least.item() == pytest.approx(0, abs=1e-20)
    assert best.grad.item() == pytest.approx(0, abs=1e-10)
    found = losses.refine(best.detach() + away, l_, beta, scale).item()
    assert found == pytest.approx(scale * (beta * away) ** 2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("contexts", ["both", "rejected"])
@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_needed_is_enough_and_no_more(alpha, contexts, nll):
    """Idle settings are None, as Loss.preference makes them; every name asked for carries a gradient."""
    w = PreferenceWeights(
        alpha=alpha,
        direct="dpo" if alpha < 1 else None,
        lengths="sum" if alpha < 1 else None,
        gamma=None,
        beta_direct=0.1 if alpha < 1 else None,
        beta_refine=0.2 if alpha > 0 else None,
        refine_contexts=contexts if alpha > 0 else None,
        refine_scale=1.0 if alpha > 0 else None,
        nll=nll,
    )
    names = losses.needed(w)
    logp = tensors({name: [-1.0, -2.0, -3.0] for name in names}, grad=True)
    total, _ = losses.preference(logp, tensors({name: [0.0] * PAIRS for name in names}), w, torch.tensor(LENGTHS))
    total.sum().backward()
    without = {name for name in names if logp[name].grad is None}
    assert without <= ({"direct_rejected"} if alpha == 1 else set())  # nll alone takes one of the two direct ones


@given(columns, columns, st.floats(0, 3), st.floats(0, 3), st.integers(1, 100))
def test_sft_loss_and_gradient(direct, refined, a, b, tokens):
    logp = tensors({"direct_chosen": direct, "rejected_chosen": refined}, grad=True)
    loss = losses.sft(logp, SFTWeights(direct=a, refine=b), tokens)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-(a * sum(direct) + b * sum(refined)) / tokens, rel=1e-9, abs=1e-9)
    if a or b:
        loss.backward()
    for values, weight in ((logp["direct_chosen"], a), (logp["rejected_chosen"], b)):
        expected = np.full(PAIRS, -weight / tokens)
        np.testing.assert_allclose(values.grad if weight else np.zeros(PAIRS), expected, rtol=1e-12)


@pytest.mark.parametrize(("weights", "name"), [((1.0, 0.0), "direct_chosen"), ((0.0, 1.0), "rejected_chosen")])
def test_sft_asks_for_no_term_without_weight(weights, name):
    loss = losses.sft(tensors({name: [-4.0, -2.0]}), SFTWeights(direct=weights[0], refine=weights[1]), 3)
    assert loss.item() == 2.0
