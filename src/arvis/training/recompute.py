"""Activation checkpointing (arXiv 1604.06174): blocks keep their inputs alone and run again in the backward pass.

What autograd would keep of every block is then kept of one at a time, for one more forward pass per update. Torch's
generators are put back for the second run, so dropout, and with it every gradient, is the same bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(parts: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Within the context, the modules in the lists of `parts` (the blocks of a trunk, the stages of a decoder) are run
    again in the backward pass. ValueError where there are none."""
    found = list(dict.fromkeys(block for part in parts for block in listed(part)))
    if not found:
        raise ValueError("activation_checkpointing runs lists of blocks again, and the module names none; leave it out")
    return _applied(found)


@contextlib.contextmanager
def _applied(found: list[nn.Module]) -> Iterator[None]:
    for block in found:
        block.forward = partial(_run, block.forward)
    try:
        yield
    finally:
        for block in found:
            del block.forward  # that of the class is back


def listed(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of all module lists inside a module, of those with parameters."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList):
            yield from listed(child)
        elif any(True for _ in child.parameters()):
            yield child


def _run(forward: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)
