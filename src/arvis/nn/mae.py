"""Masked autoencoders of tokens (arXiv 2111.06377), as MAR has them: an encoder that sees the visible tokens alone, and
a decoder that sees everything, with mask tokens in the gaps.

Both carry P buffer rows in front of the N tokens, into which the condition is written. Every item has its own visible
positions, but all have equally many: rows are gathered, nothing is padded and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arvis.nn.trunk import Call, Trunk
from arvis.tokens import at


class MaskedEncoder(nn.Module):
    """Visible tokens [B, v, S] and buffer rows [B*G, P, D] -> rows [B*G, P + v, D]."""

    def __init__(
        self, blocks: Iterable[nn.Module], *, channels: int, width: int, buffer: int, tokens: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.zeros(1, buffer + tokens, width))
        self.embed_norm = nn.LayerNorm(width, eps)
        self.trunk = Trunk(blocks)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x_BvS: Tensor, where_Bv: Tensor, buffer_RPD: Tensor) -> Tensor:
        """`where` [B, v] are the positions of the tokens x, the same for all G guidance rows of an item."""
        if buffer_RPD.shape[1] != self.buffer:
            raise ValueError(f"the condition fills {self.buffer} buffer rows, got {buffer_RPD.shape[1]}")
        seen = self.embed(x_BvS) + at(self.position[:, self.buffer :].expand(len(x_BvS), -1, -1), where_Bv)
        seen = self.embed_norm(seen)  # the same for every guidance row: computed once
        front = self.embed_norm(buffer_RPD + self.position[:, : self.buffer])
        rows = torch.cat((front, seen.repeat_interleave(len(front) // len(seen), 0)), 1)
        return self.norm(self.trunk(rows, Call()))


class MaskedDecoder(nn.Module):
    """Rows of the encoder -> rows [B*G, n, D] of any of the N tokens, visible or not."""

    def __init__(
        self, blocks: Iterable[nn.Module], *, inner: int, width: int, buffer: int, tokens: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.buffer, self.tokens = buffer, tokens
        self.embed = nn.Linear(inner, width)
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, buffer + tokens, width))
        self.trunk = Trunk(blocks)
        self.norm = nn.LayerNorm(width, eps)
        self.head_position = nn.Parameter(torch.zeros(1, tokens, width))

    def forward(self, h_RkD: Tensor, where_Bv: Tensor, wanted_Bn: Tensor) -> Tensor:
        """h are the buffer rows and the rows of the tokens at `where` [B, v]; the rows at `wanted` [B, n] come out."""
        groups = len(h_RkD) // len(where_Bv)
        where, wanted = (w.repeat_interleave(groups, 0) for w in (where_Bv, wanted_Bn))
        front, seen = self.embed(h_RkD).split((self.buffer, where.shape[1]), 1)
        gaps = self.mask.to(seen.dtype).expand(len(seen), self.tokens, -1)
        rows = gaps.scatter(1, where[..., None].expand(-1, -1, gaps.shape[-1]), seen)
        h = self.trunk(torch.cat((front, rows), 1) + self.position, Call())
        h = self.norm(at(h[:, self.buffer :], wanted))
        return h + at(self.head_position.expand(len(h), -1, -1), wanted)
