"""Solvers: from noise to a sample along a field. A solver that calls a small head and one that calls the whole trunk
differ only in what `field` closes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from arvis.noise import Source
from arvis.tokens import Pin

Field = Callable[[Tensor, float], Tensor]
"""(x [B, n, S] float64, t) -> the direction at time t, same shape; the field casts x to what its network takes."""

Watch = Callable[[Tensor, int, int], None]
"""(estimate of the clean sample, step, steps): previews inside a long solve; raising cancels it."""

Solver = Callable[[Field, Source, "int | Tensor", Sequence[int], Pin | None, Watch | None], Tensor]
"""(field, noise, at, shape [n, S], pin, watch) -> [B, n, S]; the state of a solve is float64 wherever it runs."""


def euler(times: Sequence[float]) -> Solver:
    """Rectified flow by Euler steps: x_t = (1 - t) noise + t data, field = d x_t / d t, times rising from 0 to 1.

    Pinned positions are clamped to their own straight path before every field call, and to the data at the end.
    """
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(a >= b for a, b in pairwise(times)):
        raise ValueError(f"euler needs times rising from 0 to 1, got {tuple(times)}")

    def solve(
        field: Field, noise: Source, at: int | Tensor, shape: Sequence[int], pin: Pin | None, watch: Watch | None
    ) -> Tensor:
        start = noise.normal("solver", at, shape)

        def clamp(x: Tensor, t: float) -> Tensor:
            if pin is None:
                return x
            mask, value = pin.mask.to(x.device), pin.value.to(x)
            return torch.where(mask[..., None], (1 - t) * start + t * value, x)

        x = start
        for i, (t, t_next) in enumerate(pairwise(times)):
            x = clamp(x, t)
            velocity = field(x, t).to(x)
            if watch is not None:
                watch(x + (1 - t) * velocity, i, len(times) - 1)
            x = x + (t_next - t) * velocity
        return clamp(x, 1.0)

    return solve
