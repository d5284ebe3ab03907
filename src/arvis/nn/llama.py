"""Llama's block (arXiv 2302.13971): RMSNorm before each part, rotary attention with grouped keys, a gated network."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.attention import attend, grid_angles, rotate
from arvis.nn.trunk import Call
from arvis.tokens import Layout


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 and rounded, then times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], None, self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def swiglu_width(width: int, multiple: int = 256, factor: float | None = None) -> int:
    """Llama's size of a gated network: two thirds of four times the width, times `factor`, rounded up."""
    hidden = int(2 * 4 * width / 3)
    hidden = hidden if factor is None else int(factor * hidden)
    return -(-hidden // multiple) * multiple


class LlamaAttention(nn.Module):
    """Attention, queries and keys rotated by the table of the call; `kv_heads` keys and values serve all heads.

    `qkv` holds the rows of queries, keys and values, in this order.
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        if width % heads or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, and heads the width; got {kv_heads}, {heads} and {width}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        rows = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [R, H, n, h]
        turned, v = rows.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if call.table is not None:
            turned = rotate(turned, call.table, "interleaved")
        q, k = turned.split((self.heads, self.kv_heads), dim=1)
        if call.cache is not None:
            k, v = call.cache.join(layer, k, v)
        else:
            v = v.contiguous()  # a view would keep queries and keys from before their rotation for the backward pass
        if self.kv_heads < self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        return self.out(attend(q, k, v, call.mask, self.head_dim**-0.5).transpose(1, 2).flatten(2))


class LlamaBlock(nn.Module):
    """x += attn(norm(x)); x += ffn(norm(x)); what is added passes `dropout` in training."""

    def __init__(
        self, width: int, heads: int, *, hidden: int, kv_heads: int = 0, eps: float = 1e-5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attn = LlamaAttention(width, heads, kv_heads or heads)
        self.ffn = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), call, layer))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@lru_cache(maxsize=64)
def rotary_grid(layout: Layout, prefix: int, dim: int, base: float = 10000.0, still: bool = False) -> Tensor:
    """Rotary table [1, prefix + N, dim/2, 2] of heads of `dim` channels: half for rows, half for columns.

    The rows of the prefix are zeros, which switch queries and keys off (LlamaGen: every query weighs the condition
    rows alike, and they speak through their values alone), or, if `still`, (1, 0): not rotated.
    """
    axes = layout.coords_NA.shape[1]
    if dim % (2 * axes):
        raise ValueError(f"heads of {dim} channels do not pair up along {axes} axes; use a multiple of {2 * axes}")
    with torch.inference_mode(False):  # kept tables also serve training
        grid = grid_angles(layout.coords_NA, (dim // axes,) * axes, base)
        lead = grid.new_tensor([1.0 if still else 0.0, 0.0]).expand(1, prefix, dim // 2, 2)
        return torch.cat((lead, grid), 1)
