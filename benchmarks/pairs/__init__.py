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
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from arvis import systems
from arvis.noise import Noise

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
    A `preset`, what is `changed` in its configuration, and `settings` say what is counted for the floor and for memory;
    nothing where it is "". Where a pair is a `part` of a generation, `part(system, batch)` is the call that is counted.
    """

    make: Callable[[Path, torch.dtype], Sides]
    batches: tuple[int, ...]
    preset: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    part: Callable[[Any, int], Callable[[], Any]] | None = None
    agreement: Callable[[Tensor, Tensor], float]
    least: dict[torch.dtype, float]

    def generation(self) -> tuple[str, Any, dict[str, Any]]:
        """What is counted and measured: a system, its configuration, its sampling settings."""
        slug, _, preset = systems.preset(self.preset)
        return slug, replace(preset.config(), **self.changed), {**preset.sampling, **self.settings}


def known() -> dict[str, str]:
    """Names of pairs, and the files they are in."""
    files = [file.stem for file in sorted(Path(__file__).parent.glob("*.py")) if not file.stem.startswith("_")]
    return {name: stem for stem in files for name in import_module(f"benchmarks.pairs.{stem}").PAIRS}


def named(name: str) -> Pair:
    """A pair by its name."""
    return import_module(f"benchmarks.pairs.{known()[name]}").PAIRS[name]


def encode(system: Any, batch: int) -> Callable[[], Any]:
    """Of a system on the meta device: pictures of 256 pixels to tokens."""
    images = torch.zeros(batch, 3, 256, 256, device="meta")
    return lambda: system.tokenizer.encode(images)


def decode(system: Any, batch: int) -> Callable[[], Any]:
    """Of a system on the meta device: tokens to pictures."""
    s = system.start(None, system.Sampling(), Noise.of(0, batch, "meta"))
    return lambda: system.tokenizer.decode(s.tokens, s.layout)


def inference(dtype: torch.dtype, *, ours: Run, official: Run) -> Sides:
    """Two sides without gradients, under the autocast of a number format."""

    def within(run: Run) -> Run:
        @torch.inference_mode()
        def same(batch: int) -> Tensor:
            with autocast(dtype):
                return run(batch)

        return same

    return Sides(ours=within(ours), official=within(official))


def updated(loss: Tensor, module: nn.Module, layer: nn.Linear) -> Tensor:
    """The loss and a slice of the gradient of a layer, after one pass back."""
    module.zero_grad()
    loss.backward()
    assert layer.weight.grad is not None
    return torch.cat((loss.detach().view(1), layer.weight.grad[:4].flatten()))


def ids(batch: int, n: int, codes: int) -> Tensor:
    """Random tokens [B, n, 1] below `codes`."""
    return (Noise.of(1, batch).uniform("ids", 0, (n, 1)) * codes).long()


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


def same_update(a: Tensor, b: Tensor) -> float:
    """The closeness of two updates by `updated`: of their losses or of their gradients, whichever is less."""
    return min(1 - float((a[0] - b[0]).abs() / b[0].abs()), closeness(a[1:], b[1:]))


def near_pixels(a: Tensor, b: Tensor) -> float:
    """The part of pixels in [0, 1] within 1/50."""
    return float(((a - b).abs() < 0.02).float().mean())


EXACT = {torch.float32: 0.99, torch.bfloat16: 0.0}
"""Greedy paths part for good at the first near tie, so rounded ones are only told apart, not required to agree."""

CLOSE = {torch.float32: 0.99, torch.bfloat16: 0.9}
"""What is computed in one pass, without draws."""


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
