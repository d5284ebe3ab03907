"""Blocks of real vectors, each drawn by a solver that calls the whole trunk over a cache of clean blocks.

The clean rows of a block are written once, for one guidance row (they carry no label), and read at every solver step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arvis.denoise import euler
from arvis.dist import Dist, Solved
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import blocks, members
from arvis.rows import CLEAN, NOISY, Rows, clean_noisy, render
from arvis.sampling import mix
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin, Space
from toys.parts import Toy, put

TIMES = (0, 0.25, 0.5, 1)


class CleanNoisy(Toy):
    def __init__(self, n: int = 6, block: int = 2) -> None:
        super().__init__(Space(width=2), Layout(((n,),)))
        self.block = block
        self.code, self.head, self.time = nn.Linear(2, 8), nn.Linear(8, 2), nn.Linear(1, 8)
        self.position = nn.Parameter(torch.randn(n, 8))

    def noisy(self, x_BnS: Tensor, t: float, label_BGD: Tensor, where: Tensor) -> Tensor:
        """Rows [B, G, n, D] of noisy vectors: they alone carry time and label."""
        time = self.time(torch.full((1,), t, dtype=label_BGD.dtype))
        return (self.code(x_BnS.to(label_BGD)) + self.position[where[0]] + time)[:, None] + label_BGD[:, :, None]

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        order = blocks(self.layout, (self.block,))
        s = self.open(cond, sampling, noise, given, order, slots=self.layout.n - self.block)
        s.k = s.k + s.given_groups()
        if given is not None:
            s.tokens = torch.where(s.known[..., None], given.value, s.tokens)
        return s

    def predict(self, s: State) -> Dist:
        k, cache = s.at(), s.cache["trunk"]
        cache.forget(k)
        pending = torch.arange(cache.end, k * self.block)[None]
        if pending.numel():  # clean rows of blocks that are not cached yet: once, without label, one guidance row
            clean = (self.code(s.tokens[:, pending[0]]) + self.position[pending[0]])[:, None]
            mask = cache.place(clean_noisy, Rows.of(s.group[:1, pending[0]] + 1, CLEAN))
            self.run(clean, Call(mask=mask, cache=cache))
        where = members(s.group[:1], k)
        rows = Rows.of(s.group[:1, where[0]], NOISY)
        label, weight = s.more["label"], s.weight(k)

        def field(x: Tensor, t: float) -> Tensor:
            call = Call(mask=cache.place(clean_noisy, rows, keep=False), cache=cache)
            return mix(self.head(self.run(self.noisy(x, t, label, where), call)), weight)

        return Solved(where, field, euler(TIMES), (self.block, 2), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        put(s, d.where, x_BnS)
        s.k = s.k + 1

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Solved:
        """The field of all blocks at once, over [clean | noisy] rows."""
        every = torch.arange(self.layout.n)[None]
        order = blocks(self.layout, (self.block,))
        rows = Rows(torch.cat((order + 1, order), 1), torch.tensor([[CLEAN] * self.layout.n + [NOISY] * self.layout.n]))
        label = self.labels(cond, len(tokens), False)
        clean = (self.code(tokens) + self.position)[:, None]

        def field(x: Tensor, t: float) -> Tensor:
            both = torch.cat((clean, self.noisy(x, t, label, every)), 2)
            return self.head(self.run(both, Call(mask=render(clean_noisy, rows, rows))))[:, 0, self.layout.n :]

        return Solved(every, field, euler(TIMES), (self.layout.n, 2))

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        x0, x1 = noise.normal("loss", 0, batch["tokens"].shape[1:]), batch["tokens"]
        d = self.teacher(x1, self.prepare(batch))
        return {"loss": (d.field((x0 + x1) / 2, 0.5) - (x1 - x0)).square().mean()}
