"""How a token is drawn: by inverting its distribution at one number, a hash of the request's seed and the step.

So a request draws the same answer whatever stands beside it in the batch, on any engine that gives the same logits. It
is also faster than the libraries' own samplers on a CPU, which draw a number for each word of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from evolve.config import Sampling

_MASK = 0xFFFFFFFF
_WIDTH = 256  # of the blocks that the vocabulary is summed in: first the block is found, then the token in it


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64: every input bit reaches every output bit."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def uniform(seeds: Tensor, steps: Tensor | int) -> Tensor:
    """Numbers in (0, 1), [rows], float64: a pure function of (a row's 63-bit seed, its step)."""
    low, high = seeds & _MASK, seeds >> 32
    first = _mix(_mix(low ^ (steps * 0x9E3779B9 & _MASK)) ^ high)
    second = _mix(first ^ _mix(high + 0x85EBCA6B & _MASK))
    return ((first << 20 | second >> 12).double() + 0.5) / 2**52


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """The token whose stretch of the cumulative softmax holds a row's number: [rows] from [rows, vocabulary].

    Raises ValueError if the logits are not numbers.
    """
    chances = logits.float().softmax(-1)
    blocks = -(-chances.shape[1] // _WIDTH)
    chances = torch.nn.functional.pad(chances, (0, blocks * _WIDTH - chances.shape[1])).view(-1, blocks, _WIDTH)
    heights = chances.sum(-1, dtype=torch.float64).cumsum(-1)
    if not heights[:, -1].isfinite().all():
        raise ValueError("the model's logits are not numbers: its weights are spoilt")
    wanted = numbers[:, None] * heights[:, -1:]  # rounding may leave the sum a little off 1
    block = torch.searchsorted(heights, wanted, right=True).clamp(max=blocks - 1)
    inside = chances.gather(1, block[:, :, None].expand(-1, -1, _WIDTH)).squeeze(1).cumsum(-1, dtype=torch.float64)
    wanted = wanted - (heights.gather(1, block) - inside[:, -1:])
    # Rounding may leave the number at a block's very end; the last token with a chance is meant then.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    token = torch.minimum(torch.searchsorted(inside, wanted, right=True), last)
    return (block * _WIDTH + token).squeeze(1)


class Sampler:
    """Logits to tokens under `sampling`: [rows] from [rows, vocabulary], seeds [rows] and steps ([rows] or one)."""

    def __init__(self, sampling: Sampling):
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor, seeds: Tensor, steps: Tensor | int) -> Tensor:
        for warp in self.warpers:
            logits = warp(None, logits)
        return draw(logits, uniform(seeds, steps))


def only(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits that leave one token possible in each row: what makes a library's greedy choice the drawn one."""
    return torch.full_like(logits, float("-inf")).scatter_(1, tokens[:, None], 0.0)
