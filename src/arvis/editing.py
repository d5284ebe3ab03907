"""Which tokens of a picture are kept when a part of it is painted anew: in-painting, out-painting, class editing.

The kept tokens become the `given` of a generation, so every order that takes pins edits pictures the same way. What is
kept stays only approximately as it was: decoders, and VAR's upsampling between scales, reach across the border.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.tokens import Layout

SURE = 3
"""Levels of at most this many positions are kept whole: each position there speaks of the whole picture."""


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """bool [Y, X] of `size`, True inside the box (y0, x0, y1, x1), fractions of the picture in [0, 1].

    In-painting keeps the outside (`~box_mask(...)`), out-painting the inside. Edges go to the nearest cell, halves to
    the even one. Raises ValueError for a box outside the picture or inside out.
    """
    y0, x0, y1, x1 = box
    if not (0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1):
        raise ValueError(f"a box is (y0, x0, y1, x1) with 0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1, got {box}")
    inside = torch.zeros(size, dtype=torch.bool)
    inside[round(y0 * size[0]) : round(y1 * size[0]), round(x0 * size[1]) : round(x1 * size[1])] = True
    return inside


def keep_tokens(keep_BYX: Tensor, layout: Layout) -> Tensor:
    """bool [B, N]: which tokens are kept, from the cells [B, Y, X] (or [Y, X]) to keep at the last level.

    At each level the map is resized bilinearly and a token is kept above one half; levels of at most three positions
    are kept whole (VAR's zero-shot editing, arXiv 2404.02905). A map in pixels is first brought to the cells of the
    last level: a cell is kept if all of it is. Raises ValueError where the levels are no pictures.
    """
    flat = [level for level in layout.levels if len(level) != 2]
    if flat:
        raise ValueError(f"a mask over a picture says nothing about tokens of axes {flat[0]}; levels must be (Y, X)")
    if keep_BYX.dim() == 2:
        keep_BYX = keep_BYX[None]
    if keep_BYX.dim() != 3 or not keep_BYX.numel():
        raise ValueError(f"a mask is [B, Y, X] or [Y, X], got shape {tuple(keep_BYX.shape)}")
    last = layout.levels[-1]
    keep = keep_BYX[:, None].float()
    if keep.shape[2:] != last:
        keep = (keep == 0).float()
        keep = 1 - F.adaptive_max_pool2d(keep, last)
    parts = []
    for size, count in zip(layout.levels, layout.sizes, strict=True):
        kept = F.interpolate(keep, size=size, mode="bilinear", align_corners=False) > 0.5
        parts.append(kept.flatten(1) | (count <= SURE))
    return torch.cat(parts, 1)
