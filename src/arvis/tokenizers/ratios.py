"""Scale lists for every shape of a picture (Infinity, arXiv 2412.04431): 15 ratios of height to width, four sizes.

The list of a ratio is one: a smaller size is its beginning. A cell is 16 x 16 pixels.
"""

from __future__ import annotations

import math

from arvis.tokens import Layout

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""How many scales the sizes have; named by their pixels, those of squares of 256, 512, 768 and 1024."""

_TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}

_Scales = tuple[tuple[int, int], ...]


def _read(text: str) -> _Scales:
    pairs = (cell.split("x") for cell in text.split())
    return tuple((int(h), int(w)) for h, w in pairs)


RATIOS: dict[float, _Scales] = {ratio: _read(text) for ratio, text in _TALL.items()}
"""The whole lists by height / width; of wide pictures they are the tall ones turned, their ratio cut after 3 digits."""
RATIOS |= {math.floor(1000 / r) / 1000: tuple((w, h) for h, w in RATIOS[r]) for r in _TALL if r != 1.0}


def scales_for(ratio: float, size: str = "1M") -> Layout:
    """The list of the ratio of height to width that is nearest to the given one; ValueError for an unknown size."""
    if size not in SIZES or not ratio > 0:
        raise ValueError(f"sizes are {', '.join(SIZES)} and ratios positive, got size {size!r} and ratio {ratio}")
    nearest = min(RATIOS, key=lambda r: abs(ratio - r))
    return Layout(RATIOS[nearest][: SIZES[size]])


def scales_to(last: tuple[int, ...]) -> Layout | None:
    """The list whose last scale has this size, if there is one."""
    lists = (scales[:n] for scales in RATIOS.values() for n in SIZES.values())
    return next((Layout(scales) for scales in lists if scales[-1] == last), None)


def whole(layout: Layout) -> Layout | None:
    """The list at its largest size, of a layout that is one of its sizes; None for any other layout."""
    lists = (scales for scales in RATIOS.values() if scales[: layout.K] == layout.levels)
    return next((Layout(scales) for scales in lists if layout.K in SIZES.values()), None)
