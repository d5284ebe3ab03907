"""Frequency bands as what the levels of a pyramid code: level k the part of the map up to its frequency, low to high.

NFIG, arXiv 2503.07076. The plane of 2-D frequencies is cut into rings around zero, one for each level, as wide as the
level's share of all positions. A level codes its own band and what is left of the lower ones; together the levels code
everything. A ring may hold no frequency of the map: that level codes what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from arvis.nn.wide import unrounded
from arvis.quant.multiscale import area_target
from arvis.tokens import Layout

Bands = Callable[[Layout], Tensor]
"""The band of each frequency of a layout's map, int64 [H, W // 2 + 1] on the host: what `rfft2` gives."""


def edges(layout: Layout) -> Tensor:
    """Upper edges of the bands, float64 [K]: sigma_k grows by the level's share of all positions, up to the largest
    radius (Eq. 6)."""
    share = torch.tensor(layout.sizes, dtype=torch.float64).cumsum(0) / layout.n
    return share * squares(layout).max().double().sqrt()


def squares(layout: Layout) -> Tensor:
    """The squared distance of each frequency from zero, in cycles per map, int64 [H, W // 2 + 1].

    Signs do not matter, so that the one row and column of the highest frequency of an even map lies in one band.
    """
    h, w = layout.levels[-1]
    y, x = torch.arange(h), torch.arange(w // 2 + 1)
    return y.minimum(h - y).square()[:, None] + x.square()


@lru_cache(maxsize=64)
def rings(layout: Layout) -> Tensor:
    """Band k has radii in [sigma_{k-1}, sigma_k), the last one its upper edge, too. In whole numbers, as frequencies
    lie on edges: 3 sqrt(2) does in the official grid."""
    with torch.inference_mode(False), torch.device("cpu"):
        found, inner = squares(layout), torch.tensor(layout.offsets[1:-1], dtype=torch.int64)
        return (found[..., None] * layout.n**2 >= inner.square() * found.max()).sum(-1)


def low_pass(f: Tensor, k: int, layout: Layout, bands: Bands = rings) -> Tensor:
    """The part of maps [B, C, H, W] in bands 0..k, real; at the last band the maps themselves. Never in fewer bits
    than float32."""
    if k == layout.K - 1:
        return f
    with unrounded(f):
        wide = f if f.dtype == torch.float64 else f.float()
        kept = (bands(layout) <= k).to(f.device)
        return torch.fft.irfft2(torch.fft.rfft2(wide) * kept, s=layout.levels[-1])


def band(f: Tensor, k: int, layout: Layout, bands: Bands = rings) -> Tensor:
    """The part of maps in band k alone; over all bands these sum to the maps (Eq. 1)."""
    low = low_pass(f, k, layout, bands)
    return low if k == 0 else low - low_pass(f, k - 1, layout, bands)


@dataclass(frozen=True)
class BandTarget:
    """What level k codes: g_k = f in bands 0..k, without what is coded already, averaged over the cells of level k.

    The paper's recursion R_0 = 0, g_k = R_{k-1} + band_k, R_k = g_k - coded_k (Eq. 3) telescopes to this: the residual
    of all of f, without what lies in higher bands. With all frequencies in band 0 it is VAR's target.
    """

    bands: Bands = rings

    def __call__(self, rest: Tensor, f: Tensor, k: int, layout: Layout) -> Tensor:
        return area_target(rest - (f - low_pass(f, k, layout, self.bands)), f, k, layout)
