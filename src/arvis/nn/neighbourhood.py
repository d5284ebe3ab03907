"""Attention inside scales, for Markov orders: each scale alone, large ones by the neighbourhood of each cell.

The neighbourhood of a cell is the kernel x kernel window around it, shifted inward where it would cross a border, so
that every cell sees equally many (arXiv 2204.07143; MVAR, arXiv 2505.12742). The rules say what is seen; `InsideScales`
is a shorter way to the same than their masks: scales that do not see each other are not multiplied, and a scale of N
cells costs O(N kernel^2) instead of O(N^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from arvis.nn.attention import attend
from arvis.nn.trunk import Call
from arvis.rows import Rows, See, same
from arvis.tokens import Layout

TILE = 4
"""Sides of the squares of cells that fetch their keys together: larger ones copy fewer keys and hide more products."""


def window_start(at: Tensor, kernel: int, length: int | Tensor) -> Tensor:
    """The first coordinate that a cell at coordinate `at` sees along an axis of some length."""
    return torch.minimum((at - kernel // 2).clamp_min(0), torch.as_tensor(length - kernel))


def near(layout: Layout, kernel: int, first: int) -> See:
    """A row sees its own scale; in scales from `first` on the window around it. Tags are places in the scale.

    ValueError for an even kernel, and for scales that are smaller than it.
    """
    if kernel % 2 == 0:
        raise ValueError(f"a window has an odd side, so that its cell is in the middle, got {kernel}")
    small = [level for level in layout.levels[first:] if min(level) < kernel]
    if small:
        raise ValueError(f"a scale of {small[0]} cells has no window of {kernel}x{kernel}; begin later than at {first}")
    sides = torch.tensor(layout.levels, device="cpu")

    def see(q: Rows, k: Rows) -> Tensor:
        own = same(q, k)
        high, wide = sides[q.step.clamp(0, layout.K - 1).long()].unbind(-1)
        for length, at, other in ((high, q.tag // wide, k.tag // wide), (wide, q.tag % wide, k.tag % wide)):
            start = window_start(at, kernel, length)
            own = own & ((q.step < first) | ((start <= other) & (other < start + kernel)))
        return own

    return see


@dataclass(frozen=True)
class InsideScales:
    """What `same` shows, scale by scale; with a kernel what `near` shows, in scales from `first` on by `neighbours`.

    How a `SelfAttention` looks at the rows of a call, whole scales one after another.
    """

    layout: Layout
    kernel: int = 0
    first: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
        if call.rows is None or call.cache is not None:
            raise ValueError("attention inside scales needs a call that says its rows and has no cache")
        out = []
        for step, at in call.rows.runs:
            part = q[:, :, at], k[:, :, at], v[:, :, at]
            if self.kernel and step >= self.first:
                out.append(neighbours(*part, self.layout.levels[step], self.kernel, scale))
            else:
                out.append(attend(*part, None, scale))
        return torch.cat(out, 2)


def neighbours(
    q: Tensor, k: Tensor, v: Tensor, size: tuple[int, ...], kernel: int, scale: float, tile: int = TILE
) -> Tensor:
    """softmax(scale q k^T) v over the window of each cell of a grid (rows, columns): all [R, H, rows * columns, h].

    Squares of tile x tile cells fetch the (tile + kernel - 1)^2 keys of all their windows and hide from each cell what
    it does not see: N (tile + kernel - 1)^2 products, exactly N kernel^2 with a tile of 1.
    """
    bands, back = _bands(size, kernel, tile)
    out = []
    for queries, keys, mask in bands:
        heads = mask.repeat(q.shape[1], 1, 1)[None].to(q.device)  # [1, H * tiles, cells, keys]
        fetched = (x[:, :, at.to(q.device)].flatten(1, 2) for x, at in ((q, queries), (k, keys), (v, keys)))
        out.append(attend(*fetched, heads, scale).unflatten(1, (q.shape[1], -1)).flatten(2, 3))
    return torch.cat(out, 2)[:, :, back.to(q.device)]


@lru_cache(maxsize=64)
def _bands(size: tuple[int, ...], kernel: int, tile: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """For each row of tiles: cells [tiles, T], keys [tiles, W], what is seen [tiles, T, W]; and where each cell of the
    grid is among all of theirs. On the host."""
    with torch.device("cpu"), torch.inference_mode(False):  # kept tables also serve training
        rows, columns = (_tiles(length, kernel, min(tile, length)) for length in size)
        bands, wide = [], size[1]
        for y, ys, seen_y in zip(*rows, strict=True):
            cells = (y[:, None] * wide + columns[0][:, None, :]).flatten(1)
            keys = (ys[:, None] * wide + columns[1][:, None, :]).flatten(1)
            seen = (seen_y[None, :, None, :, None] & columns[2][:, None, :, None, :]).flatten(3).flatten(1, 2)
            bands.append((cells, keys, seen))
        cells = torch.cat([cells.flatten() for cells, _, _ in bands])
        order = cells.argsort(stable=True)
        back = order[torch.searchsorted(cells[order], torch.arange(size[0] * wide))]
        return bands, back  # tiles overlap where they do not divide the grid: the first one counts


def _tiles(length: int, kernel: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the cells [m, t] of tiles that cover it, the keys [m, w] that they need, and who sees whom."""
    first = (torch.arange(-(-length // tile)) * tile).clamp_max(length - tile)
    cells = first[:, None] + torch.arange(tile)
    wide = min(length, tile + kernel - 1)
    keys = (first - kernel // 2).clamp(0, length - wide)[:, None] + torch.arange(wide)
    start = window_start(cells, kernel, length)[..., None]
    return cells, keys, (start <= keys[:, None]) & (keys[:, None] < start + kernel)
