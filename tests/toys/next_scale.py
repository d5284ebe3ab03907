"""Next scale: one-dimensional pyramids whose next input is the sum of all upsampled levels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import by_level
from arvis.rows import Rows, See, render, upto
from arvis.sampling import mix
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin, Space
from toys.parts import Toy, put


class NextScale(Toy):
    def __init__(self, see: See = upto, codes: int = 2) -> None:
        super().__init__(Space(sizes=(codes,)), Layout(((1,), (2,), (3,))))
        self.see = see
        self.code, self.head = nn.Embedding(codes, 8), nn.Linear(8, codes)
        self.position = nn.Parameter(torch.randn(self.layout.n, 8))

    def accumulate(self, f_BDX: Tensor, x_BnS: Tensor) -> Tensor:
        return f_BDX + F.interpolate(self.code(x_BnS[..., 0]).mT, size=f_BDX.shape[2], mode="linear")

    def inputs(self, label_BGD: Tensor, tokens: Tensor, first: int, last: int) -> Tensor:
        """Rows [B, G, R, D] of levels first..last-1; reads the tokens of levels below last - 1."""
        f, rows = tokens.new_zeros(len(tokens), 8, self.layout.sizes[-1], dtype=self.position.dtype), []
        for k in range(last):
            if k >= first:
                size = self.layout.sizes[k]
                x = F.adaptive_avg_pool1d(f, size).mT[:, None].expand(-1, label_BGD.shape[1], -1, -1)
                rows.append(x + label_BGD[:, :, None] if k == 0 else x)
            if k < last - 1:
                f = self.accumulate(f, tokens[:, self.layout.span(k)])
        return torch.cat(rows, 2) + self.position[self.layout.offsets[first] : self.layout.offsets[last]]

    def hidden(self, x_BGRD: Tensor, first: int, last: int, cache: Cache | None = None) -> Tensor:
        rows = Rows.of(self.layout.level_N[self.layout.offsets[first] : self.layout.offsets[last]])
        mask = render(self.see, rows, rows) if cache is None else cache.place(self.see, rows, keep=last < self.layout.K)
        return self.run(x_BGRD, Call(mask=mask, cache=cache))

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.open(cond, sampling, noise, given, by_level(self.layout), slots=self.layout.offsets[-2])
        s.more["f"] = torch.zeros(len(s), 8, self.layout.sizes[-1], dtype=self.position.dtype)
        for k in range(s.given_groups()):
            where = torch.arange(self.layout.n)[None, self.layout.span(k)]
            self.commit(s, Categorical(where, torch.empty(0)), given.at(where).value)
        return s

    def predict(self, s: State) -> Dist:
        k, cache = s.at(), s.cache["trunk"]
        cache.forget(k)
        first = self.layout.offsets.index(cache.end)
        if first == k > 0:
            x = F.adaptive_avg_pool1d(s.more["f"], self.layout.sizes[k]).mT[:, None]
            x = x.expand(-1, s.more["label"].shape[1], -1, -1) + self.position[self.layout.span(k)]
        else:
            x = self.inputs(s.more["label"], s.tokens, first, k + 1)
        h = self.hidden(x, first, k + 1, cache)[:, :, -self.layout.sizes[k] :]
        logits = self.filter(s, mix(self.head(h), s.weight(k))[:, :, None])
        return Categorical(torch.arange(self.layout.n)[None, self.layout.span(k)], logits, at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        put(s, d.where, x_BnS)
        s.more["f"] = self.accumulate(s.more["f"], x_BnS)
        s.k = s.k + 1

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        x = self.inputs(self.labels(cond, len(tokens), False), tokens, 0, self.layout.K)
        h = self.hidden(x, 0, self.layout.K)
        return Categorical(torch.arange(self.layout.n)[None], self.head(h[:, 0])[:, :, None])

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        return {"loss": -self.teacher(batch["tokens"], self.prepare(batch)).log_prob(batch["tokens"]).mean()}
