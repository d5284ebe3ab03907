"""Visibility as data: each input row of a network carries the step it helps to predict, and a rule compares steps.

The row that carries group j's tokens has step j + 1, because it helps to predict group j + 1 first; the row that starts
the sequence has step 0. Under `upto` that one convention is the mask of next-token, next-scale, next-front and level
orders alike. Rules are elementwise, so the dense mask, the incremental mask over a cache and a block mask come from one
source. Rows are control data and live on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from arvis.tokens import NEVER

CLEAN, NOISY = 0, 1


class Rows(NamedTuple):
    """`step` and `tag`, int32 [B|1, R]. `tag` means what the system's own rule says (0 where it says nothing)."""

    step: Tensor
    tag: Tensor

    @classmethod
    def of(cls, step: Tensor, tag: int | Tensor = 0) -> Rows:
        """From step [R] or [B|1, R] and one tag for all, or one per row."""
        step = step.to("cpu", torch.int32)
        step = step[None] if step.dim() == 1 else step
        tag = tag.to("cpu", torch.int32).expand_as(step) if isinstance(tag, Tensor) else torch.full_like(step, tag)
        return cls(step, tag)

    @property
    def count(self) -> int:
        return self.step.shape[1]

    @property
    def runs(self) -> list[tuple[int, slice]]:
        """Each step and where its rows are, of rows that lie step by step and alike in every item."""
        steps, counts = (x.tolist() for x in torch.unique_consecutive(self.step[0], return_counts=True))
        stops = list(itertools.accumulate(counts))
        return [(k, slice(stop - n, stop)) for k, n, stop in zip(steps, counts, stops, strict=True)]


See = Callable[[Rows, Rows], Tensor]
"""(query rows [.., Q, 1], key rows [.., 1, K]) -> bool [.., Q, K]; pure and elementwise."""


def upto(q: Rows, k: Rows) -> Tensor:
    """A row sees every row of its own and earlier steps (block-causal)."""
    return k.step <= q.step


def same(q: Rows, k: Rows) -> Tensor:
    """A row sees its own step only (Markov orders)."""
    return k.step == q.step


def window(size: int, sink: int = 0) -> See:
    """The last `size` steps, and always the steps before `sink` (prefix rows of negative step among them)."""

    def see(q: Rows, k: Rows) -> Tensor:
        return (k.step <= q.step) & ((q.step - k.step < size) | (k.step < sink))

    return see


def clean_noisy(q: Rows, k: Rows) -> Tensor:
    """Clean rows are visible up to the query's step; noisy rows only to noisy rows of their own step (ACDiT)."""
    return (k.step <= q.step) & ((k.tag == CLEAN) | ((q.tag == NOISY) & (k.step == q.step)))


_HALF = 15


def tree(q: Rows, k: Rows) -> Tensor:
    """Rows of tag 0 up to the query's step; of draft rows (tagged by `tree_tags`) only itself and its ancestors."""
    first = (1 << _HALF) - 1
    inside = (k.tag & first <= q.tag & first) & (q.tag & first < k.tag >> _HALF)
    return (k.step <= q.step) & ((k.tag == 0) | inside)


def tree_tags(parent_BL: Tensor) -> Tensor:
    """Tags int32 [B, L] of draft trees, from the parent of each node (-1: none; parents come before children).

    A tag packs the interval of numbers that a depth-first walk gives to a node and its descendants: a node is an
    ancestor of another iff its interval holds the other's first number.
    """
    items, count = parent_BL.shape
    if count >= 1 << _HALF or bool((parent_BL >= torch.arange(count)).any()):
        raise ValueError(f"a draft tree has fewer than {1 << _HALF} nodes, parents before children; got {parent_BL}")
    item, up = torch.arange(items), parent_BL + 1  # column 0 is the root, which stays untagged
    size = torch.ones(items, count + 1, dtype=torch.int32)
    for node in range(count, 0, -1):
        size[item, up[:, node - 1]] += size[:, node]
    enter, free = torch.zeros_like(size), torch.ones_like(size)
    for node in range(1, count + 1):
        enter[:, node] = free[item, up[:, node - 1]]
        free[:, node] = enter[:, node] + 1
        free[item, up[:, node - 1]] += size[:, node]
    return (enter | (enter + size) << _HALF)[:, 1:]


def lone_tags(hidden_BR: Tensor) -> Tensor:
    """Tags int32 [B, R] of padding: `tree` shows a row that is `hidden` to itself alone, others have tag 0.

    Padding is a draft that nobody follows. Its numbers count down from the highest, where no draft tree reaches.
    """
    number = (1 << _HALF) - 1 - torch.arange(hidden_BR.shape[1], dtype=torch.int32, device=hidden_BR.device)
    return torch.where(hidden_BR, number | (number + 1) << _HALF, 0)


def depths(parent_BL: Tensor) -> Tensor:
    """Steps from the root to each node, int64 [B, L]: 1 for its children."""
    depth = torch.zeros(len(parent_BL), parent_BL.shape[1] + 1, dtype=torch.int64)
    for node in range(parent_BL.shape[1]):
        depth[:, node + 1] = depth.gather(1, parent_BL[:, node, None] + 1)[:, 0] + 1
    return depth[:, 1:]


def looks_back(see: See, steps: int) -> bool:
    """Whether any of so many steps sees an earlier one; where none does (Markov orders) nothing has to be kept."""
    rows = Rows.of(torch.arange(steps, device="cpu"))
    mask = render(see, rows, rows)
    return mask is None or bool(mask[0, 0].tril(-1).any())


def render(see: See, q: Rows, k: Rows) -> Tensor | None:
    """The boolean mask [B|1, 1, Q, K] of a rule, or None when everything is visible. Keys of step NEVER are not."""
    queries = Rows(q.step[..., :, None], q.tag[..., :, None])
    keys = Rows(k.step[..., None, :], k.tag[..., None, :])
    mask = see(queries, keys) & (keys.step < NEVER)
    return None if bool(mask.all()) else mask[:, None]
