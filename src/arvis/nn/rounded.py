"""Weights in 8 or 4 bits, for memory: activations keep their number format, products round nothing more.

Where the CPU has kernels that read such weights directly, few rows take them, and so many fewer bytes are read;
otherwise the weight is spread out for each product and thrown away again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.nn.packed import Store, cast

GROUP = 32
FEW = 8
"""Rows up to which the kernels are quicker than spreading the weight out (two cores with AVX-512, torch 2.13)."""


class Int8:
    """q = round(w / s) in -127..127 with s = max |w| / 127 of each output channel: one byte a weight."""

    def __init__(self, dense: Tensor) -> None:
        self.scale = (dense.float().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.q = (dense.float() / self.scale).round().to(torch.int8)

    @property
    def bytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def dense(self) -> Tensor:
        return self.q * self.scale

    def linear(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        x, bias = cast(x, bias)
        rows = x.flatten(0, -2)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and 0 < len(rows) <= FEW:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.q, self.scale[:, 0].to(x.dtype))
            out = out.unflatten(0, x.shape[:-1])
            out = out if bias is None else out + bias
        else:
            out = F.linear(x, self.q.to(x.dtype) * self.scale.to(x.dtype), bias)
        return F.gelu(out, approximate="tanh") if gelu else out


class Int4:
    """q in 0..15 and w = s (q - 8) + z, the two numbers for each group of 32 inputs: five bits a weight.

    Two neighbouring inputs share a byte, the first in its low half; or the kernel has its own layout.
    """

    def __init__(self, dense: Tensor) -> None:
        self.shape = dense.shape
        groups = dense.float().unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2)
        # as they are stored, so that rounding to them is all that is lost
        s = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        z = (low + 8 * s.float()).bfloat16()
        q = ((groups - z.float()[..., None]) / s.float()[..., None] + 8).round().clamp(0, 15).flatten(1)
        self.numbers = torch.stack((s, z), -1).transpose(0, 1).contiguous()  # [groups, N, 2]
        self.kernel = dense.device.type == "cpu" and _has_int4(self.shape)
        if self.kernel:
            self.q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        else:
            low_half, high_half = q.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
            self.q = low_half | (high_half << 4)

    @property
    def bytes(self) -> int:
        return self.q.nbytes + self.numbers.nbytes

    def dense(self) -> Tensor:
        if self.kernel:  # its layout is its own affair: what it makes of the unit rows is the weight
            return self._product(torch.eye(self.shape[1], dtype=torch.bfloat16)).T.float()
        q = torch.stack((self.q & 15, self.q >> 4), -1).flatten(1).unflatten(1, (-1, GROUP)).float() - 8
        s, z = (x.T[..., None].float() for x in self.numbers.unbind(-1))
        return (q * s + z).flatten(1)

    def linear(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        x, bias = cast(x, bias)
        rows = x.flatten(0, -2)
        if self.kernel and x.dtype == torch.bfloat16 and 0 < len(rows) <= FEW:
            out = self._product(rows).unflatten(0, x.shape[:-1])
            out = out if bias is None else out + bias
        else:
            out = F.linear(x, self.dense().to(x.dtype), bias)
        return F.gelu(out, approximate="tanh") if gelu else out

    def _product(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.q, GROUP, self.numbers)


def _has_int4(shape: torch.Size) -> bool:
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") and shape[0] % 32 == 0


Bits = Literal["int8", "int4"]
STORES: dict[Bits, Callable[[Tensor], Store]] = {"int8": Int8, "int4": Int4}
