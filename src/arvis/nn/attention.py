"""The one attention of the package, and rotary positions. Scaled-dot-product attention is the specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.nn.wide import product_dtype, unrounded

Pairs = Literal["interleaved", "halves"]


@dataclass(frozen=True)
class Mask:
    """A mask bool [B|1, 1, Q, K] made ready for all layers of a call.

    Rows that see nothing are `blind` and, as the softmax of nothing is NaN, see everything in `shown`; None where there
    are none. `causal`: row i of Q = K rows sees those up to itself, which kernels know without reading a mask.
    """

    shown: Tensor
    blind: Tensor | None
    causal: bool

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        """Masks that do not lie on the host, or are compiled, are not looked into."""
        blind = ~mask.any(-1, keepdim=True)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(blind.any()):
            return cls(mask, None, _causal(mask))
        return cls(mask | blind, blind, False)


def _causal(mask: Tensor) -> bool:
    items, _, queries, keys = mask.shape
    if items > 1 or queries != keys or queries == 1 or bool(mask.diagonal(1, -2, -1).any()):
        return False
    return torch.equal(mask[0, 0], torch.ones_like(mask[0, 0]).tril())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T) v over [B, H, R, h]; mask bool [B|1, 1, Q, K], True = visible.

    Keys and values may come in a wider number format than queries. A row that sees nothing gives 0. `dropout` is the
    part of the softmax weights to drop (0 but in training)."""
    seen = Mask.of(mask) if isinstance(mask, Tensor) else mask
    shown, blind, causal = (None, None, False) if seen is None else (seen.shown, seen.blind, seen.causal)
    if q.device.type == "cpu" and _as_products(q, k, v):
        out = _products(q, k, v, shown, scale, dropout)
    elif q.device.type == "cpu" and _in_many_parts(q, k, v) and not dropout:
        out = _in_parts(q, k, v, shown, scale)
    elif k.dtype != q.dtype:  # a cache in a wider format
        with unrounded(q):
            out = F.scaled_dot_product_attention(q.to(k), k, v, attn_mask=shown, scale=scale, dropout_p=dropout).to(q)
    else:
        shown = None if causal else shown
        out = F.scaled_dot_product_attention(q, k, v, shown, dropout, causal, scale=scale)
    return out if blind is None else out.masked_fill(blind, 0)


# Where the fused CPU kernel is not the quickest way, as measured on two cores with AVX-512 (torch 2.13): in bfloat16
# its backward takes up to four times as long as that of the products, and forward it multiplies at a third of the speed
# of the processor; between 16 and 192 queries it works in blocks of 32. Many scores leave the processor's cache.


def _as_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if _needs_backward(q, k, v):
        return _rounded(q) and _scores(q, k) <= 2**22
    return 16 <= q.shape[-2] < 192 and _scores(q, k) <= (PART if _rounded(q) else 2**22)


def _in_many_parts(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return _rounded(q) and q.shape[-2] >= 16 and not _needs_backward(q, k, v)


def _needs_backward(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _rounded(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def _scores(q: Tensor, k: Tensor) -> int:
    return q.shape[:-1].numel() * k.shape[-2]


PART = 2**19
"""Scores that are made at once where they are made in parts."""


def _in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`_products` of some heads of an item at a time, or of some rows of a head, all in the same memory."""
    (items, all_heads, queries, _), keys = q.shape, k.shape[-2]
    rows = min(queries, max(64, PART // keys))
    heads = min(all_heads, max(1, PART // (rows * keys)))
    dtype = product_dtype(q)
    q, k, v = (q * scale).to(dtype), k.to(dtype), v.to(dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    hidden = None
    if mask is not None:
        hidden = q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf")).expand(-1, -1, queries, -1)
    score, weight = q.new_empty(2, heads * rows * keys)
    for b, h, i in product(range(items), range(0, all_heads, heads), range(0, queries, rows)):
        there = slice(h, h + heads), slice(i, i + rows)
        some = q[b][there]
        shape = (*some.shape[:2], keys)
        s, w = (x[: math.prod(shape)].view(shape) for x in (score, weight))
        torch.bmm(some, k[b, there[0]].mT, out=s)
        if hidden is not None:
            s += hidden[b % len(hidden), :, there[1]]
        torch.softmax(s, -1, out=w)
        torch.bmm(w, v[b, there[0]], out=out[b][there])
    return out


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    score = (q * scale).to(k.dtype) @ k.mT
    score = score if mask is None else score.masked_fill(~mask, float("-inf"))
    weight = score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
    return ((F.dropout(weight, dropout) if dropout else weight) @ v).to(q.dtype)


def rotate(x: Tensor, table: Tensor, pairs: Pairs) -> Tensor:
    """Rotate pairs of channels of x [B, H, R, h] by table [B|1, R, h/2, 2] of (cos, sin); float32 inside.

    The table is data: a row of zeros switches a row off (LlamaGen's condition rows)."""
    if pairs == "interleaved" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        turn = torch.view_as_complex(table[:, None].contiguous())  # one product instead of six: a fifth of the time
        wide = torch.view_as_complex(x.to(table.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(wide * turn).flatten(-2).to(x.dtype)
    cos, sin = table[:, None].unbind(-1)
    if pairs == "interleaved":
        a, b = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = x.to(table.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def grid_angles(coords_NA: Tensor, dims: Sequence[int], base: float = 10000.0) -> Tensor:
    """Axial rotary table [1, N, sum(dims)/2, 2] of (cos, sin): dims[a] channels at rates base^(-2i/dims[a])."""
    angles = []
    for axis, dim in enumerate(dims):
        rate = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=coords_NA.device) / dim)
        angles.append(coords_NA[:, axis, None].double() * rate)
    angle = torch.cat(angles, -1)
    return torch.stack((angle.cos(), angle.sin()), -1).float()[None]
