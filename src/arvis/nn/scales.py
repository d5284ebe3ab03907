"""The transformer over the scales of a pyramid, as VAR has it (arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.adaln import AdaLNBlock, AdaLNHead
from arvis.nn.cache import Cache
from arvis.nn.trunk import Call, Trunk
from arvis.rows import Rows, See, render
from arvis.tokens import Layout


class Condition(NamedTuple):
    """A condition as the transformer takes it: the start row, the modulation input, and what cross-attention reads."""

    start: Tensor
    vector: Tensor
    context: tuple[Tensor, Tensor | None] | None = None


def stacked(rows: Sequence[Condition]) -> dict[str, Tensor]:
    """Conditions of G guidance rows as the tensors [B, G, ...] of a state."""
    out = {"start": torch.stack([r.start for r in rows], 1), "vector": torch.stack([r.vector for r in rows], 1)}
    if rows[0].context is not None:
        out["context"] = torch.stack([r.context[0] for r in rows if r.context], 1)
        out["visible"] = torch.stack([r.context[1] for r in rows if r.context and r.context[1] is not None], 1)
    return out


def unstacked(more: Mapping[str, Tensor]) -> Condition:
    """The condition [B*G, ...] in the tensors of a state."""
    context = (more["context"].flatten(0, 1), more["visible"].flatten(0, 1)) if "context" in more else None
    return Condition(more["start"].flatten(0, 1), more["vector"].flatten(0, 1), context)


class Conditioner(Protocol):
    """An nn.Module from raw conditions to a `Condition`; `prepare` reads the names in `conditions` from a request."""

    conditions: tuple[str, ...]

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]: ...
    def __call__(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition: ...


class ScaleTransformer(nn.Module):
    """The transformer over scales: embed, blocks, head. The conditioner and the blocks are given.

    `layout` has the scales whose positions are learned, `channels` and `codes` are the tokenizer's; with `shared` one
    projection of the condition modulates all blocks (their modulations must be `SharedModulation`).
    """

    def __init__(
        self,
        conditioner: Conditioner,
        blocks: Sequence[AdaLNBlock],
        *,
        layout: Layout,
        channels: int,
        codes: int,
        width: int,
        shared: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.layout, self.width = layout, width
        self.conditioner: Conditioner = conditioner
        self.word = nn.Linear(channels, width)
        self.start_position = nn.Parameter(torch.zeros(1, layout.sizes[0], width))
        self.position = nn.Parameter(torch.zeros(1, layout.n, width))
        self.level = nn.Embedding(layout.K, width)
        self.shared = nn.Linear(width, 6 * width) if shared else None
        self.trunk = Trunk(blocks)
        self.head = AdaLNHead(width, codes, eps)

    def embed(self, c: Condition, x_BNC: Tensor | None, first: int, last: int) -> Tensor:
        """Input rows [B*G, R, D] of scales first..last-1; x holds their features, without scale 0."""
        rows = []
        if first == 0:
            rows.append(c.start[:, None] + self.start_position)
        if x_BNC is not None:
            word = self.word(x_BNC)  # the same for every guidance row: multiplied once
            rows.append(word.repeat_interleave(len(c.start) // len(word), 0))
        span = slice(self.layout.offsets[first], self.layout.offsets[last])
        level = self.level(self.layout.level_N[span].to(self.position.device))
        return torch.cat(rows, 1) + self.position[:, span] + level

    def forward(
        self, c: Condition, x_BNC: Tensor | None, first: int, last: int, see: See, cache: Cache | None = None
    ) -> Tensor:
        """Hidden rows [B*G, R, D] of scales first..last-1, over the cache where there is one."""
        x = self.embed(c, x_BNC, first, last)
        rows = Rows.of(self.layout.level_N[self.layout.offsets[first] : self.layout.offsets[last]])
        # nothing reads the rows of the last scale later, so they take no slot of the cache
        mask = render(see, rows, rows) if cache is None else cache.place(see, rows, keep=last < self.layout.K)
        vector = c.vector
        if self.shared is not None:
            vector = self.shared(F.silu(c.vector)).view(-1, 6, self.width)
        return self.trunk(x, Call(mask=mask, cache=cache, vector=vector, context=c.context))

    def init_weights(self, gate: float) -> None:
        """VAR's initialisation: gates scaled by `gate`, a small head, residual outputs scaled with depth."""
        width, depth, std = self.width, len(self.trunk), (1 / (3 * self.width)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for position in (self.start_position, self.position):
            nn.init.trunc_normal_(position, std=std)
        with torch.no_grad():
            self.head.linear.weight *= 0.02
            self.head.project.weight *= 0.5
            for block in self.trunk.blocks:
                block.attn.out.weight /= (2 * depth) ** 0.5
                block.ffn.down.weight /= (2 * depth) ** 0.5
                vectors = block.modulation.vectors
                vectors[: 2 * width] *= gate
                vectors[2 * width :] *= 0.5
