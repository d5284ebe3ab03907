"""Neighbour fronts: a cell's logits are the mean of what its left and upper neighbours say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import fronts, members
from arvis.rows import Rows, render, upto
from arvis.sampling import mix
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin, Space
from toys.parts import Toy, put


class Fronts(Toy):
    def __init__(self, side: tuple[int, int] = (2, 3), codes: int = 2) -> None:
        super().__init__(Space(sizes=(codes,)), Layout((side,)))
        self.code = nn.Embedding(codes, 8)
        self.right, self.below = nn.Linear(8, codes), nn.Linear(8, codes)
        self.position = nn.Parameter(torch.randn(self.layout.n, 8))
        self.width = side[1]

    def cells(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Rows [B, 1, n, D] of the tokens at positions where [1, n]."""
        return (self.code(tokens[:, where[0], 0]) + self.position[where[0]])[:, None]

    def meet(self, h_BGRD: Tensor, from_: Tensor, to: Tensor) -> Tensor:
        """Logits [B, G, n, V] of cells `to` from the rows of cells `from_` (-1: the label's row, which is both
        neighbours of the first cell)."""
        cells = from_.tolist()
        right, below = self.right(h_BGRD), self.below(h_BGRD)
        out = []
        for p in to.tolist():
            row, column = divmod(p, self.width)
            left = cells.index(p - 1) if column else (0 if p == 0 else None)
            upper = cells.index(p - self.width) if row else (0 if p == 0 else None)
            said = [x[:, :, i] for x, i in ((right, left), (below, upper)) if i is not None]
            out.append(torch.stack(said).mean(0))
        return torch.stack(out, 2)

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.open(cond, sampling, noise, given, fronts(self.layout), slots=self.layout.n)
        for k in range(s.given_groups()):
            where = members(s.group[:1], k)
            self.commit(s, Categorical(where, torch.empty(0)), given.at(where).value)
        return s

    def predict(self, s: State) -> Dist:
        k, cache = s.at(), s.cache["trunk"]
        cache.forget(k)
        fed = int(cache.step[cache.step < k].max()) if cache.end else -1  # the last step in the cache
        x, step, from_ = [], [], torch.tensor([-1])
        for j in range(fed + 1, k + 1):
            from_ = members(s.group[:1], j - 1)[0] if j else torch.tensor([-1])
            label = s.more["label"]
            x.append(self.cells(s.tokens, from_[None]).expand(-1, label.shape[1], -1, -1) if j else label[:, :, None])
            step += [j] * len(from_)
        mask = cache.place(upto, Rows.of(torch.tensor(step)))
        h = self.run(torch.cat(x, 2), Call(mask=mask, cache=cache))[:, :, -len(from_) :]
        where = members(s.group[:1], k)
        logits = self.filter(s, mix(self.meet(h, from_, where[0]), s.weight(k))[:, :, None])
        return Categorical(where, logits, at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        put(s, d.where, x_BnS)
        s.k = s.k + 1

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        every = torch.arange(self.layout.n)
        x = torch.cat((self.labels(cond, len(tokens), False)[:, :, None], self.cells(tokens, every[None])), 2)
        rows = Rows.of(torch.cat((torch.zeros(1), fronts(self.layout)[0] + 1)))
        h = self.run(x, Call(mask=render(upto, rows, rows)))
        logits = self.meet(h, torch.arange(-1, self.layout.n), every)
        return Categorical(every[None], logits[:, 0][:, :, None])

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        return {"loss": -self.teacher(batch["tokens"], self.prepare(batch)).log_prob(batch["tokens"]).mean()}
