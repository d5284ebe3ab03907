"""What a visual token is and where tokens lie: spaces, layouts, pins.

Tokens are always one tensor [B, N, S]: int64 codes with S sub-tokens per position, or floats with S channels. No code
asks which kind it has: it asks the distribution. Shape letters used everywhere: B batch, G guidance rows, N positions,
S sub-tokens, V codes, n positions of one group, R network rows, D width, H heads, K groups, C Y X channels and pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 2**30
"""The step of what has not happened: an undecided position, an empty cache slot, padding."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The alphabet of one position: `sizes` codes per sub-token, or `width` real channels; exactly one is set."""

    sizes: tuple[int, ...] = ()
    width: int = 0

    def __post_init__(self) -> None:
        if bool(self.sizes) == bool(self.width):
            raise ValueError(f"a Space has either sizes or width, got {self.sizes=} {self.width=}")
        if any(v < 1 for v in self.sizes) or self.width < 0:
            raise ValueError(f"a Space needs positive sizes, got {self.sizes=} {self.width=}")

    @property
    def S(self) -> int:
        return len(self.sizes) or self.width


@dataclass(frozen=True)
class Layout:
    """Where the N positions lie: one tuple of axis lengths per level, levels one after another, row-major inside.

    `((1,1),(2,2),(3,3))` is a pyramid, `((16,16),)` a raster, `((T,h,w),)` a video, `((128,),)` a 1-D sequence.
    Hashable, and an argument of each call, never of a constructor.
    """

    levels: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.levels or any(not level or min(level) < 1 for level in self.levels):
            raise ValueError(f"a Layout needs at least one level of positive lengths, got {self.levels}")

    @property
    def K(self) -> int:
        return len(self.levels)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Positions of each level."""
        return tuple(math.prod(level) for level in self.levels)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First position of each level, and N at the end: level k is `offsets[k]:offsets[k + 1]`."""
        out = [0]
        for size in self.sizes:
            out.append(out[-1] + size)
        return tuple(out)

    @property
    def n(self) -> int:
        return self.offsets[-1]

    def span(self, k: int) -> slice:
        """The positions of level k."""
        return slice(self.offsets[k], self.offsets[k + 1])

    def where(self, *levels: int) -> Tensor:
        """The positions of some levels, [1, n], on the host."""
        return torch.cat([torch.arange(self.offsets[k], self.offsets[k + 1], device="cpu") for k in levels])[None]

    @cached_property
    def level_N(self) -> Tensor:
        """The level of each position, int32 [N], on the host."""
        levels = [k for k, size in enumerate(self.sizes) for _ in range(size)]
        return torch.tensor(levels, dtype=torch.int32, device="cpu")

    @cached_property
    def place_N(self) -> Tensor:
        """The place of each position among those of its level, int32 [N], on the host."""
        return torch.cat([torch.arange(size, dtype=torch.int32, device="cpu") for size in self.sizes])

    @cached_property
    def coords_NA(self) -> Tensor:
        """Coordinates of each position inside its level, int32 [N, A], on the host; missing axes are 0."""
        axes = max(len(level) for level in self.levels)
        out = torch.zeros(self.n, axes, dtype=torch.int32, device="cpu")
        for k, level in enumerate(self.levels):
            grid = torch.cartesian_prod(*(torch.arange(a, dtype=torch.int32, device="cpu") for a in level))
            out[self.span(k), : len(level)] = grid.view(-1, len(level))
        return out


def pyramid(patch_nums: tuple[int, ...]) -> Layout:
    """The layout of square scales, e.g. VAR's 1, 2, 3, 4, 5, 6, 8, 10, 13, 16."""
    return Layout(tuple((p, p) for p in patch_nums))


def at(x_BNS: Tensor, where: Tensor) -> Tensor:
    """x at positions where [B|1, n]: [B, n, S]."""
    where = where.to(x_BNS.device).expand(len(x_BNS), -1)
    return x_BNS.gather(1, where[..., None].expand(-1, -1, x_BNS.shape[-1]))


class Pin(NamedTuple):
    """Tokens that are given, not drawn: `mask` [B, n] bool (True = given), `value` [B, n, S]."""

    mask: Tensor
    value: Tensor

    def take(self, rows: Tensor) -> Pin:
        return Pin(self.mask[rows], self.value[rows])

    def at(self, where: Tensor) -> Pin:
        """The pin restricted to positions `where` [B|1, n]."""
        return Pin(at(self.mask[..., None], where)[..., 0], at(self.value, where))
