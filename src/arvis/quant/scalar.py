"""Scalar quantisation: finite levels trained end to end (FSQ), and bins laid over channels after training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.product import join_ids, split_ids
from arvis.quant.usage import count
from arvis.quant.vq import straight_through, vq_stats


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """`levels` values per channel; `epsilon` keeps the outermost values reachable (others publish 1e-5)."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"every channel needs at least two levels, got {self.levels}")


class FSQ(nn.Module):
    """Each channel bounded by tanh and rounded (arXiv 2309.15505): [..., len(levels)] -> one id [..., 1].

    Values lie in [-1, 1]. There is no table and no loss: `losses` is empty by design, the gradient passes the rounding
    straight and keeps that of tanh. The first channel is the fastest digit of the id.
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
        half = (self._levels - 1) * (1 + self.config.epsilon) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def encode(self, z: Tensor) -> Tensor:
        return self._ids(self.bound(_wide(z)).round())

    def codes(self, tokens: Tensor) -> Tensor:
        return (split_ids(tokens, self.config.levels) - self._levels // 2) / (self._levels // 2)

    def preimage(self, tokens: Tensor) -> Tensor:
        """Vectors whose bounded values are exactly those of the ids: what `encode` maps back to them."""
        half = (self._levels - 1) * (1 + self.config.epsilon) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        g = self.codes(tokens) * (self._levels // 2)
        return torch.atanh((g + offset) / half) - torch.atanh(offset / half)

    def forward(self, z: Tensor) -> Quantized:
        bounded = self.bound(_wide(z))
        rounded = bounded.round()  # half to even
        tokens = self._ids(rounded.detach())
        values = straight_through(bounded, rounded) / (self._levels // 2)
        stats = vq_stats(tokens, self.sizes[0]) if self.sizes[0] <= 2**20 else {}
        return Quantized(values, tokens, {}, stats)

    def _ids(self, rounded: Tensor) -> Tensor:
        return join_ids(rounded.long() + self._levels // 2, self.config.levels)


class Bins(nn.Module):
    """Every channel by the same bins, chosen after training: [..., D] -> ids [..., D], one per channel.

    `centres` [n] ascend; a value at the border of two bins goes to the lower one, or to the upper one if `right_open`.
    The gradient passes straight.
    """

    centres: Tensor
    borders: Tensor

    def __init__(self, centres: Tensor, channels: int, borders: Tensor | None = None, right_open: bool = False) -> None:
        super().__init__()
        if not (centres.diff() > 0).all():
            raise ValueError("the centres of bins must ascend")
        middle = (centres[1:] + centres[:-1]) / 2  # nearest centre
        self.register_buffer("centres", centres.float(), persistent=False)
        self.register_buffer("borders", (middle if borders is None else borders).float(), persistent=False)
        self.channels, self.right_open = channels, right_open

    @property
    def sizes(self) -> tuple[int, ...]:
        return (len(self.centres),) * self.channels

    def encode(self, z: Tensor) -> Tensor:
        return torch.bucketize(_wide(z), self.borders, right=self.right_open)

    def codes(self, tokens: Tensor) -> Tensor:
        return self.centres[tokens]

    def forward(self, z: Tensor) -> Quantized:
        z = _wide(z)
        tokens = self.encode(z)
        return Quantized(straight_through(z, self.codes(tokens)), tokens, {}, vq_stats(tokens, len(self.centres)))


def uniform_bins(n: int, low: float, high: float, channels: int) -> Bins:
    """n equal bins over [low, high), where the error is half a bin at most; what lies outside goes to the outermost."""
    step = (high - low) / n
    at = torch.arange(n, dtype=torch.float64)
    return Bins(low + (at + 0.5) * step, channels, low + at[1:] * step, right_open=True)


def gaussian_bins(n: int, low: float, high: float, channels: int, clip: float = 3.0) -> Bins:
    """n bins of equal mass under a normal density clipped at `clip`, stretched to [low, high] (arXiv 2503.16430).

    The centres are the means of the bins; values go to the nearest centre. Equal mass is not the least squared error.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    edges = normal.icdf(torch.linspace(0, 1, n + 1, dtype=torch.float64)).clamp(-clip, clip)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = normal.cdf(edges).diff()
    centres = -density.diff() / mass.where(mass != 0, 1e-10)
    return Bins((centres + clip) / (2 * clip) * (high - low) + low, channels)


@torch.no_grad()
def lloyd_max(x: Tensor, n: int, iterations: int = 50) -> tuple[Tensor, list[float]]:
    """The centres [n] of least squared error for scalars `x`, and the error before each iteration and at the end.

    Each centre becomes the mean of its cell, each border the middle of two centres: the error never rises.
    """
    x = x.double().reshape(-1)
    centres = torch.quantile(x[:: max(1, len(x) // 10**6)], (torch.arange(n, device=x.device).double() + 0.5) / n)
    errors = []
    for _ in range(iterations):
        ids = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        errors.append((x - centres[ids]).square().mean().item())
        counts = count(ids, n).double()
        means = torch.zeros_like(centres).index_add_(0, ids, x) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    errors.append((x - centres[torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)]).square().mean().item())
    return centres, errors


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
