"""The losses, as pure functions of log-probabilities. [tags: conf/config.yaml]

Notation: h = log pi(answer | context) - log pi_ref(answer | context), log-probabilities summed over the answer's
tokens, or their mean where `lengths` says so. w is the chosen answer, l the rejected one. Everything is per pair, shape
[pairs], but for SFT, which is per token; nothing here knows of models or devices.

TRL writes the same equations inside its trainers' steps, where they can't be called apart from the trainer;
tests/test_losses_trl.py holds ours equal to theirs, wherever TRL has the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from evolve.config import DIRECT_TERMS, PreferenceWeights, SFTWeights

# A pair's sequences: (what the context shows besides the prompt, whose answer is asked for).
DIRECT = ("direct_chosen", "direct_rejected")
REFINE = (
    "rejected_chosen",  # log pi(y_w | x, y_l, z)
    "rejected_rejected",  # log pi(y_l | x, y_l, z)
    "chosen_chosen",  # log pi(y_w | x, y_w, z)
    "chosen_rejected",  # log pi(y_l | x, y_w, z)
)


def dpo(h_w: Tensor, h_l: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (h_w - h_l)): DPO (2305.18290), the method's direct loss [indirect]. log 2 at the reference."""
    return -logsigmoid(beta * (h_w - h_l))


def ipo(h_w: Tensor, h_l: Tensor, beta: float) -> Tensor:
    """(h_w - h_l - 1 / (2 beta))^2: IPO (2310.12036, eq. 17; its tau is beta). 1 / (4 beta^2) at the reference."""
    return (h_w - h_l - 1 / (2 * beta)) ** 2


def simpo(logp_w: Tensor, logp_l: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (logp_w - logp_l) - gamma): SimPO (2405.14734, eq. 6), of means and with no reference."""
    return -logsigmoid(beta * (logp_w - logp_l) - gamma)


def sppo(h_w: Tensor, h_l: Tensor, beta: float) -> Tensor:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2: SPPO (2405.00675, eq. 4.7), 1 / (2 beta^2) at the reference.

    beta is 1 / eta, and the chosen answer is taken to win with certainty, as in TRL's `sppo_hard`.
    """
    return (h_w - 1 / (2 * beta)) ** 2 + (h_l + 1 / (2 * beta)) ** 2


def srpo_generation(h_w: Tensor, h_l: Tensor, h_w_after_l: Tensor, h_l_after_w: Tensor, beta: float) -> Tensor:
    """(1/2 - beta/2 [h_w - h_l + h(y_w|x,y_l,z) - h(y_l|x,y_w,z)])^2: SRPO's L_gen (2406.01660) [reconstructed].

    1/4 at the reference. SRPO is this and `refine`, mixed by alpha.
    """
    return (0.5 - beta / 2 * (h_w - h_l + h_w_after_l - h_l_after_w)) ** 2


def refine(h_w: Tensor, h_l: Tensor, beta: float, scale: float = 1.0) -> Tensor:
    """scale (1/2 - beta (h_w - h_l))^2: one context's refinement term [indirect]; scale / 4 at the reference."""
    return scale * (0.5 - beta * (h_w - h_l)) ** 2


# Of what its sequences have (h, or the policy's own logp), then of its settings: as config.DIRECT_TERMS says.
DIRECT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "sppo": sppo,
    "srpo": srpo_generation,
}


def preference(
    policy: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    loss: PreferenceWeights,
    tokens: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - alpha) L_direct + alpha L_refine + nll L_NLL, and what is worth logging.

    Args:
        policy: log-probabilities [pairs], summed over the answers' tokens, of this step's weights, under the names
            that `needed` gives.
        reference: the same under the reference model, under the names that `needed_of_reference` gives.
        tokens: the answers' lengths [pairs] in tokens, under 'chosen' and 'rejected'. The NLL term is per token.

    Returns:
        The loss [pairs], and detached metrics [pairs] by name: each term's `loss_*`, and for `direct`,
        `refine_rejected` and `refine_chosen` (which answer the context shows) `chosen_reward_*`, `rejected_reward_*`
        (beta h, of what the loss sees), their `margin_*`, `accuracy_*` (1 where the margin is positive), and `kl_*`:
        -h in nats an answer, which estimates KL(reference || policy) where the reference made the answers.
    """
    total = torch.zeros_like(next(iter(policy.values())))
    metrics: dict[str, Tensor] = {}
    h = {name: policy[name] - reference[name] for name in needed_of_reference(loss)}

    def note_rewards(name: str, chosen: Tensor, rejected: Tensor) -> None:
        metrics[f"chosen_reward_{name}"], metrics[f"rejected_reward_{name}"] = chosen, rejected
        metrics[f"margin_{name}"] = chosen - rejected
        metrics[f"accuracy_{name}"] = (chosen > rejected).to(chosen.dtype)

    if loss.direct is not None and loss.beta_direct is not None:
        term = DIRECT_TERMS[loss.direct]
        names = (*DIRECT, *term.refines)
        seen = [(h if term.relative else policy)[name] for name in names]
        if loss.lengths == "mean":
            seen = [value / tokens[name.split("_")[1]] for name, value in zip(names, seen, strict=True)]
        given = [getattr(loss, name) for name in term.settings]
        metrics["loss_direct"] = DIRECT_LOSSES[loss.direct](*seen, *given)
        total = total + (1 - loss.alpha) * metrics["loss_direct"]
        note_rewards("direct", loss.beta_direct * seen[0], loss.beta_direct * seen[1])
    if loss.beta_refine is not None and loss.refine_scale is not None:
        for context in ("rejected", "chosen") if loss.refine_contexts == "both" else ("rejected",):
            h_w, h_l = h[f"{context}_chosen"], h[f"{context}_rejected"]
            metrics[f"loss_refine_{context}"] = refine(h_w, h_l, loss.beta_refine, loss.refine_scale)
            total = total + loss.alpha * metrics[f"loss_refine_{context}"]
            note_rewards(f"refine_{context}", loss.beta_refine * h_w, loss.beta_refine * h_l)
    if loss.nll > 0:
        metrics["loss_nll"] = -policy["direct_chosen"] / tokens["chosen"]
        total = total + loss.nll * metrics["loss_nll"]
    for context in ("direct", "rejected", "chosen"):
        if f"{context}_chosen" in h and f"{context}_rejected" in h:
            name = "direct" if context == "direct" else f"refine_{context}"
            metrics[f"kl_{name}"] = -(h[f"{context}_chosen"] + h[f"{context}_rejected"]) / 2
    return total, {name: value.detach() for name, value in metrics.items()}


def needed(loss: PreferenceWeights) -> tuple[str, ...]:
    """The sequences that preference training with these weights has to run through the policy."""
    names = set(needed_of_reference(loss))
    if loss.direct is not None:
        names.update(DIRECT, DIRECT_TERMS[loss.direct].refines)
    if loss.nll > 0:
        names.add("direct_chosen")
    return tuple(name for name in DIRECT + REFINE if name in names)


def needed_of_reference(loss: PreferenceWeights) -> tuple[str, ...]:
    """Those of which the reference model's log-probabilities are needed too."""
    names: set[str] = set()
    if loss.direct is not None and DIRECT_TERMS[loss.direct].relative:
        names.update(DIRECT, DIRECT_TERMS[loss.direct].refines)
    if loss.beta_refine is not None:
        names.update(REFINE if loss.refine_contexts == "both" else REFINE[:2])
    return tuple(name for name in DIRECT + REFINE if name in names)


def at_reference(loss: PreferenceWeights) -> dict[str, float]:
    """What each `loss_*` must be, exactly, while the policy is the reference; a term without a reference has no such
    value."""
    zeros = {name: torch.zeros(1, dtype=torch.float64) for name in needed(loss)}
    ones = {answer: torch.ones(1) for answer in ("chosen", "rejected")}
    _, metrics = preference(zeros, zeros, loss, ones)
    known = [f"loss_refine_{context}" for context in ("rejected", "chosen")]
    if loss.direct is not None and DIRECT_TERMS[loss.direct].relative:
        known.append("loss_direct")
    return {name: metrics[name].item() for name in known if name in metrics}


def sft(logp: Mapping[str, Tensor], loss: SFTWeights, tokens: float) -> Tensor:
    """L_SFT = -[w_direct log pi(y_w|x) + w_refine log pi(y_w|x,y_l,z)] [indirect], a scalar.

    Each term is a sum over the step's answer tokens divided by their number [reconstructed: the field's habit].

    Args:
        logp: [pairs] under 'direct_chosen' and 'rejected_chosen', for the terms whose weight is not 0.
        tokens: answer tokens of one term in the whole optimiser step, over all micro-batches and devices.
    """
    total = torch.zeros(())
    for name, weight in (("direct_chosen", loss.direct), ("rejected_chosen", loss.refine)):
        if weight > 0:
            total = total - weight * logp[name].sum() / tokens
    return total
