"""Tiny systems, one per way of drawing groups, all through the interfaces of the library."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arvis.rows import tree, window
from toys.clean_noisy import CleanNoisy
from toys.fronts import Fronts
from toys.levels import Levels
from toys.masked import Confident, Masked, MaskedFlow
from toys.next_scale import NextScale
from toys.parts import Toy
from toys.raster import Raster

TOYS: dict[str, Callable[[], Toy]] = {
    "raster": Raster,
    "raster-window": lambda: Raster(side=(1, 5), codes=2, see=lambda q, k: tree(q, k) & window(2)(q, k)),
    "next-scale": NextScale,
    "fronts": Fronts,
    "levels": Levels,
    "masked": Masked,
    "masked-flow": MaskedFlow,
    "confident": Confident,
    "clean-noisy": CleanNoisy,
}


def toy(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Toy:
    """A toy with fixed random weights."""
    torch.manual_seed(seed)
    return TOYS[name]().to(dtype).eval()
