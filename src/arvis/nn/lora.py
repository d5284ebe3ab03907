"""LoRA: a frozen linear layer and a trainable product of two thin matrices beside it (arXiv 2106.09685).

    W x + b  ->  W x + b + (alpha / rank) up down x        down [rank, in] random, up [out, rank] zero at first

`adapt` puts `Adapted` layers into any module, `adapters` lists them, `merge` puts plain layers back. A fresh adapter
changes nothing: the same outputs, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of `rank` (0: none), scaled by `alpha` / rank (alpha 0: by 1), on the linear layers whose names hold one
    of `targets` (none given: all). Parameters whose names hold one of `also` are trained whole beside them ("norm")."""

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(f"rank and alpha cannot be negative, got {self.rank} and {self.alpha}")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank if self.alpha else 1.0


class Adapted(nn.Module):
    """A linear layer with a low-rank change, in the place of that layer.

    Networks that call it take the two thin products; those that read its `weight` (fused projections with biases of
    their own) take the sum, W + scale up down.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        with unrounded(self.up):
            return changed(self.base.weight, self.down, self.up, self.scale)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up * self.scale)


def changed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale up down."""
    return weight + scale * (up @ down)


def adapt(module: nn.Module, config: LoraConfig, within: Iterable[nn.Module] | None = None) -> list[str]:
    """Freeze a module and put adapters into it, in place; their names.

    Only adapters, and what `config.also` names, are trained afterwards. `within` leaves everything outside these
    submodules as it is, frozen. Raises ValueError where nothing fits `config.targets` or `config.also`.
    """
    inside = {id(m) for part in ([module] if within is None else within) for m in part.modules()}
    found = {n: m for n, m in module.named_modules() if type(m) is nn.Linear and id(m) in inside}
    chosen = {n: m for n, m in found.items() if not config.targets or any(t in n for t in config.targets)}
    if not chosen:
        raise ValueError(f"no linear layer's name holds one of {config.targets}; there are {_shown(found)}")
    module.requires_grad_(False)
    for name, layer in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, Adapted(layer, config.rank, config.scale))
    whole = {
        f"{n}.{p}".removeprefix("."): parameter
        for n, m in module.named_modules()
        if id(m) in inside and n not in {f"{name}.base" for name in chosen}
        for p, parameter in m.named_parameters(recurse=False)
    }
    for fragment in config.also:
        also = [parameter for name, parameter in whole.items() if fragment in name]
        if not also:
            raise ValueError(f"no parameter's name holds {fragment!r}; there are {_shown(whole)}")
        for parameter in also:
            parameter.requires_grad_(True)
    return list(chosen)


def adapters(module: nn.Module) -> dict[str, Adapted]:
    """The adapters of a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Adapted)}


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Put plain linear layers with the summed weights where the adapters are, in place."""
    for name, layer in adapters(module).items():
        parent, _, own = name.rpartition(".")
        layer.base.weight.copy_(layer.weight)
        setattr(module.get_submodule(parent), own, layer.base.requires_grad_(True))


def _shown(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
