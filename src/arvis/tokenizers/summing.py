"""What tokenizers share whose levels add up to one map: sums, partial sums, and what a generator sees of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from arvis.tokens import Layout


class Summing(Protocol):
    """Levels that are added to a map, coarse to fine; a generator sees `channels` of it."""

    @property
    def channels(self) -> int: ...

    def start(self, batch: int, layout: Layout) -> Tensor:
        """The empty sum [B, C, H, W]."""
        ...

    def accumulate(self, f: Tensor, tokens_BnS: Tensor, k: int, layout: Layout) -> Tensor:
        """The sum with level k."""
        ...

    def next_input(self, f: Tensor, k: int, layout: Layout) -> Tensor:
        """What a generator sees of the sum before level k, [B, n_k, C]."""
        ...


def summed(tokenizer: Summing, tokens: Tensor, layout: Layout, known: Tensor | None = None) -> Tensor:
    """The sum of all levels; of `known` [B, N] only of those that are wholly known, in each item."""
    f = tokenizer.start(len(tokens), layout)
    for k in range(layout.K):
        part = tokens[:, layout.span(k)]
        if known is None:
            f = tokenizer.accumulate(f, part, k, layout)
            continue
        whole = known[:, layout.span(k)].all(1).to(f.device)
        if whole.any():
            added = tokenizer.accumulate(f, part.where(whole[:, None, None].to(part.device), 0), k, layout)
            f = added.where(whole[:, None, None, None], f)
    return f


def sums(tokenizer: Summing, tokens: Tensor, layout: Layout) -> list[Tensor]:
    """The partial sum after each level."""
    f, out = tokenizer.start(len(tokens), layout), []
    for k in range(layout.K):
        f = tokenizer.accumulate(f, tokens[:, layout.span(k)], k, layout)
        out.append(f)
    return out


def inputs(tokenizer: Summing, tokens: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """The inputs of levels first..last-1 under teacher forcing, [B, sum of n_k, C]; level 0 has none.

    Only tokens of levels below last - 1 are read.
    """
    f, rows = tokenizer.start(len(tokens), layout), []
    for k in range(1, last):
        f = tokenizer.accumulate(f, tokens[:, layout.span(k - 1)], k - 1, layout)
        if k >= first:
            rows.append(tokenizer.next_input(f, k, layout))
    return torch.cat(rows, 1) if rows else f.new_zeros(len(tokens), 0, tokenizer.channels)
