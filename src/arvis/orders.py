"""Orders as data: the step at which each position is drawn, int32 [1, N] or [B, N]; NEVER while undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arvis.noise import Source
from arvis.tokens import Layout


def raster(layout: Layout) -> Tensor:
    """One position after another, row-major (LlamaGen)."""
    return torch.arange(layout.n, dtype=torch.int32)[None]


def by_level(layout: Layout) -> Tensor:
    """One whole level after another (VAR, Infinity, ResTok)."""
    return layout.level_N[None]


def fronts(layout: Layout) -> Tensor:
    """Neighbour fronts: all positions of equal coordinate sum at once (NAR, arXiv 2503.10696)."""
    return layout.coords_NA.sum(1, dtype=torch.int32)[None]


def frames(layout: Layout, n: int) -> Tensor:
    """`n` whole frames (the first axis) at a time."""
    return (layout.coords_NA[:, 0] // n)[None]


def blocks(layout: Layout, shape: Sequence[int]) -> Tensor:
    """Blocks of `shape`, row-major over blocks; ValueError unless the blocks tile the single level."""
    lengths = layout.levels[0]
    if layout.K != 1 or len(shape) != len(lengths) or any(n % b for n, b in zip(lengths, shape, strict=True)):
        raise ValueError(f"blocks of {tuple(shape)} do not tile a layout of levels {layout.levels}")
    step = torch.zeros(layout.n, dtype=torch.int32)
    for axis, (length, block) in enumerate(zip(lengths, shape, strict=True)):
        step = step * (length // block) + layout.coords_NA[:, axis] // block
    return step[None]


def random_sets(counts: Sequence[int], noise: Source) -> Tensor:
    """A random partition per item, int32 [B, N]: set k has counts[k] of the sum(counts) positions (MAR, MaskGIT)."""
    score = noise.uniform("order", 0, (sum(counts),))
    rank = score.argsort(1).argsort(1)
    sets = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
    return sets.to(rank.device)[rank]


def cosine_counts(n: int, steps: int) -> tuple[int, ...]:
    """Set sizes of the cosine schedule: floor(n cos(pi/2 (s+1)/steps)) stay hidden after step s, at least one and at
    least one fewer than before; the last step draws the rest (MaskGIT, arXiv 2202.04200; MAR, arXiv 2406.11838)."""
    if not 1 <= steps <= n:
        raise ValueError(f"a schedule needs 1 <= steps <= {n} positions, got {steps}")
    hidden, counts = n, []
    for step in range(steps):
        left = max(1, min(hidden - 1, math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps))))
        left = 0 if step == steps - 1 else left
        counts.append(hidden - left)
        hidden = left
    return tuple(counts)


def members(group_BN: Tensor, k: int | Tensor) -> Tensor:
    """Positions [B|1, n] that step k (one for all, or one per item) draws, ascending; items must draw equally many."""
    k = k.to(group_BN.device)[:, None] if isinstance(k, Tensor) else k
    hit = group_BN == k
    count = hit.sum(1)
    if not bool((count == count[0]).all()):
        raise ValueError(f"items draw unequal numbers of positions at this step: {count.tolist()}")
    return hit.nonzero()[:, 1].view(hit.shape[0], -1)
