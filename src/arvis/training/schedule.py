"""Learning-rate and weight-decay schedules as pure functions of the step, and the parameters that are not decayed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from torch import Tensor

Schedule = Literal["lin0", "cosine", "constant"]


def warm(step: int, warmup: int, start: float = 0.005) -> float:
    """The warm-up factor: linear from `start` at step 0 to 1 at step `warmup`, then 1."""
    return 1.0 if step >= warmup else start + (1.0 - start) * step / warmup


def lin0(step: int, steps: int, warmup: int, final: float = 0.01, start: float = 0.005) -> float:
    """VAR's schedule (arXiv 2404.02905, official code): warm-up, flat for 5% of the rest, then linear to `final`."""
    done = _done(step, steps, warmup)
    if step < warmup or done < 0.05:
        return warm(step, warmup, start)
    return final + (1.0 - final) * (1.0 - done) / 0.95


def cosine(step: int, steps: int, warmup: int, final: float = 0.0, start: float = 0.005) -> float:
    """Warm-up, then half a cosine from 1 to `final`."""
    if step < warmup:
        return warm(step, warmup, start)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _done(step, steps, warmup)))


def factor(name: Schedule, step: int, steps: int, warmup: int, final: float) -> float:
    """The factor of the learning rate at `step` (0 is the first update) of a run of `steps` updates."""
    if name == "lin0":
        return lin0(step, steps, warmup, final)
    if name == "cosine":
        return cosine(step, steps, warmup, final)
    if name == "constant":
        return warm(step, warmup)
    raise ValueError(f"unknown schedule {name!r}; expected lin0, cosine or constant")


def decay(step: int, steps: int, first: float, last: float | None) -> float:
    """Weight decay at `step`: half a cosine from `first` to `last` over the run; constant where `last` is None."""
    if last is None:
        return first
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * _done(step, steps, 0)))


def decayed(name: str, parameter: Tensor, no_decay: tuple[str, ...] = ()) -> bool:
    """Whether weight decay applies: never to biases and other 1-d tensors, nor to names holding a given fragment."""
    return parameter.ndim > 1 and not name.endswith("bias") and not any(fragment in name for fragment in no_decay)


def groups(named: Iterable[tuple[str, Tensor]], no_decay: tuple[str, ...] = ()) -> list[dict[str, object]]:
    """Two optimiser groups of the given parameters, `decay` True and False; an empty one is left out."""
    named = list(named)
    split = [{"params": [p for n, p in named if decayed(n, p, no_decay) is d], "decay": d} for d in (True, False)]
    return [group for group in split if group["params"]]


def _done(step: int, steps: int, warmup: int) -> float:
    """The part of the run after the warm-up that is over, 0 to 1."""
    return min(max((step - warmup) / max(steps - 1 - warmup, 1), 0.0), 1.0)
