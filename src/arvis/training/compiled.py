"""torch.compile by a flag, and plain execution where the machine cannot compile."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

_log = logging.getLogger("arvis")
F = TypeVar("F", bound=Callable[..., object])


def missing(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, in words, or None."""
    names = [os.environ.get("CXX") or "g++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        return "no C++ compiler (g++ or clang++) was found"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def compiled(loss: F, blocks: Iterable[nn.Module], device: torch.device) -> F:
    """Compile `blocks` in place, or the whole loss where none are given; one log line and no change if impossible."""
    lack = missing(device)
    if lack is not None:
        _log.warning("torch.compile is off: %s; training goes on without it", lack)
        return loss
    blocks = list(blocks)
    for block in blocks:
        block.compile()
    return loss if blocks else torch.compile(loss)  # type: ignore[return-value]
