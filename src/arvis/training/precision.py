"""Which number format a device trains in, why, and the one place where it is applied.

Master weights, optimiser and averages stay in float32. Inside `Precision.around()` torch's autocast runs matrix
products, convolutions and attention in `dtype`. What must stay in float32 (losses, norms, softmax over codes, quantiser
distances) says so where it is computed, with `.float()`: autocast's own list differs between devices.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Choice = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number format of matrix products on a device, and the reason in words."""

    device: str
    dtype: torch.dtype
    reason: str

    def around(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the loss is computed."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)


def pick(device: torch.device | str = "cpu", choice: Choice = "auto") -> Precision:
    """bfloat16 where the device has it and it pays, else float32; on a CPU this is measured, for 0.3 seconds at most.

    `choice` other than "auto" is obeyed. Raises ValueError for an unknown choice.
    """
    kind = torch.device(device).type
    if choice == "float32":
        return Precision(device=kind, dtype=torch.float32, reason="float32 as asked")
    if choice == "bfloat16":
        return Precision(device=kind, dtype=torch.bfloat16, reason="bfloat16 as asked")
    if choice != "auto":
        raise ValueError(f"precision is auto, float32 or bfloat16, got {choice!r}")
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            return Precision(device=kind, dtype=torch.bfloat16, reason=f"bfloat16: {name} has it in hardware")
        return Precision(device=kind, dtype=torch.float32, reason="float32: this GPU has no bfloat16")
    if kind != "cpu":
        return Precision(device=kind, dtype=torch.float32, reason=f"float32: the rule knows cpu and cuda, not {kind}")
    unit = _cpu_unit()
    if unit is None:
        missing = "float32: this CPU has neither AMX-BF16 nor AVX512-BF16"
        return Precision(device=kind, dtype=torch.float32, reason=missing)
    slow, fast = (_gigaflops(dtype) for dtype in (torch.float32, torch.bfloat16))
    measured = f"{fast:.0f} GFLOP/s in bfloat16 ({unit}) against {slow:.0f} in float32"
    if fast > 1.3 * slow:
        return Precision(device=kind, dtype=torch.bfloat16, reason=f"bfloat16: {measured}")
    return Precision(device=kind, dtype=torch.float32, reason=f"float32: bfloat16 does not pay, {measured}")


def _cpu_unit() -> str | None:
    """The CPU's bfloat16 unit, or None."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        flags = set()
    if torch.cpu._is_amx_tile_supported() and (not flags or "amx_bf16" in flags):
        return "AMX"
    return "AVX512-BF16" if "avx512_bf16" in flags else None


def _gigaflops(dtype: torch.dtype, seconds: float = 0.15, size: int = 512) -> float:
    """The best speed of a few square matrix products, in 1e9 operations per second."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
