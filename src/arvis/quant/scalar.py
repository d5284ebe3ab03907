"""Finite scalar quantisation: a few levels per channel, no table and no loss (FSQ, arXiv 2309.15505)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.product import join_ids, split_ids
from arvis.quant.usage import token_stats
from arvis.quant.vq import straight_through, wide


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """`levels` values per channel; `epsilon` keeps the outermost values reachable (others publish 1e-5)."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"every channel needs at least two levels, got {self.levels}")
        if not 0 <= self.epsilon * (max(self.levels) - 1) < 1:
            raise ValueError(f"epsilon={self.epsilon} lets {max(self.levels)} levels round to one more; take less")


class FSQ(nn.Module):
    """Each channel bounded by tanh and rounded: [..., len(levels)] -> one id [..., 1].

    Values lie in [-1, 1]; an even number of levels has one more below zero than above, so that two levels are -1 and 0.
    There is no table and no loss: `losses` is empty by design, and a loss of 0 in a log is no fault. The gradient
    passes the rounding straight and keeps that of tanh. The first channel is the fastest digit of the id.
    """

    _levels: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("_levels", torch.tensor(config.levels), persistent=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (math.prod(self.config.levels),)

    def bound(self, z: Tensor) -> Tensor:
        """The channel values before rounding, each in a range that rounds to its levels."""
        half, offset = self._range()
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def encode(self, z: Tensor) -> Tensor:
        return self._ids(self.bound(wide(z)).round())

    def codes(self, tokens: Tensor) -> Tensor:
        return (split_ids(tokens, self.config.levels) - self._levels // 2) / (self._levels // 2)

    def preimage(self, tokens: Tensor) -> Tensor:
        """Vectors whose bounded values are exactly those of the ids: what `encode` maps back to them."""
        half, offset = self._range()
        g = self.codes(tokens) * (self._levels // 2)
        return torch.atanh((g + offset) / half) - torch.atanh(offset / half)

    def forward(self, z: Tensor) -> Quantized:
        bounded = self.bound(wide(z))
        rounded = bounded.round()  # half to even
        tokens = self._ids(rounded.detach())
        values = straight_through(bounded, rounded) / (self._levels // 2)
        return Quantized(values, tokens, {}, token_stats(tokens, self.sizes))

    def _range(self) -> tuple[Tensor, Tensor]:
        """How far tanh reaches, and how far its middle is shifted, per channel."""
        return (self._levels - 1) * (1 + self.config.epsilon) / 2, torch.where(self._levels % 2 == 0, 0.5, 0.0)

    def _ids(self, rounded: Tensor) -> Tensor:
        return join_ids(rounded.long() + self._levels // 2, self.config.levels)
