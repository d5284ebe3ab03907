"""Bins laid over the channels of a trained tokenizer: uniform, of equal mass, of least error (arXiv 2503.16430)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.usage import count, token_stats
from arvis.quant.vq import straight_through, wide


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
        return torch.bucketize(wide(z), self.borders, right=self.right_open)

    def codes(self, tokens: Tensor) -> Tensor:
        return self.centres[tokens]

    def forward(self, z: Tensor) -> Quantized:
        z = wide(z)
        tokens = self.encode(z)
        return Quantized(straight_through(z, self.codes(tokens)), tokens, {}, token_stats(tokens, self.sizes))


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


def lloyd_bins(x: Tensor, n: int, channels: int, iterations: int = 50) -> Bins:
    """The n bins of least squared error for scalars `x` (any shape), the same for all channels."""
    return Bins(lloyd_max(x, n, iterations)[0], channels)


@torch.no_grad()
def lloyd_max(x: Tensor, n: int, iterations: int = 50) -> tuple[Tensor, list[float]]:
    """The centres [n] of least squared error for scalars `x`, and the error before each iteration and at the end.

    Each centre becomes the mean of its cell, each border the middle of two centres: the error never rises. They start
    as many fine bins would lie, with the cube root of the density of x (Panter and Dite 1951).
    """
    x = x.double().reshape(-1)
    centres, errors = _companded(x, n), []
    for _ in range(iterations):
        ids = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        errors.append((x - centres[ids]).square().mean().item())
        counts = count(ids, n).double()
        means = torch.zeros_like(centres).index_add_(0, ids, x) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    errors.append((x - centres[torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)]).square().mean().item())
    return centres, errors


def _companded(x: Tensor, n: int, cells: int = 4096) -> Tensor:
    """n places whose density is the cube root of that of x."""
    low, high = float(x.min()), float(x.max())
    mass = torch.histc(x, cells, low, high) ** (1 / 3)
    total = torch.cat((mass.new_zeros(1), mass.cumsum(0))) / mass.sum()
    at = (torch.arange(n, device=x.device).double() + 0.5) / n
    cell = torch.searchsorted(total, at).clamp(1, cells)
    inside = (at - total[cell - 1]) / (total[cell] - total[cell - 1])
    return low + (high - low) * (cell - 1 + inside) / cells
