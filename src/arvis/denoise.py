"""Solvers: from noise to a sample along a field. A solver that calls a small head and one that calls the whole trunk
differ only in what `field` closes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from arvis.diffusion import Diffusion
from arvis.noise import Source
from arvis.tokens import Pin

Field = Callable[[Tensor, float], Tensor]
"""(x [B, n, S] float64, t) -> the direction at time t, same shape; what a solver wants beside it comes behind it on the
last axis. The field casts x to what its network takes."""

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


def ddpm(diffusion: Diffusion, temperature: float | Tensor = 1.0) -> Solver:
    """Ancestral sampling of DDPM with learned variances (arXiv 2102.09672), from the last step of `diffusion` to 0.

    The field is told the step as the network knows it (`diffusion.times`) and answers [B, n, 2 S]: the noise in x, then
    the share of the log variance. `temperature` (one, or one per item [B]) scales the noise of every step, not the one
    at the start. Pinned positions are clamped to the noisy data of their own start noise before every field call, and
    to the data at the end. Estimates of the clean sample are not clipped.
    """

    def solve(
        field: Field, noise: Source, at: int | Tensor, shape: Sequence[int], pin: Pin | None, watch: Watch | None
    ) -> Tensor:
        start = noise.normal("solver", at, shape)
        heat = torch.as_tensor(temperature, dtype=start.dtype).to(start.device).view(-1, 1, 1)

        def clamp(x: Tensor, clean: Callable[[Tensor], Tensor]) -> Tensor:
            if pin is None:
                return x
            return torch.where(pin.mask.to(x.device)[..., None], clean(pin.value.to(x)), x)

        x = start
        for i, t in enumerate(reversed(range(len(diffusion)))):
            x = clamp(x, lambda value, t=t: diffusion.noisy(value, start, t))
            eps, share = field(x, diffusion.times[t]).to(x).chunk(2, -1)
            x0 = diffusion.clean(x, eps, t)
            if watch is not None:
                watch(x0, i, len(diffusion))
            x = diffusion.mean(x, x0, t)
            if t > 0:
                fresh = noise.normal(f"solver/{i}", at, shape)
                x = x + heat * (diffusion.log_variance(share, t) / 2).exp() * fresh
        return clamp(x, lambda value: value)

    return solve
