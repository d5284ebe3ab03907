"""A sequence of any length as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arvis.nn.adaln import KeyValue
from arvis.nn.attention import attend


class AttentivePool(nn.Module):
    """Attention of one learned query per head over a sequence: [B, T, E] and visible [B, T] -> [B, D]."""

    def __init__(self, context_width: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.query = nn.Parameter(torch.empty(heads, width // heads))
        self.kv = KeyValue(context_width, width)
        self.out = nn.Linear(width, width)
        nn.init.trunc_normal_(self.query, std=(1 / (3 * width)) ** 0.5)

    def forward(self, context: Tensor, visible: Tensor) -> Tensor:
        heads, dim = self.query.shape
        k, v = self.kv(context).unflatten(-1, (2, heads, dim)).permute(2, 0, 3, 1, 4)
        q = self.query[:, None].to(k.dtype).expand(len(k), -1, -1, -1)
        return self.out(attend(q, k, v, visible[:, None, None], dim**-0.5).flatten(1))
