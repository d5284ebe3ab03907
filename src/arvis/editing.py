"""Which tokens of a picture are kept when a part of it is painted anew: in-painting, out-painting, editing.

The kept tokens become the `given` of a generation, and every order reads them in its own way: a raster order is forced
to them where it gets there, a masked order knows them from the start, an order over scales keeps those of every scale.
What is kept stays only approximately as it was: decoders, and the upsampling between scales, reach across the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from arvis.tokens import Layout

SURE = 3
"""Levels of at most this many positions, below the last, are kept whole: each there speaks of the whole picture."""

Box = tuple[float, float, float, float]
"""(y0, x0, y1, x1), fractions of a picture in [0, 1]."""


def box_mask(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """bool [Y, X] of `size`, True inside the box.

    In-painting keeps the outside (`~box_mask(...)`), out-painting the inside. Edges go to the nearest cell, halves to
    the even one. Raises ValueError for a box outside the picture or inside out.
    """
    inside = torch.zeros(size, dtype=torch.bool)
    top, left, bottom, right = _edges(box, size)
    inside[top:bottom, left:right] = True
    return inside


def box_picture(box: Sequence[float], size: tuple[int, int]) -> Image.Image:
    """The box as a mask of (width, height) pixels: white inside, where a picture is painted anew."""
    return Image.fromarray(box_mask(box, (size[1], size[0])).numpy()).convert("RGB")


def outpaint(picture: Image.Image, box: Sequence[float]) -> tuple[Image.Image, Image.Image]:
    """A picture shrunk into a box of an empty canvas of its own size, and the mask that is white around it.

    The canvas has the mean colour of the picture's border, as encoders look beyond the box. The pair is the `image` and
    `mask` of a generation that paints the surroundings. Raises ValueError as `box_mask`, and for a box that holds no
    pixel.
    """
    top, left, bottom, right = _edges(box, (picture.height, picture.width))
    if top == bottom or left == right:
        raise ValueError(f"the box {tuple(box)} holds no pixel of a picture of {picture.width}x{picture.height}")
    picture = picture.convert("RGB")
    x = np.asarray(picture)
    border = np.concatenate((x[0], x[-1], x[:, 0], x[:, -1])).mean(0)
    canvas = Image.new("RGB", picture.size, tuple(int(c) for c in border.round()))
    mask = Image.new("RGB", picture.size, "white")
    canvas.paste(picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    mask.paste("black", (left, top, right, bottom))
    return canvas, mask


def _edges(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in cells of a picture of `size` (Y, X)."""
    if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise ValueError(f"a box is (y0, x0, y1, x1) with 0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1, got {tuple(box)}")
    y0, x0, y1, x1 = box
    return round(y0 * size[0]), round(x0 * size[1]), round(y1 * size[0]), round(x1 * size[1])


def keep_tokens(keep_BYX: Tensor, layout: Layout) -> Tensor:
    """bool [B, N]: which tokens are kept, from the cells [B, Y, X] (or [Y, X]) to keep at the last level.

    A map in pixels is first brought to the cells of the last level: a cell is kept if all of it is. At each coarser
    level the cells are resized bilinearly and a token is kept above one half; levels of at most three positions are
    kept whole (VAR's zero-shot editing, arXiv 2404.02905). Raises ValueError where the levels are no pictures.
    """
    refuse_other_axes(layout)
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
    for k, (size, count) in enumerate(zip(layout.levels, layout.sizes, strict=True)):
        kept = F.interpolate(keep, size=size, mode="bilinear", align_corners=False) > 0.5
        parts.append(kept.flatten(1) | (count <= SURE and k < layout.K - 1))
    return torch.cat(parts, 1)


def refuse_other_axes(layout: Layout) -> None:
    """ValueError for tokens that do not lie on pictures, of which no mask can tell which are kept."""
    other = [level for level in layout.levels if len(level) != 2]
    if other:
        raise ValueError(
            f"a mask over a picture says nothing about tokens of axes {other[0]}: a part can be painted anew where all "
            f"levels are (Y, X)"
        )
