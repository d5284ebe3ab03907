"""The type of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Reward(Protocol):
    """Pictures [B, 3, Y, X] (uint8, or float in [-1, 1]) and what was asked for each -> float64 [B], more is better."""

    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor: ...
