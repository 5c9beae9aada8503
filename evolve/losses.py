"""The losses, as pure functions of log-probabilities. [tags: conf/config.yaml]

Notation: h = log pi(answer | context) - log pi_ref(answer | context), log-probabilities summed over the answer's
tokens. w is the chosen answer, l the rejected one. Everything is per pair, shape [pairs]; nothing here knows of models,
tokens or batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from evolve.config import PreferenceWeights, SFTWeights

# A pair's sequences: (what the context shows besides the prompt, whose answer is asked for).
DIRECT = ("direct_chosen", "direct_rejected")
REFINE = (
    "rejected_chosen",  # log pi(y_w | x, y_l, z)
    "rejected_rejected",  # log pi(y_l | x, y_l, z)
    "chosen_chosen",  # log pi(y_w | x, y_w, z)
    "chosen_rejected",  # log pi(y_l | x, y_w, z)
)


def dpo(h_w: Tensor, h_l: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (h_w - h_l)): the direct loss [indirect]; log 2 where the policy is the reference."""
    return -logsigmoid(beta * (h_w - h_l))


def refine(h_w: Tensor, h_l: Tensor, beta: float, scale: float = 1.0) -> Tensor:
    """scale (1/2 - beta (h_w - h_l))^2: one context's refinement term [indirect]; scale / 4 at the reference."""
    return scale * (0.5 - beta * (h_w - h_l)) ** 2


def preference(
    policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], loss: PreferenceWeights, lengths: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - alpha) L_DPO + alpha L_refine + nll L_NLL, and what is worth logging.

    Args:
        policy: log-probabilities [pairs] of this step's weights under the names of DIRECT and REFINE; those of a term
            whose weight is 0 may be absent.
        reference: the same under the reference model.
        lengths: tokens [pairs] of the chosen answers; the NLL term is per token.

    Returns:
        The loss [pairs], and detached metrics [pairs] by name.
    """
    if loss.direct not in ("dpo", None):
        raise NotImplementedError(f"loss.direct={loss.direct}: not built yet; dpo is")
    h = {name: policy[name] - reference[name] for name in policy}
    total = torch.zeros_like(next(iter(h.values())))
    metrics: dict[str, Tensor] = {}
    if loss.beta_direct is not None:
        metrics["loss_direct"] = dpo(h["direct_chosen"], h["direct_rejected"], loss.beta_direct)
        total = total + (1 - loss.alpha) * metrics["loss_direct"]
        metrics["margin_direct"] = loss.beta_direct * (h["direct_chosen"] - h["direct_rejected"])
    if loss.beta_refine is not None and loss.refine_scale is not None:
        squares = refine(h["rejected_chosen"], h["rejected_rejected"], loss.beta_refine, loss.refine_scale)
        metrics["loss_refine_rejected"] = squares
        if loss.refine_contexts == "both":
            kept = refine(h["chosen_chosen"], h["chosen_rejected"], loss.beta_refine, loss.refine_scale)
            metrics["loss_refine_chosen"] = kept
            squares = squares + kept
        total = total + loss.alpha * squares
        metrics["margin_refine"] = loss.beta_refine * (h["rejected_chosen"] - h["rejected_rejected"])
    if loss.nll > 0:
        metrics["loss_nll"] = -policy["direct_chosen"] / lengths
        total = total + loss.nll * metrics["loss_nll"]
    return total, {name: value.detach() for name, value in metrics.items()}


def needed(loss: PreferenceWeights) -> tuple[str, ...]:
    """The sequences that preference training with these weights has to run through the policy."""
    names: tuple[str, ...] = ()
    if "direct" in loss.contexts:
        names += DIRECT
    if "refine" in loss.contexts:
        names += REFINE if loss.refine_contexts == "both" else REFINE[:2]
    return names


def at_reference(loss: PreferenceWeights) -> dict[str, float]:
    """What each term must be, exactly, while the policy is the reference: log 2, and scale / 4."""
    from math import log

    square = (loss.refine_scale or 0) / 4
    return {"loss_direct": log(2), "loss_refine_rejected": square, "loss_refine_chosen": square}


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
