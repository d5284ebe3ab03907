"""What the loop tells its listener after every update; drawing a bar from it is the command line's business."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One finished update: `step` of `steps`, its metrics, the speed over the last seconds, the memory so far.

    `tokens_per_second` is 0 where it is not known how many tokens an item has.
    """

    step: int
    steps: int
    batch: int
    metrics: dict[str, float]
    images_per_second: float
    tokens_per_second: float
    peak_mb: float
    eta_seconds: float

    @property
    def line(self) -> str:
        """A short line for a progress bar: the loss, the speed, the peak of memory, the time left."""
        hours, rest = divmod(round(self.eta_seconds), 3600)
        left = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
        tokens = f", {self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ""
        speed = f"{self.images_per_second:.1f} images/s{tokens}"
        return f"loss {self.metrics['loss']:.4f}, {speed}, {self.peak_mb:.0f} MB, {left} left"


OnStep = Callable[[StepInfo], None]


def peak_mb(device: torch.device) -> float:
    """The most memory so far, in MB: of a GPU what tensors took, else what was resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Speed:
    """Steps per second, averaged over about the last `memory` steps, without the first one (which warms up)."""

    def __init__(self, memory: int = 20) -> None:
        self._memory = memory
        self._seconds: list[float] = []
        self._first = True

    def add(self, seconds: float) -> None:
        """Record the duration of one step."""
        if self._first:
            self._first = False
            self._seconds = [seconds]
            return
        if len(self._seconds) == 1 and self._seconds[0] > 2 * seconds:
            self._seconds = []
        self._seconds = [*self._seconds, seconds][-self._memory :]

    @property
    def per_second(self) -> float:
        """Steps per second; 0 before the first step."""
        return len(self._seconds) / max(sum(self._seconds), 1e-9) if self._seconds else 0.0
