"""The moving average of weights: a plain dict from name to tensor, updated in one fused call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def start(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float32 copy of the given parameters, the average before the first update."""
    return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def warmed(decay: float, updates: int) -> float:
    """The decay after n updates, `min(decay, (1 + n) / (10 + n))`: short at first, so that the start is forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def update(average: dict[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """`average = decay * average + (1 - decay) * parameters`, in place."""
    names = list(average)
    values = [parameters[name].detach().to(average[name].dtype) for name in names]
    torch._foreach_lerp_([average[name] for name in names], values, 1.0 - decay)


@contextmanager
def swapped(module: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the module holds the averaged weights; afterwards its own, bit for bit."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in average}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
