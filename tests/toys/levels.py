"""Levels of a one-dimensional code, each drawn at once; two sub-tokens per position, drawn one after the other.

The rows that predict level k are the tokens of level k - 1, filled up with special rows; all have step k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Chain, Dist
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import by_level
from arvis.rows import Rows, render, upto
from arvis.sampling import mix
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin, Space
from toys.parts import Toy, put


class Levels(Toy):
    def __init__(self, sizes: tuple[int, ...] = (2, 3)) -> None:
        super().__init__(Space(sizes=sizes), Layout(((1,), (1,), (2,))))
        self.first, self.second = nn.Embedding(sizes[0], 8), nn.Embedding(sizes[1], 8)
        self.special = nn.Parameter(torch.randn(self.layout.n, 8))
        self.position = nn.Parameter(torch.randn(self.layout.n, 8))
        self.heads = nn.ModuleList(nn.Linear(8, v) for v in sizes)

    def inputs(self, label_BGD: Tensor, tokens: Tensor, first: int, last: int) -> Tensor:
        """Rows [B, G, R, D] of levels first..last-1."""
        code = (self.first(tokens[..., 0]) + self.second(tokens[..., 1]))[:, None].expand(
            -1, label_BGD.shape[1], -1, -1
        )
        rows = []
        for k in range(first, last):
            before = code[:, :, self.layout.span(k - 1)] if k else label_BGD[:, :, None]
            more = self.layout.sizes[k] - before.shape[2]
            special = self.special[self.layout.offsets[k] :][:more].expand(*label_BGD.shape[:2], -1, -1)
            rows.append(torch.cat((before, special), 2) + self.position[self.layout.span(k)])
        return torch.cat(rows, 2)

    def next_logits(self, z_BnD: Tensor, drawn_Bns: Tensor) -> Tensor:
        """Logits of sub-token s, padded with -inf to the larger alphabet."""
        s = drawn_Bns.shape[-1]
        logits = self.heads[s](torch.tanh(z_BnD + self.first(drawn_Bns[..., 0])) if s else z_BnD)
        return F.pad(logits, (0, max(self.space.sizes) - logits.shape[-1]), value=float("-inf"))

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.open(cond, sampling, noise, given, by_level(self.layout), slots=self.layout.offsets[-2])
        for k in range(s.given_groups()):
            where = torch.arange(self.layout.n)[None, self.layout.span(k)]
            self.commit(s, Categorical(where, torch.empty(0)), given.at(where).value)
        return s

    def predict(self, s: State) -> Dist:
        k, cache = s.at(), s.cache["trunk"]
        cache.forget(k)
        first = self.layout.offsets.index(cache.end)
        x = self.inputs(s.more["label"], s.tokens, first, k + 1)
        steps = self.layout.level_N[self.layout.offsets[first] : self.layout.offsets[k + 1]]
        mask = cache.place(upto, Rows.of(steps), keep=k < s.K - 1)
        z = self.run(x, Call(mask=mask, cache=cache))[:, :, -self.layout.sizes[k] :]
        where = torch.arange(self.layout.n)[None, self.layout.span(k)]
        return Chain(where, mix(z, s.weight(k)), self.next_logits, depth=2, at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        put(s, d.where, x_BnS)
        s.k = s.k + 1

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Chain:
        x = self.inputs(self.labels(cond, len(tokens), False), tokens, 0, self.layout.K)
        rows = Rows.of(self.layout.level_N)
        z = self.run(x, Call(mask=render(upto, rows, rows)))[:, 0]
        return Chain(torch.arange(self.layout.n)[None], z, self.next_logits, depth=2)

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        return {"loss": -self.teacher(batch["tokens"], self.prepare(batch)).log_prob(batch["tokens"]).mean()}
