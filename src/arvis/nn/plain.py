"""Pre-norm blocks and a head that no condition modulates; the norms of the blocks have no weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arvis.nn.adaln import DropPath
from arvis.nn.trunk import Call
from arvis.nn.wide import unrounded


class PlainBlock(nn.Module):
    """x += attn(norm(x)); [x += cross(norm(x), text);] x += ffn(norm(x))."""

    def __init__(
        self, width: int, *, attn: nn.Module, cross: nn.Module | None, ffn: nn.Module, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.attn, self.cross, self.ffn = attn, cross, ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm(x), call, layer))
        if self.cross is not None:
            x = x + self.cross(self.norm(x), call)
        return x + self.drop_path(self.ffn(self.norm(x)))


class PlainHead(nn.Module):
    """Logits in float32, whatever the condition: linear(norm(x))."""

    project = None

    def __init__(self, width: int, codes: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(width, codes)

    def forward(self, x: Tensor, vector: Tensor | None = None) -> Tensor:
        with unrounded(x):
            return self.linear(self.norm(x if x.dtype == torch.float64 else x.float()))
