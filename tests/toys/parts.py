"""What the toys share: a block, a tokenizer, guided conditions and the opening of a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from arvis.nn.attention import attend, rotate
from arvis.nn.cache import Cache
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Source
from arvis.sampling import cfg, per_item, temper, top_k
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin, Space

LABELS = 3


@dataclass(frozen=True, kw_only=True)
class ToySampling:
    cfg_scale: float = 2.0
    temperature: float = 0.9
    top_k: int = 0

    @classmethod
    def plain(cls) -> Self:
        return cls(cfg_scale=1.0, temperature=1.0)


class Block(nn.Module):
    """Pre-norm attention and a small MLP; rotary where the call has a table."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if call.table is not None:
            q, k = rotate(q, call.table, "interleaved"), rotate(k, call.table, "interleaved")
        if call.cache is not None:
            k, v = call.cache.join(layer, k, v)
        x = x + self.out(attend(q, k, v, self.mask(call), q.shape[-1] ** -0.5).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.norm2(x))))

    def mask(self, call: Call) -> Tensor | None:
        return call.mask


class Blank:
    """A tokenizer whose pictures are the tokens, -1 where nothing is known."""

    def __init__(self, space: Space, layout: Layout) -> None:
        self.space, self._layout = space, layout

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout:
        return self._layout

    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        return x

    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        return tokens if known is None else tokens.where(known[..., None], -1)


class Toy(nn.Module):
    """Label table (the last row is "no label"), trunk, and the part of `start` that is the same everywhere."""

    Sampling = ToySampling
    conditions = ("class_labels",)

    def __init__(self, space: Space, layout: Layout, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.space, self.layout = space, layout
        self.tokenizer = Blank(space, layout)
        self.label = nn.Embedding(LABELS + 1, width)
        self.trunk = Trunk(Block(width) for _ in range(depth))

    def prepare(self, request: dict[str, Any]) -> Cond:
        return {"class_labels": torch.as_tensor(request["class_labels"])}

    def labels(self, cond: Cond | None, items: int, guided: bool) -> Tensor:
        """Label embeddings [B, G, D]."""
        null = torch.full((items,), LABELS)
        rows = [null if cond is None else cond["class_labels"], null]
        return self.label(torch.stack(rows[: 1 + guided], 1))

    def open(
        self, cond: Cond | None, sampling: Any, noise: Source, given: Pin | None, group: Tensor, slots: int = 0
    ) -> State:
        items, layout = len(noise), self.layout
        scale = per_item(sampling.cfg_scale, items)
        guided = bool((scale != 1).any())
        weights = torch.stack(cfg(scale) if guided else (torch.ones_like(scale),), -1)[:, None]
        dtype = torch.int64 if self.space.sizes else self.label.weight.dtype
        return State(
            tokens=torch.zeros(items, layout.n, self.space.S, dtype=dtype),
            group=group.expand(items, -1).clone(),
            k=torch.zeros(items, dtype=torch.int64),
            K=int(group.max()) + 1,
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=weights,
            knobs={name: per_item(getattr(sampling, name), items) for name in ("temperature", "top_k")},
            given=given,
            cache={"trunk": Cache(items, slots)} if slots else {},
            more={"label": self.labels(cond, items, guided)},
        )

    def filter(self, s: State, logits: Tensor) -> Tensor:
        return top_k(temper(logits, s.knobs["temperature"]), s.knobs["top_k"])

    def run(self, x_BGRD: Tensor, call: Call) -> Tensor:
        """The trunk over guidance rows, [B, G, R, D]."""
        return self.trunk(x_BGRD.flatten(0, 1), call).unflatten(0, x_BGRD.shape[:2])


def put(s: State, where: Tensor, x_BnS: Tensor) -> None:
    """Write tokens at positions where [B|1, n]."""
    index = where.expand(len(s), -1)[..., None].expand(-1, -1, x_BnS.shape[-1])
    s.tokens.scatter_(1, index, x_BnS.to(s.tokens.dtype))
