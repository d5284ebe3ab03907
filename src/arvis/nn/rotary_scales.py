"""The transformer over scales whose positions are rotations, so that every list of scales is its own argument.

Infinity (arXiv 2412.04431): as VAR's, with a table of levels instead of learned positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.adaln import AdaLNBlock
from arvis.nn.cache import Cache
from arvis.nn.scales import Condition, Conditioner, made_ahead
from arvis.nn.trunk import Call, Trunk
from arvis.nn.wide import unrounded
from arvis.rows import Rows, See, render
from arvis.tokens import Layout

Style = Literal["grid", "resampled", "own"]
"""Where the cells of a scale lie: at the nearest cells of one fine grid (arXiv 2406.10797), between those of a table of
edge 128, or at their own coordinates."""

_EDGE = 128
"""Cells along the longer edge of the table that is resampled."""


@lru_cache(maxsize=64)
def scale_table(layout: Layout, grid: tuple[int, int], dim: int, style: Style) -> Tensor:
    """Rotary table [1, N, dim/2, 2] of (cos, sin) for heads of `dim` channels: half for rows, half for columns.

    `grid` is the size of the fine grid. Compat: angles in float32, and halves go to the even cell.
    """
    if dim % 4:
        raise ValueError(f"two axes of pairs need heads of a multiple of 4 channels, got {dim}")
    with torch.inference_mode(False):  # it is kept, and may be needed for training later
        return torch.cat([_STYLES[style](h, w, grid, dim).flatten(0, 1) for h, w in layout.levels])[None]


def _angles(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """(cos, sin) of positions y [h] and x [w]: [h, w, dim/2, 2]."""
    half = dim // 2
    rate = 1 / 10000 ** (torch.arange(0, half, 2, dtype=torch.int64).float() / half)
    rows, columns = torch.outer(y.float(), rate), torch.outer(x.float(), rate)
    angle = torch.cat((rows[:, None].expand(-1, len(columns), -1), columns[None].expand(len(rows), -1, -1)), -1)
    return torch.stack((angle.cos(), angle.sin()), -1)


def _on_grid(h: int, w: int, grid: tuple[int, int], dim: int) -> Tensor:
    return _angles((torch.arange(h) * (grid[0] / h)).round(), (torch.arange(w) * (grid[1] / w)).round(), dim)


def _resampled(h: int, w: int, grid: tuple[int, int], dim: int) -> Tensor:
    most = max(grid)
    size = [_EDGE if side == most else int(_EDGE / most * side) for side in grid]
    table = _angles(torch.arange(size[0]), torch.arange(size[1]), dim)
    maps = F.interpolate(table.permute(3, 2, 0, 1), size=(h, w), mode="bilinear", align_corners=True)
    return maps.permute(2, 3, 1, 0)


def _own(h: int, w: int, grid: tuple[int, int], dim: int) -> Tensor:
    return _angles(torch.arange(h), torch.arange(w), dim)


_STYLES: dict[Style, Callable[[int, int, tuple[int, int], int], Tensor]] = {
    "grid": _on_grid,
    "resampled": _resampled,
    "own": _own,
}


@lru_cache(maxsize=64)
def normalised_table(layout: Layout, dim: int, theta: float, span: float) -> Tensor:
    """Rotary table [1, N, dim/2, 2] of (cos, sin) where every scale spans 0 to `span`: half for columns, half for rows.

    Compat: angles in float32. A span of -1 counts cells instead.
    """
    if dim % 4:
        raise ValueError(f"two axes of pairs need heads of a multiple of 4 channels, got {dim}")
    with torch.inference_mode(False):  # it is kept, and may be needed for training later
        rate = 1 / theta ** (torch.arange(0, dim, 4).float() / dim)
        angles = []
        for h, w in layout.levels:
            y, x = (torch.arange(n).float() for n in (h, w))
            if span != -1:
                y, x = y / max(h - 1, 1) * span, x / max(w - 1, 1) * span
            columns, rows = torch.outer(x, rate).expand(h, -1, -1), torch.outer(y, rate)[:, None].expand(-1, w, -1)
            angles.append(torch.cat((columns, rows), -1).flatten(0, 1))
        angle = torch.cat(angles)
        return torch.stack((angle.cos(), angle.sin()), -1)[None]


Tap = Callable[[Tensor], Tensor]
"""Hidden rows [B*G, R, D] -> what goes on in their place."""


class RotaryScaleTransformer(nn.Module):
    """Embed, blocks, head, over any layout of at most `levels` levels. Conditioner, blocks and head are given.

    A level is told by a row of a table that is added before the blocks `told_before`. `grid` says the size of the fine
    grid that a layout belongs to.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        blocks: Sequence[AdaLNBlock],
        head: nn.Module,
        *,
        channels: int,
        width: int,
        head_dim: int,
        grid: Callable[[Layout], tuple[int, int]],
        style: Style = "grid",
        levels: int = 15,
        told_before: Sequence[int] = (0,),
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.head_dim, self.grid, self.style = width, head_dim, grid, style
        self.told_before = frozenset(told_before)
        self.conditioner: Conditioner = conditioner
        self.word = nn.Linear(channels, width)
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.level = nn.Embedding(levels, width)
        self.shared = nn.Linear(width, 6 * width) if shared else None
        self.trunk = Trunk(blocks)
        self.head = head

    def table(self, layout: Layout) -> Tensor:
        """The rotary table of a layout, on the host."""
        dtype = torch.promote_types(self.start_position.dtype, torch.float32)
        return scale_table(layout, self.grid(layout), self.head_dim, self.style).to(dtype)

    def modulation(self, c: Condition) -> Tensor:
        """What modulates the blocks: the vector of the condition, or the six vectors that all blocks share."""
        if self.shared is None:
            return c.vector
        with unrounded(c.vector):
            return self.shared(F.silu(c.vector.to(self.shared.weight.dtype))).view(-1, 6, self.width)

    def once(self, c: Condition) -> Condition:
        """The condition with the vectors of all blocks."""
        return c._replace(ahead=made_ahead(self.trunk, self.modulation(c)))

    def embed(self, c: Condition, x_BNC: Tensor | None, first: int) -> Tensor:
        """Input rows [B*G, R, D] from the features of the levels, without level 0."""
        rows = [c.start[:, None] + self.start_position] if first == 0 else []
        if x_BNC is not None:
            word = self.word(x_BNC)  # the same for every guidance row: multiplied once
            rows.append(word.repeat_interleave(len(c.start) // len(word), 0))
        return torch.cat(rows, 1)

    def forward(
        self,
        c: Condition,
        x_BNC: Tensor | None,
        layout: Layout,
        first: int,
        last: int,
        see: See,
        cache: Cache | None = None,
        taps: Mapping[int, Tap] | None = None,
    ) -> Tensor:
        """Hidden rows [B*G, R, D] of levels first..last-1, over the cache where there is one; `taps[i]` is applied to
        what block i gives."""
        where = layout.where(*range(first, last))[0]
        rows = Rows.of(layout.level_N[where])
        # nothing reads the rows of the last scale later, so they take no slot of the cache
        mask = render(see, rows, rows) if cache is None else cache.place(see, rows, keep=last < layout.K)
        return self._run(self.embed(c, x_BNC, first), c, layout, where, Call(mask=mask, cache=cache, rows=rows), taps)

    def apart(self, c: Condition, x_BNC: Tensor | None, layout: Layout, scales: Sequence[int], see: See) -> Tensor:
        """Hidden rows of level 0 and of some others alone, in one pass under any rule; x holds the others' features."""
        where = layout.where(0, *scales)[0]
        rows = Rows.of(layout.level_N[where])
        return self._run(self.embed(c, x_BNC, 0), c, layout, where, Call(mask=render(see, rows, rows), rows=rows))

    def _run(
        self, x: Tensor, c: Condition, layout: Layout, where: Tensor, call: Call, taps: Mapping[int, Tap] | None = None
    ) -> Tensor:
        """The blocks over the positions `where` of a layout."""
        most, taps = self.level.num_embeddings, taps or {}
        if most < layout.K or layout.sizes[0] != 1:
            raise ValueError(f"a list of scales begins with one cell and has at most {most}, got {layout.levels}")
        level = self.level(layout.level_N[where].to(x.device))
        vector, table = self.modulation(c) if c.ahead is None else c.vector, self.table(layout)[:, where]
        call = replace(call, table=table, vector=vector, ahead=c.ahead, context=c.context)
        at = 0
        for stop in sorted({*self.told_before, *(i + 1 for i in taps), len(self.trunk)} - {0}):
            x = x + level if at in self.told_before else x
            x = self.trunk(x, call, range(at, stop))
            x = taps[stop - 1](x) if stop - 1 in taps else x
            at = stop
        return x

    def init_weights(self, *, gate: float, modulation: float, head: float) -> None:
        """VAR's initialisation with factors for gates, other modulations and the head; residual outputs by depth."""
        width, depth, std = self.width, len(self.trunk), (1 / (3 * self.width)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position, std=std)
        with torch.no_grad():
            self.head.linear.weight *= head
            if self.head.project is not None:
                self.head.project.weight *= modulation
            for block in self.trunk.blocks:
                for branch in (block.attn.out, block.cross.out, block.ffn.down):
                    branch.weight /= (2 * depth) ** 0.5
                vectors = block.modulation.vectors
                vectors[: 2 * width] *= gate
                vectors[2 * width :] *= modulation
