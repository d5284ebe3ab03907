"""A network that denoises one token at a time: a residual MLP modulated by the time and a condition (MAR's head,
arXiv 2406.11838, with the modulation of arXiv 2212.09748)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded

ROWS = 256
"""Condition rows that are modulated together along a solve."""


def sinusoids(t: Tensor, width: int) -> Tensor:
    """[..., width] of times [...]: cosines, then sines, at rates 10000^(-i / (width / 2)); float32."""
    half = width // 2
    rate = (-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device)).exp()
    angle = t.float()[..., None] * rate
    return torch.cat((angle.cos(), angle.sin()), -1)


class TimeEmbedding(nn.Module):
    """Times [...], whole or not -> rows [..., width]: Linear, SiLU, Linear of their sinusoids."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up, self.down = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.down(F.silu(self.up(sinusoids(t, self.frequencies).to(self.up.weight.dtype))))


class DenoiserBlock(nn.Module):
    """x += gate mlp(norm(x) (1 + scale) + shift), the three from the condition row."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` [..., 3 width] is what the layer of that name makes of the condition row."""
        shift, scale, gate = modulation.chunk(3, -1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class MLPDenoiser(nn.Module):
    """x [..., S], time t, condition c [..., W] of `condition` -> [..., out], at least float32.

    Shapes broadcast: x and t may lack the axes along which only the condition differs (guidance rows), and the other
    way round.
    """

    def __init__(self, channels: int, out: int, inner: int, width: int, depth: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.embed_condition = nn.Linear(inner, width)
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)
        self.init_weights()

    def init_weights(self) -> None:
        """Nothing comes out at first, and every block lets its input through."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.up, self.time.down):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*(block.modulation for block in self.blocks), self.modulation, self.linear):
            nn.init.zeros_(linear.weight)

    def condition(self, z: Tensor) -> Tensor:
        """What stays the same over all steps of a solve, of rows z [..., inner]."""
        return self.embed_condition(z)

    def forward(self, x: Tensor, t: float | Tensor, c: Tensor) -> Tensor:
        """t is one time, or one per row [...] of x."""
        return self.denoise(x, self.modulations(self.time(torch.as_tensor(t, device=x.device)) + c))

    def along(self, times: Sequence[float], c: Tensor) -> Callable[[Tensor, float], Tensor]:
        """(x, t) -> `forward` at the times of a solve, which come in their order, or at any other.

        What depends on time and condition alone, three fifths of the operations, is made for several times in one
        product: the few rows of one time would wait for the weights.
        """
        together = max(1, ROWS // max(1, c[..., 0].numel()))
        ahead: dict[float, tuple[Tensor, ...]] = {}

        def denoise(x: Tensor, t: float) -> Tensor:
            if t not in ahead:
                some = times[times.index(t) :][:together] if t in times else (t,)
                rows = self.time(torch.tensor(some, device=c.device)).view(-1, *(1,) * (c.dim() - 1), c.shape[-1])
                ahead.clear()
                ahead.update(zip(some, zip(*self.modulations(rows + c), strict=True), strict=True))
            return self.denoise(x, ahead[t])

        return denoise

    def modulations(self, row: Tensor) -> list[Tensor]:
        """What condition rows [..., W] make of every block [..., 3 W] and, unrounded, of the last layer [..., 2 W]."""
        active = F.silu(row)
        with unrounded(row):
            last = self.modulation(active.to(torch.promote_types(row.dtype, torch.float32)))
        return [*(block.modulation(active) for block in self.blocks), last]

    def denoise(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The network under its modulations."""
        h = self.embed(x.to(self.embed.weight.dtype))
        for block, modulation in zip(self.blocks, modulations[:-1], strict=True):
            h = block(h, modulation)
        with unrounded(h):  # a rounded answer is multiplied by 2e4 at the first step of the solve
            shift, scale = modulations[-1].chunk(2, -1)
            return self.linear(self.norm(h.to(shift.dtype)) * (1 + scale) + shift)
