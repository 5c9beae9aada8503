"""Each loss and its gradient against float64 arithmetic written from the equations, without torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolve import losses
from evolve.config import DIRECT_TERMS, PreferenceWeights, SFTWeights

NAMES = losses.DIRECT + losses.REFINE
PAIRS = 3
TOKENS = {"chosen": [3, 7, 12], "rejected": [5, 2, 12]}
numbers = st.floats(-60, 60)
columns = st.lists(numbers, min_size=PAIRS, max_size=PAIRS)
tables = st.fixed_dictionaries({name: columns for name in NAMES})
betas = st.floats(0.01, 2)
directs = st.sampled_from(sorted(losses.DIRECT_LOSSES))
weights = st.builds(
    PreferenceWeights,
    alpha=st.floats(0, 1),
    direct=directs,
    lengths=st.sampled_from(["sum", "mean"]),
    gamma=st.floats(0, 3),
    beta_direct=betas,
    beta_refine=betas,
    refine_contexts=st.sampled_from(["both", "rejected"]),
    refine_scale=st.floats(0.1, 5),
    nll=st.sampled_from([0.0, 0.3]),
)


def tensors(table, grad=False):
    return {name: torch.tensor(values, dtype=torch.float64, requires_grad=grad) for name, values in table.items()}


def loss_of(policy, reference, w, tokens=TOKENS):
    return losses.preference(tensors(policy), tensors(reference), w, tensors(tokens))[0]


def direct_alone(name, lengths="sum", beta=0.3, gamma=0.7):
    return PreferenceWeights(
        alpha=0.0,
        direct=name,
        lengths=lengths,
        gamma=gamma if name == "simpo" else None,
        beta_direct=beta,
        beta_refine=None,
        refine_contexts=None,
        refine_scale=None,
        nll=0.0,
    )


# ---- the equations, and by hand their derivatives


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return np.exp(-softplus(-x))


def direct_reference(s, w):
    """L_direct of what it sees under each name, and its slopes by them."""
    beta, y_w, y_l = w.beta_direct, s["direct_chosen"], s["direct_rejected"]
    if w.direct in ("dpo", "simpo"):
        margin = beta * (y_w - y_l) - (w.gamma if w.direct == "simpo" else 0)
        slope = -beta * sigmoid(-margin)
        return softplus(-margin), {"direct_chosen": slope, "direct_rejected": -slope}
    if w.direct == "ipo":
        distance = (y_w - y_l) - 1 / (2 * beta)
        return distance**2, {"direct_chosen": 2 * distance, "direct_rejected": -2 * distance}
    if w.direct == "sppo":
        above, below = y_w - 1 / (2 * beta), y_l + 1 / (2 * beta)
        return above**2 + below**2, {"direct_chosen": 2 * above, "direct_rejected": 2 * below}
    assert w.direct == "srpo"
    distance = 0.5 - beta / 2 * (y_w - y_l + s["rejected_chosen"] - s["chosen_rejected"])
    plus = ("direct_chosen", "rejected_chosen")
    minus = ("direct_rejected", "chosen_rejected")
    return distance**2, {**{n: -beta * distance for n in plus}, **{n: beta * distance for n in minus}}


def reference_loss(policy, reference, w):
    p = {name: np.array(policy[name]) for name in NAMES}
    h = {name: p[name] - np.array(reference[name]) for name in NAMES}
    tokens = {name: np.array(TOKENS[name.split("_")[1]]) for name in NAMES}
    gradient = {name: np.zeros(PAIRS) for name in NAMES}

    each = {name: 1 / tokens[name] if w.lengths == "mean" else np.ones(PAIRS) for name in NAMES}
    seen = {name: (p if w.direct == "simpo" else h)[name] * each[name] for name in NAMES}
    direct, slopes = direct_reference(seen, w)
    total = (1 - w.alpha) * direct
    for name, slope in slopes.items():
        gradient[name] += (1 - w.alpha) * slope * each[name]

    for context in ("rejected", "chosen") if w.refine_contexts == "both" else ("rejected",):
        distance = 0.5 - w.beta_refine * (h[f"{context}_chosen"] - h[f"{context}_rejected"])
        total = total + w.alpha * w.refine_scale * distance**2
        slope = w.alpha * w.refine_scale * -2 * w.beta_refine * distance
        gradient[f"{context}_chosen"] += slope
        gradient[f"{context}_rejected"] -= slope

    total = total - w.nll * p["direct_chosen"] / tokens["direct_chosen"]
    gradient["direct_chosen"] -= w.nll / tokens["direct_chosen"]
    return total, gradient


@pytest.mark.parametrize("direct", sorted(losses.DIRECT_LOSSES))
@given(tables, tables, weights)
def test_preference_loss_and_gradient(direct, policy, reference, w):
    w = w.model_copy(update={"direct": direct})
    logp = tensors(policy, grad=True)
    total, metrics = losses.preference(logp, tensors(reference), w, tensors(TOKENS))
    expected, gradient = reference_loss(policy, reference, w)
    np.testing.assert_allclose(total.detach(), expected, rtol=1e-9, atol=1e-9)
    total.sum().backward()
    for name in NAMES:
        found = np.zeros(PAIRS) if logp[name].grad is None else logp[name].grad.numpy()
        np.testing.assert_allclose(found, gradient[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert not any(value.requires_grad for value in metrics.values())


@given(tables, tables, weights)
def test_metrics_are_the_terms(policy, reference, w):
    total, m = losses.preference(tensors(policy), tensors(reference), w, tensors(TOKENS))
    squares = m["loss_refine_rejected"] + m.get("loss_refine_chosen", 0)
    nll = w.nll * m["loss_nll"] if w.nll else 0
    torch.testing.assert_close(total, (1 - w.alpha) * m["loss_direct"] + w.alpha * squares + nll)
    assert ("loss_refine_chosen" in m) == (w.refine_contexts == "both")
    assert ("loss_nll" in m) == (w.nll > 0)


@given(tables, tables, weights)
def test_rewards_margins_and_accuracies(policy, reference, w):
    _, m = losses.preference(tensors(policy), tensors(reference), w, tensors(TOKENS))
    for term in ("direct", "refine_rejected", "refine_chosen"):
        if f"loss_{term}" not in m:
            assert not [name for name in m if name.endswith(term)]
            continue
        context, beta = term.split("_")[-1], w.beta_direct if term == "direct" else w.beta_refine
        rewards = {}
        for answer in ("chosen", "rejected"):
            value = np.array(policy[f"{context}_{answer}"])
            if not (term == "direct" and w.direct == "simpo"):
                value = value - np.array(reference[f"{context}_{answer}"])
            if term == "direct" and w.lengths == "mean":
                value = value / np.array(TOKENS[answer])
            rewards[answer] = beta * value
            np.testing.assert_allclose(m[f"{answer}_reward_{term}"], rewards[answer], rtol=1e-9, atol=1e-9)
        margin = m[f"chosen_reward_{term}"] - m[f"rejected_reward_{term}"]
        assert torch.equal(m[f"margin_{term}"], margin)
        assert torch.equal(m[f"accuracy_{term}"], (margin > 0).double())


# ---- the first step

AT_REFERENCE = {
    "dpo": lambda beta: math.log(2),
    "ipo": lambda beta: 1 / (4 * beta**2),
    "sppo": lambda beta: 2 * (1 / (2 * beta)) ** 2,
    "srpo": lambda beta: 1 / 4,
}


@given(tables, weights)
def test_at_the_reference_terms_are_exact(policy, w):
    logp = tensors(policy)
    _, metrics = losses.preference(logp, logp, w, tensors(TOKENS))
    expected = losses.at_reference(w)
    terms = {"loss_direct", "loss_refine_rejected"} - ({"loss_direct"} if w.direct == "simpo" else set())
    assert expected.keys() == terms | ({"loss_refine_chosen"} if w.refine_contexts == "both" else set())
    for name, value in expected.items():
        by_hand = AT_REFERENCE[w.direct](w.beta_direct) if name == "loss_direct" else w.refine_scale / 4
        assert value == pytest.approx(by_hand, rel=1e-12)
        torch.testing.assert_close(metrics[name], torch.full_like(metrics[name], value), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lengths", ["sum", "mean"])
@pytest.mark.parametrize(("direct", "value"), [("dpo", math.log(2)), ("ipo", 6.25), ("sppo", 12.5), ("srpo", 0.25)])
def test_first_step_in_numbers(direct, value, lengths):
    assert losses.at_reference(direct_alone(direct, lengths, beta=0.2)) == {"loss_direct": pytest.approx(value)}


def test_without_reference_there_is_no_first_value():
    assert losses.at_reference(direct_alone("simpo", "mean")) == {}


# ---- properties


@given(tables, tables, weights, st.floats(-30, 30))
def test_a_shift_of_policy_and_reference_together_changes_nothing(policy, reference, w, shift):
    w = w.model_copy(update={"nll": 0.0})  # the one term that is not relative to the reference, beside SimPO
    if w.direct == "simpo":
        w = w.model_copy(update={"direct": "dpo"})
    moved = [{name: [value + shift for value in table[name]] for name in NAMES} for table in (policy, reference)]
    torch.testing.assert_close(loss_of(*moved, w), loss_of(policy, reference, w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direct", ["dpo", "ipo", "simpo", "srpo"])
@given(tables, tables, st.floats(-30, 30))
def test_a_constant_on_both_answers_of_a_context_changes_no_paired_loss(direct, policy, reference, shift):
    """SPPO alone asks for each answer's own value."""
    w = direct_alone(direct)
    moved = {name: [value + shift * name.startswith("direct") for value in policy[name]] for name in NAMES}
    torch.testing.assert_close(loss_of(moved, reference, w), loss_of(policy, reference, w), rtol=1e-9, atol=1e-9)


@given(tables, tables, st.floats(1, 30))
def test_a_constant_on_both_answers_changes_sppo(policy, reference, shift):
    """By 2 shift (h_w + h_l) + 2 shift^2: the targets are +-1 / (2 beta), whose sum is 0."""
    w = direct_alone("sppo")
    moved = {name: [value + shift for value in policy[name]] for name in NAMES}
    h = {name: np.array(policy[name]) - np.array(reference[name]) for name in losses.DIRECT}
    difference = 2 * shift * (h["direct_chosen"] + h["direct_rejected"]) + 2 * shift**2
    found = loss_of(moved, reference, w) - loss_of(policy, reference, w)
    np.testing.assert_allclose(found, difference, rtol=1e-7, atol=1e-7)


SWAPPED = {
    "direct_chosen": "direct_rejected",
    "direct_rejected": "direct_chosen",
    "rejected_chosen": "chosen_rejected",
    "chosen_rejected": "rejected_chosen",
    "rejected_rejected": "chosen_chosen",
    "chosen_chosen": "rejected_rejected",
}


@pytest.mark.parametrize("direct", sorted(losses.DIRECT_LOSSES))
@given(tables, betas)
def test_what_swapping_the_answers_does(direct, policy, beta):
    """softplus(-m) - softplus(m) = -m; a square around a target t loses 4 t m; SPPO's two squares 2 (h_w - h_l) / beta.

    SRPO's margin and target are both half as large.
    """
    w = direct_alone(direct, beta=beta, gamma=0.0)
    zeros = {name: [0.0] * PAIRS for name in NAMES}
    swapped = {name: policy[other] for name, other in SWAPPED.items()}
    p = {name: np.array(values) for name, values in policy.items()}
    margin = p["direct_chosen"] - p["direct_rejected"]
    if direct == "srpo":
        margin = margin + p["rejected_chosen"] - p["chosen_rejected"]
    by_hand = {
        "dpo": -beta * margin,
        "simpo": -beta * margin,
        "ipo": -2 * margin / beta,
        "sppo": -2 * margin / beta,
        "srpo": -beta * margin,
    }
    difference = loss_of(policy, zeros, w) - loss_of(swapped, zeros, w)
    np.testing.assert_allclose(difference, by_hand[direct], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("direct", ["dpo", "simpo"])
@given(columns, st.floats(0.1, 20), betas)
def test_log_sigmoids_fall_as_the_margin_grows(direct, chosen, more, beta):
    w = direct_alone(direct, beta=beta)
    zeros = {name: [0.0] * PAIRS for name in NAMES}
    low, high = ({**zeros, "direct_chosen": [value + step for value in chosen]} for step in (0.0, more))
    assert (loss_of(high, zeros, w) <= loss_of(low, zeros, w)).all()
    assert (loss_of(low, zeros, w) >= 0).all()


@pytest.mark.parametrize("direct", ["ipo", "sppo", "srpo"])
@given(st.floats(-30, 30), betas)
def test_squares_are_least_at_their_target(direct, away, beta):
    w = direct_alone(direct, beta=beta)
    target = {"ipo": (0.5 / beta, 0.0), "sppo": (0.5 / beta, -0.5 / beta), "srpo": (1 / beta, 0.0)}[direct]
    best = {name: [0.0] * PAIRS for name in NAMES} | {
        name: [value] * PAIRS for name, value in zip(losses.DIRECT, target, strict=True)
    }
    zeros = {name: [0.0] * PAIRS for name in NAMES}
    logp = tensors(best, grad=True)
    total, _ = losses.preference(logp, tensors(zeros), w, tensors(TOKENS))
    np.testing.assert_allclose(total.detach(), 0, atol=1e-20)
    total.sum().backward()
    for name in (*losses.DIRECT, *DIRECT_TERMS[direct].refines):
        np.testing.assert_allclose(logp[name].grad, 0, atol=1e-10)
    off = best | {"direct_chosen": [value + away for value in best["direct_chosen"]]}
    factor = (beta / 2) ** 2 if direct == "srpo" else 1
    np.testing.assert_allclose(loss_of(off, zeros, w), factor * away**2, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("direct", sorted(losses.DIRECT_LOSSES))
@given(tables, tables, st.integers(1, 50))
def test_means_are_sums_over_lengths(direct, policy, reference, length):
    """Sums of answers of equal length, divided by it, are what the means give; and length 1 makes no difference."""
    tokens = {answer: [length] * PAIRS for answer in TOKENS}
    divided = [{name: [value / length for value in table[name]] for name in NAMES} for table in (policy, reference)]
    found = loss_of(policy, reference, direct_alone(direct, "mean"), tokens)
    torch.testing.assert_close(found, loss_of(*divided, direct_alone(direct, "sum"), tokens), rtol=1e-9, atol=1e-9)


@given(tables, tables, betas, st.floats(0.1, 10))
def test_beta_is_a_unit(policy, reference, beta, factor):
    """Log-probabilities `factor` times as large under a beta as many times smaller: DPO, SimPO, SRPO and the refinement
    loss don't see it; IPO and SPPO are factor^2 times as large."""
    scaled = [{name: [value * factor for value in table[name]] for name in NAMES} for table in (policy, reference)]
    for direct in losses.DIRECT_LOSSES:
        times = factor**2 if direct in ("ipo", "sppo") else 1.0
        found = loss_of(*scaled, direct_alone(direct, beta=beta / factor))
        expected = times * loss_of(policy, reference, direct_alone(direct, beta=beta))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@given(tables, tables, weights, st.permutations(range(PAIRS)))
def test_a_pair_does_not_see_its_batch(policy, reference, w, order):
    """Each pair's loss is the same alone and wherever it stands, so the sum over a batch is, too."""
    whole = loss_of(policy, reference, w)
    mixed = [{name: [values[n] for n in order] for name, values in table.items()} for table in (policy, reference)]
    tokens = {answer: [values[n] for n in order] for answer, values in TOKENS.items()}
    assert torch.equal(loss_of(*mixed, w, tokens), whole[torch.tensor(order)])
    for n in range(PAIRS):
        one = [{name: values[n : n + 1] for name, values in table.items()} for table in (policy, reference)]
        alone = loss_of(*one, w, {answer: values[n : n + 1] for answer, values in TOKENS.items()})
        torch.testing.assert_close(alone, whole[n : n + 1], rtol=1e-12, atol=1e-12)


# ---- which sequences


@pytest.mark.parametrize("direct", sorted(losses.DIRECT_LOSSES))
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("contexts", ["both", "rejected"])
@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_needed_is_enough_and_no_more(direct, alpha, contexts, nll):
    """Idle settings are None, as Loss.preference makes them; every name asked for carries a gradient."""
    w = PreferenceWeights(
        alpha=alpha,
        direct=direct if alpha < 1 else None,
        lengths="mean" if alpha < 1 else None,
        gamma=0.5 if alpha < 1 and direct == "simpo" else None,
        beta_direct=0.1 if alpha < 1 else None,
        beta_refine=0.2 if alpha > 0 else None,
        refine_contexts=contexts if alpha > 0 else None,
        refine_scale=1.0 if alpha > 0 else None,
        nll=nll,
    )
    names, of_reference = losses.needed(w), losses.needed_of_reference(w)
    logp = tensors({name: [-1.0, -2.0, -3.0] for name in names}, grad=True)
    reference = tensors({name: [0.0] * PAIRS for name in of_reference})
    total, _ = losses.preference(logp, reference, w, tensors(TOKENS))
    total.sum().backward()
    assert [name for name in names if logp[name].grad is None] == []
    for name in of_reference:
        without = {other: value for other, value in reference.items() if other != name}
        with pytest.raises(KeyError, match=name):
            losses.preference(logp, without, w, tensors(TOKENS))
    contexts_of = {"direct" if name in losses.DIRECT else "refine" for name in of_reference}
    assert contexts_of == set(w.reference_contexts)  # which stages the plan makes


# ---- SFT


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
