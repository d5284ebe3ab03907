"""Ours against the official code: the same weights, the same inputs, alternately, in one process.

A file here is one official repository, given as a folder (`--official DIR`, a plain checkout; nothing of it is kept
here) and offers

    CHECKOUT    the usual name of its folder
    PAIRS       what can be compared: name -> `Pair`

Both sides of a pair are built for one number format. Where official code wants a GPU or a package that is not
installed, `stand_in` puts a plain replacement in its place; it says what it replaces and that it computes the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[int], Tensor]
"""Run a batch of so many pictures; returns what is compared (tokens, latents, logits, pixels)."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Two ways to the same numbers, in one number format."""

    ours: Run
    official: Run


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is compared, and how much of it must agree before a time counts.

    `make(folder, dtype)` builds both sides. `agreement` in [0, 1] is compared with `least` by number format.
    `preset` and `settings` say what is counted for the floor; "" where nothing is.
    """

    make: Callable[[Path, torch.dtype], Sides]
    batches: tuple[int, ...]
    preset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    agreement: Callable[[Tensor, Tensor], float]
    least: dict[torch.dtype, float]


def pictures(batch: int, size: int = 256) -> Tensor:
    """Smooth random pictures [B, 3, size, size] in [-1, 1]."""
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)


def equal_share(a: Tensor, b: Tensor) -> float:
    """The part of equal ids."""
    return float((a == b).float().mean())


def closeness(a: Tensor, b: Tensor) -> float:
    """1 minus the root mean square difference over the deviation of b."""
    return 1 - float((a.float() - b.float()).pow(2).mean().sqrt() / b.float().std())


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    """How official code is run in a number format that is not its weights'."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def without_initialisation() -> None:
    """Layers come up without values: they get random ones at once."""
    for kind in (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Conv2d, nn.Embedding):
        kind.reset_parameters = lambda self: None  # type: ignore[method-assign]


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random values of a size that keeps activations finite and codes far from even: norms one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=min(0.05, parameter[0].numel() ** -0.5), generator=generator)
        elif name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


def stand_in(name: str, **members: Any) -> None:
    """A module under the name of a package that is not installed."""
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def on_path(folder: Path) -> None:
    """Import from an official checkout before anything else."""
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}: --official is a checkout of the official repository")
    sys.path.insert(0, str(folder))
