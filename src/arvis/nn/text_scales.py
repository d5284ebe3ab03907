"""The transformer over scales that text starts and nothing modulates (arXiv 2406.10797); positions are rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.cache import Cache
from arvis.nn.plain import PlainBlock, PlainHead
from arvis.nn.scales import Condition, Conditioner
from arvis.nn.stable import StableSampler
from arvis.nn.trunk import Call, Trunk
from arvis.rows import Rows, See, render
from arvis.tokens import Layout


class TextScaleTransformer(nn.Module):
    """The transformer over scales: embed, blocks, head. Text starts the sequence, nothing is modulated."""

    def __init__(
        self,
        conditioner: Conditioner,
        blocks: Sequence[PlainBlock],
        head: PlainHead,
        sampler: StableSampler | None,
        *,
        layout: Layout,
        channels: int,
        width: int,
        table: Tensor,
        level_rows: bool = True,
        class_rows: int = 0,
    ) -> None:
        super().__init__()
        self.layout, self.width = layout, width
        self.table = table
        self.conditioner: Conditioner = conditioner
        self.word = nn.Linear(channels, width)
        self.start_position = nn.Parameter(torch.zeros(1, layout.sizes[0], width))
        self.level = nn.Embedding(layout.K, width) if level_rows else None
        self.classes = nn.Embedding(class_rows, width) if class_rows else None
        """Compat: in every official file, and never read."""
        self.trunk = Trunk(blocks)
        self.head = head
        self.sampler = sampler

    def embed(self, c: Condition, x_BNC: Tensor | None, first: int, last: int) -> Tensor:
        """Input rows [B*G, R, D] of scales first..last-1; x holds their features, without scale 0."""
        rows = [c.start[:, None] + self.start_position] if first == 0 else []
        if x_BNC is not None:
            word = self.word(x_BNC)  # the same for every guidance row: multiplied once
            rows.append(word.repeat_interleave(len(c.start) // len(word), 0))
        x = torch.cat(rows, 1)
        if self.level is None:
            return x
        return x + self.level(self._levels(first, last).to(x.device))

    def forward(
        self,
        c: Condition,
        x_BNC: Tensor | None,
        first: int,
        last: int,
        see: See,
        cache: Cache | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Hidden rows [B*G, R, D] of scales first..last-1, over the cache where there is one; only of the positions
        `kept` [B, R] where they are given."""
        x, step = self.embed(c, x_BNC, first, last), self._levels(first, last)
        table = self.table[:, self.layout.offsets[first] : self.layout.offsets[last]]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, self.width))
            step, table = step[kept.cpu()], table[0][kept.cpu()]
        rows = Rows.of(step)
        # nothing reads the rows of the last scale later, so they take no slot of the cache
        mask = render(see, rows, rows) if cache is None else cache.place(see, rows, keep=last < self.layout.K)
        call = Call(mask=mask, table=self._precise(table), cache=cache, context=c.context, rows=rows)
        return self.trunk(x, call)

    def once(self, c: Condition) -> Condition:
        """What of the condition is made once for all steps: nothing, as nothing is modulated."""
        return c

    def stable(self, h: Tensor, placed_BnC: Tensor, pooled: Tensor, first: int, last: int) -> Tensor:
        """The sampler's logits [B*G, n, V] of scales first..last-1, from their hidden rows and placed code vectors."""
        if self.sampler is None:
            raise ValueError("this model has no sampler: configure sampler_from, or draw tokens independently")
        span = slice(self.layout.offsets[first], self.layout.offsets[last])
        table = torch.cat((self.table[:, :1], self.table[:, span]), 1)
        return self.sampler(h, placed_BnC, pooled, self._levels(first, last), self._precise(table))

    def _levels(self, first: int, last: int) -> Tensor:
        return self.layout.level_N[self.layout.offsets[first] : self.layout.offsets[last]]

    def _precise(self, table: Tensor) -> Tensor:
        return table.to(torch.promote_types(self.start_position.dtype, torch.float32))

    def init_weights(self) -> None:
        """VAR's initialisation: small heads, residual outputs scaled with depth."""
        std, depth = (1 / (3 * self.width)) ** 0.5, len(self.trunk)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        parts: list[Any] = [self] if self.sampler is None else [self, self.sampler]
        with torch.no_grad():
            for part in parts:
                nn.init.trunc_normal_(part.start_position, std=std)
                part.head.linear.weight *= 0.02
                for block in part.trunk.blocks:
                    block.attn.out.weight /= (2 * depth) ** 0.5
                    block.ffn.down.weight /= (2 * depth) ** 0.5
