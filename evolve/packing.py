"""Sequences that share beginnings, run through a model with every shared token once: a forest laid out in one row.

The six sequences of a pair repeat long contexts. Sorted, they are the paths of a prefix tree, and the order in which
such a list meets its tokens is the row that the model sees: a token's position is its depth, and it attends to its
ancestors and itself alone. One number a token says it all: `end`, the place behind its last descendant. Token j is
an ancestor of token i, or i itself, exactly where j <= i < end[j]. Sequences that share nothing are plain packing.

`attention` is what attends by that rule. It is registered with transformers as ATTENTION, so that every model whose
attention goes through transformers' interface can be run this way, and knows nothing of preference pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "evolve_forest"

# Trees up to this many tokens attend in one padded call for all of them; longer ones branch by branch. The first
# computes more and calls less.
SMALL_TREE = 256

FLEX = ("cuda",)  # where FlexAttention has gradients


@dataclass(frozen=True)
class Forest:
    """Token sequences laid out in one row, each shared beginning once.

    input_ids, positions, end: [tokens]. paths: each sequence's tokens by their places in the row, in the order that
    the sequences were given in. trees: where each tree starts and ends.
    """

    input_ids: Tensor
    positions: Tensor
    end: Tensor
    paths: tuple[tuple[int, ...], ...]
    trees: tuple[tuple[int, int], ...]


def plant(groups: Sequence[Sequence[Sequence[int]]]) -> Forest:
    """A forest of groups of sequences; sequences share what they begin with inside their group."""
    input_ids: list[int] = []
    positions: list[int] = []
    end: list[int] = []
    paths: list[tuple[int, ...]] = []
    trees: list[tuple[int, int]] = []
    for group in groups:
        first = len(input_ids)
        placed: dict[int, tuple[int, ...]] = {}
        path: list[int] = []
        before: Sequence[int] = ()
        # Sorted, sequences with a common beginning are neighbours, so a branch once left is never met again.
        for number in sorted(range(len(group)), key=lambda number: tuple(group[number])):
            ids = group[number]
            shared = _common(before, ids)
            for place in path[shared:]:
                end[place] = len(input_ids)
            if path and not shared:
                trees.append((first, len(input_ids)))
                first = len(input_ids)
            new = range(len(input_ids), len(input_ids) + len(ids) - shared)
            path = [*path[:shared], *new]
            input_ids += ids[shared:]
            positions += range(shared, len(ids))
            end += new  # filled in where the branch is left
            placed[number], before = tuple(path), ids
        for place in path:
            end[place] = len(input_ids)
        trees.append((first, len(input_ids)))
        paths += [placed[number] for number in range(len(group))]
    return Forest(torch.tensor(input_ids), torch.tensor(positions), torch.tensor(end), tuple(paths), tuple(trees))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share at their start."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def visible(forest: Forest, window: int | None = None) -> Tensor:
    """The whole mask, [tokens, tokens]: which token (column) a token (row) attends to. The rule in full, for tests."""
    places = torch.arange(len(forest.end))
    mask = (places[None, :] <= places[:, None]) & (places[:, None] < forest.end[None, :])
    if window is not None:
        mask &= forest.positions[:, None] - forest.positions[None, :] < window
    return mask


@dataclass(frozen=True)
class Branch:
    """A run of tokens without a fork: its place in the row, and where its ancestors' runs are."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]


def branches(forest: Forest) -> list[Branch]:
    """The row cut where `end` changes: each piece attends to its ancestors' pieces wholly, and to itself causally."""
    end = forest.end.tolist()
    found: list[Branch] = []
    open_: list[tuple[int, int]] = []
    start = 0
    for place in range(1, len(end) + 1):
        if place == len(end) or end[place] != end[place - 1]:
            while open_ and end[open_[-1][0]] <= start:
                open_.pop()
            found.append(Branch(start, place, tuple(open_)))
            open_.append((start, place))
            start = place
    return found


@dataclass
class Layout:
    """How a forest's tokens attend, made once a batch and read by every layer."""

    forest: Forest
    device: torch.device
    _parts: dict[Any, Any] = field(default_factory=dict)  # masks and indices, made when first asked for

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [1, heads, tokens, size], key and value the same with their own number of heads -> like query.

        Raises ValueError for what this device can't do.
        """
        if window is not None and window > int(self.forest.positions.max()):
            window = None
        if self.device.type in FLEX:
            return self._flex(module, query, key, value, window, scaling=scale, dropout=dropout, softcap=softcap)
        if softcap is not None:
            raise ValueError("this model caps its attention scores, which needs a GPU here; set trainer.layout=padded")
        small = max(stop - start for start, stop in self.forest.trees) <= SMALL_TREE
        attend = self._trees if small else self._branches
        grouped = key.shape[1] != query.shape[1]
        return attend(query, key, value, window, scale=scale, dropout_p=dropout, enable_gqa=grouped)

    def _flex(self, module: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """FlexAttention: blocks of the mask that hold nothing are not computed."""
        from torch.nn.attention.flex_attention import create_block_mask
        from transformers.integrations.flex_attention import flex_attention_forward

        def make() -> Any:
            end, positions = self.forest.end.to(self.device), self.forest.positions.to(self.device)

            def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                sees = (k <= q) & (q < end[k])
                return sees if window is None else sees & (positions[q] - positions[k] < window)

            return create_block_mask(mask, None, None, len(end), len(end), device=self.device, _compile=True)

        mask = self._part(("flex", window), make)
        return flex_attention_forward(module, query, key, value, mask, **how)[0].transpose(1, 2)

    def _trees(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """All trees side by side, padded to the widest, in one call with the whole mask."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            trees = self.forest.trees
            width = max(stop - start for start, stop in trees)
            places = torch.zeros(len(trees), width, dtype=torch.long)
            real = torch.zeros(len(trees), width, dtype=torch.bool)
            for row, (start, stop) in enumerate(trees):
                places[row, : stop - start] = torch.arange(start, stop)
                real[row, : stop - start] = True
            end, positions, column = self.forest.end[places], self.forest.positions[places], places[:, None, :]
            mask = (column <= places[:, :, None]) & (places[:, :, None] < end[:, None, :]) & real[:, None, :]
            if window is not None:
                mask &= positions[:, :, None] - positions[:, None, :] < window
            mask |= ~real[:, :, None]  # what nobody reads must not be NaN
            return places.to(self.device), real.to(self.device), mask[:, None].to(self.device)

        places, real, mask = self._part(("trees", window), make)
        query, key, value = (tensor[0][:, places].transpose(0, 1) for tensor in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, **how)
        return output.transpose(0, 1)[:, real][None]

    def _branches(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """One call a branch, over its own tokens and its ancestors': nothing else is computed."""

        def make() -> list[tuple[Branch, Tensor | None]]:
            made = []
            for branch in branches(self.forest):
                own = branch.stop - branch.start
                before = sum(stop - start for start, stop in branch.ancestors)
                mask = None
                if before or window is not None:
                    mask = torch.ones(own, before + own, dtype=torch.bool, device=self.device).tril(before)
                    if window is not None:
                        mask = mask.triu(before - window + 1)
                made.append((branch, mask))
            return made

        pieces = []
        for branch, mask in self._part(("branches", window), make):
            runs = [*branch.ancestors, (branch.start, branch.stop)]
            keys, values = (
                torch.cat([tensor[:, :, start:stop] for start, stop in runs], 2)
                if len(runs) > 1
                else tensor[:, :, branch.start : branch.stop]
                for tensor in (key, value)
            )
            own = query[:, :, branch.start : branch.stop]
            pieces.append(
                scaled_dot_product_attention(own, keys, values, attn_mask=mask, is_causal=mask is None, **how)
            )
        return torch.cat(pieces, 2)

    def _part(self, name: Any, make: Any) -> Any:
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, by the layout of the batch. Raises ValueError for what it can't do."""
    for name in ("s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention has {name}, which layouts don't; set trainer.layout=padded")
    output = layout.attend(
        module, query, key, value, scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap
    )
    return output.transpose(1, 2).contiguous(), None  # as transformers' own: some models take a view of it


AttentionInterface.register(ATTENTION, attention)
