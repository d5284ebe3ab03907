"""Orders as data: the step at which each position is drawn, int32 [1, N] or [B, N]; NEVER while undecided."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

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


Schedule = Callable[[Tensor, Tensor], Tensor]
"""(share r of the steps that are done, positions U unknown at the start) -> the share of U that stays hidden."""


def cosine(r: Tensor, unknown: Tensor) -> Tensor:
    """cos(pi/2 r): few tokens first, when little is known (MaskGIT, MAR)."""
    return (math.pi / 2 * r).cos()


def uniform(r: Tensor, unknown: Tensor) -> Tensor:
    """1 - r: equally many tokens at every step."""
    return 1 - r


def power(exponent: float) -> Schedule:
    """1 - r^p."""
    return lambda r, unknown: 1 - r**exponent


def logarithmic(r: Tensor, unknown: Tensor) -> Tensor:
    """-log r / log U: most tokens first."""
    return -r.log() / unknown.clamp_min(2).log()


def exponential(r: Tensor, unknown: Tensor) -> Tensor:
    """1 - U^(r - 1): nearly all tokens last."""
    return 1 - unknown ** (r - 1)


def schedule(name: str) -> Schedule:
    """By its published name: "cosine", "uniform", "log", "exp", or "pow2", "pow0.5", ...; ValueError otherwise."""
    named = {"cosine": cosine, "uniform": uniform, "log": logarithmic, "exp": exponential}
    exponent = re.fullmatch(r"pow(\d+\.?\d*)", name)
    if name not in named and exponent is None:
        raise ValueError(f"a schedule is {', '.join(named)} or pow<number>, got {name!r}")
    return named[name] if exponent is None else power(float(exponent[1]))


def hidden_counts(
    unknown_B: Tensor,
    steps: int | Tensor,
    schedule: Schedule = cosine,
    least_drawn: int = 1,
    least_hidden: int = 1,
) -> Tensor:
    """Of the positions of each item that are unknown at the start, how many stay hidden after each step.

    int64 [B, steps] on the host: floor(U share(r)) with r = (k + 1) / steps (of each item's own number of steps, if it
    has one), at least `least_drawn` fewer than before and at least `least_hidden`. What is nominally hidden after the
    last step is drawn there all the same (MaskGIT, arXiv 2202.04200; MAGE, arXiv 2211.09117).
    """
    unknown = unknown_B.cpu().long()
    own = torch.as_tensor(steps).long().expand(len(unknown))
    r = ((torch.arange(int(own.max())) + 1).double() / own[:, None].clamp_min(1)).clamp(max=1)
    share = schedule(r, unknown[:, None].double()).clamp(1e-6, 1)
    wanted = (unknown[:, None].float() * share.float()).floor().long()  # float32: 36 (1 - 5/6) is 6, as published
    hidden, out = unknown, torch.zeros_like(wanted)
    for k in range(wanted.shape[1]):
        hidden = torch.minimum(torch.minimum(wanted[:, k], hidden - least_drawn).clamp_min(least_hidden), unknown)
        out[:, k] = hidden
    return out


def sets_around(known_BN: Tensor, steps: int, noise: Source, schedule: Schedule = cosine) -> Tensor:
    """A random partition of what is not known, int32 [B, N]; -1 where it is known from the start.

    The schedule runs over the unknown positions of each item alone, in `steps` steps or one per position where there
    are fewer. With nothing known it is `random_sets` of the schedule's counts (MAR, with its in-painting).
    """
    n, unknown = known_BN.shape[1], (~known_BN).sum(1).cpu()
    own = unknown.clamp(max=steps)
    hidden = hidden_counts(unknown, own, schedule)
    hidden = hidden.masked_fill(torch.arange(hidden.shape[1]) >= own[:, None] - 1, 0).to(known_BN.device)
    score = noise.uniform("order", 0, (n,)).to(known_BN.device).masked_fill(known_BN, -1)
    later = n - 1 - score.argsort(1).argsort(1)  # positions that are drawn after this one or with it
    sets = (hidden[:, None] > later[..., None]).sum(-1)
    return sets.masked_fill(known_BN, -1).int()


def members(group_BN: Tensor, k: int | Tensor) -> Tensor:
    """Positions [B|1, n] that step k (one for all, or one per item) draws, ascending.

    Items that draw fewer than others are filled up with positions that they do not draw, which `State.put` leaves as
    they are.
    """
    k = k.to(group_BN.device)[:, None] if isinstance(k, Tensor) else k
    hit = group_BN == k
    return (~hit).long().argsort(dim=1, stable=True)[:, : int(hit.sum(1).max())]
