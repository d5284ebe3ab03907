"""Where autocast rounds, and where it must not: distances to codes, sums over scales, logits."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def unrounded(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which products of tensors on the device of x keep their own number format."""
    if x.is_meta:  # shapes alone: there is no autocast for them
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """The number format in which products of x are computed: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
