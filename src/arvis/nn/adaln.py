"""Pre-norm transformer blocks modulated by a condition vector (AdaLN, arXiv 2212.09748), in VAR's arrangement.

A block is given its parts; rotary positions come with the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.attention import attend, rotate
from arvis.nn.packed import gelu
from arvis.nn.trunk import Call
from arvis.nn.wide import unrounded

Look = Callable[[Tensor, Tensor, Tensor, Call, float], Tensor]
"""softmax(scale q k^T) v [R, H, n, h] over the keys that each query sees, of q, k, v, the call and the scale."""


def masked(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
    """What the mask of the call shows."""
    return attend(q, k, v, call.mask, scale)


class SelfAttention(nn.Module):
    """Multi-head attention; query and value have a bias, the key has none (it cancels in the softmax).

    Queries and keys go through `temperature`, then are rotated where the call has a table. `look` may know a shorter
    way to what the mask shows.
    """

    def __init__(self, width: int, heads: int, temperature: Temperature, look: Look = masked) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        self.temperature, self.look = temperature, look

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [R, H, n, h]
        q, k = self.temperature(q, k)
        if call.table is not None:
            q, k = rotate(q, call.table, "interleaved"), rotate(k, call.table, "interleaved")
        if call.cache is not None:
            k, v = call.cache.join(layer, k, v)
        return self.out(self.look(q, k, v, call, self.temperature.scale).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the rows over the context of the call (text); `kv` maps it to keys and values side by side."""

    def __init__(self, width: int, heads: int, kv: nn.Module, temperature: Temperature) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = kv
        self.out = nn.Linear(width, width)
        self.temperature = temperature

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if call.context is None:
            raise ValueError("a cross-attention block needs a context in its call, got None")
        context, visible = call.context
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.temperature(q, k)
        mask = None if visible is None else visible[:, None, None, :]
        return self.out(attend(q, k, v, mask, self.temperature.scale).transpose(1, 2).flatten(2))


class KeyValue(nn.Module):
    """Keys without and values with a bias, side by side: [..., E] -> [..., 2 D]."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, context: Tensor) -> Tensor:
        return F.linear(context, self.linear.weight, torch.cat((torch.zeros_like(self.v_bias), self.v_bias)))


class Temperature(Protocol):
    """How queries and keys are brought to the softmax: (q, k) -> (q, k), whose product is multiplied by `scale`."""

    scale: float

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]: ...


class CosineTemperature(nn.Module):
    """Cosine attention: q and k of length one, with a learned scale per head of at most 100 (arXiv 2111.09883)."""

    scale = 1.0

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.log_scale.clamp_max(math.log(100.0)).exp()
        return (F.normalize(q, dim=-1) * scale).to(k.dtype), F.normalize(k, dim=-1).to(k.dtype)


class FixedTemperature(nn.Module):
    """The plain product times a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up, x))


class OwnModulation(nn.Module):
    """Six vectors of a block from the condition [R, D] by a projection of its own -> [R, 6, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(width, 6 * width)

    @property
    def vectors(self) -> Tensor:
        """The weights behind the six vectors, [6 D, ...]."""
        return self.project.weight

    def forward(self, vector: Tensor) -> Tensor:
        return self.project(F.silu(vector)).view(-1, 6, self.width)


class SharedModulation(nn.Module):
    """Six vectors of a block: a learned offset to the projection [R, 6, D] that the whole network shares."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(nn.init.normal_(torch.empty(1, 6, width), std=width**-0.5))

    @property
    def vectors(self) -> Tensor:
        """The weights behind the six vectors, [6 D, ...]."""
        return self.offset.view(-1, 1)

    def forward(self, vector: Tensor) -> Tensor:
        return self.offset + vector


class DropPath(nn.Module):
    """Skip a residual branch for random items in training (arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class AdaLNBlock(nn.Module):
    """x += g1 attn(norm(x) (1 + s1) + b1); [x += cross(norm(x), context);] x += g2 ffn(norm(x) (1 + s2) + b2).

    `cross_norm` stands before the cross-attention where it is not the plain one. Stochastic depth skips the modulated
    branches.
    """

    def __init__(
        self,
        width: int,
        *,
        modulation: nn.Module,
        attn: nn.Module,
        ffn: nn.Module,
        cross: nn.Module | None = None,
        cross_norm: nn.Module | None = None,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.modulation = modulation
        self.attn = attn
        self.cross = cross
        self.cross_norm = cross_norm
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        g1, g2, s1, s2, b1, b2 = call.modulated(self.modulation, layer)
        x = x + self.drop_path(g1 * self.attn(self.norm(x) * (1 + s1) + b1, call, layer))
        if self.cross is not None:
            x = x + self.cross((self.norm if self.cross_norm is None else self.cross_norm)(x), call)
        return x + self.drop_path(g2 * self.ffn(self.norm(x) * (1 + s2) + b2))


class AdaLNHead(nn.Module):
    """Logits in float32: linear(norm(x) (1 + scale) + shift), scale and shift from the condition vector."""

    def __init__(self, width: int, codes: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.project = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, codes)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        with unrounded(x):
            wide = x if x.dtype == torch.float64 else x.float()
            scale, shift = self.project(F.silu(vector.to(wide.dtype)))[:, None].chunk(2, -1)
            return self.linear(self.norm(wide) * (1 + scale) + shift)
