"""Masked sets: random partitions with a categorical or a flow head, and an order that is found on the way.

All rows go in at once, known ones with step 0 and undecided ones with step NEVER: everybody sees the label and the
known rows, nobody sees an undecided one. No cache. Given tokens are known from the start, and the schedule runs over
the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arvis.denoise import euler
from arvis.dist import Categorical, Dist, Guess, Solved
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import hidden_counts, members, sets_around
from arvis.rows import Rows, render, upto
from arvis.sampling import confidence, lowest, mix
from arvis.state import Cond, State
from arvis.tokens import NEVER, Layout, Pin, Space
from toys.parts import Toy, put


class Masked(Toy):
    """Random sets, independent codes inside a set."""

    def __init__(self, space: Space | None = None, n: int = 4, steps: int = 3) -> None:
        super().__init__(space or Space(sizes=(3,)), Layout(((n,),)))
        self.steps = steps
        self.hidden = nn.Parameter(torch.randn(8))
        self.position = nn.Parameter(torch.randn(self.layout.n, 8))
        codes = self.space.sizes[0] if self.space.sizes else 0
        self.code = nn.Embedding(codes, 8) if codes else nn.Linear(self.space.width, 8)
        self.head = nn.Linear(8, codes) if codes else nn.Linear(8 + self.space.width + 1, self.space.width)

    def rows(self, s: State) -> Tensor:
        """Hidden rows [B, G, N, D] over the label and the known tokens."""
        code = self.code(s.tokens[..., 0] if self.space.sizes else s.tokens)
        x = torch.where(s.known[..., None], code, self.hidden) + self.position
        label = s.more["label"]
        x = torch.cat((label[:, :, None], x[:, None].expand(-1, label.shape[1], -1, -1)), 2)
        step = torch.where(s.known, 0, NEVER)
        rows = Rows.of(torch.cat((torch.zeros_like(step[:, :1]), step), 1))
        return self.run(x, Call(mask=render(upto, rows, rows)))[:, :, 1:]

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        sets = sets_around(self.known(given, noise), self.steps, noise)
        return self.fill(self.open(cond, sampling, noise, given, sets))

    def known(self, given: Pin | None, noise: Source) -> Tensor:
        return torch.zeros(len(noise), self.layout.n, dtype=torch.bool) if given is None else given.mask

    def fill(self, s: State) -> State:
        """With the given tokens in place."""
        if s.given is not None:
            s.tokens = torch.where(s.known[..., None], s.given.value, s.tokens)
        return s

    def predict(self, s: State) -> Dist:
        k = s.at()
        where = members(s.group, k)
        logits = self.head(self.rows(s))
        logits = logits.gather(2, where[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3]))
        return Categorical(where, self.filter(s, mix(logits, s.weight(k))[:, :, None]), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        s.put(d.where, x_BnS)
        s.k = s.k + 1

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        s = self.start(self.prepare(batch), self.Sampling.plain(), noise)
        put(s, torch.arange(self.layout.n)[None], batch["tokens"])
        s.k = s.k + 1
        d = self.predict(s)
        x = batch["tokens"].gather(1, d.where[..., None].expand(-1, -1, self.space.S))
        return {"loss": -d.log_prob(x).mean()}


class MaskedFlow(Masked):
    """Random sets of real vectors, each drawn by a small flow head on its hidden row."""

    def __init__(self) -> None:
        super().__init__(Space(width=2))

    def predict(self, s: State) -> Dist:
        k = s.at()
        where = members(s.group, k)
        z = self.rows(s)
        z = z.gather(2, where[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3]))

        def field(x: Tensor, t: float) -> Tensor:
            x = x.to(z)[:, None].expand(-1, z.shape[1], -1, -1)
            return mix(self.head(torch.cat((z, x, torch.full_like(x[..., :1], t)), -1)), s.weight(k))

        return Solved(where, field, euler((0, 0.25, 0.5, 1)), (where.shape[1], 2), at=k)


class Confident(Masked):
    """Every step guesses all undecided positions and keeps the most confident ones; `group` is filled on the way."""

    def __init__(self) -> None:
        super().__init__(n=5)

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        known = self.known(given, noise)
        s = self.open(cond, sampling, noise, given, torch.where(known, -1, NEVER).int())
        s.K = self.steps
        s.more["hidden"] = hidden_counts((~known).sum(1), self.steps)
        return self.fill(s)

    def predict(self, s: State) -> Dist:
        k = s.at()
        logits = mix(self.head(self.rows(s)), s.weight(k))[:, :, None]
        return Guess(torch.arange(self.layout.n)[None], self.filter(s, logits), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        k, undecided = s.at(), s.group == NEVER
        score = confidence(d.marginal(x_BnS), 1.0, s.noise.uniform("rank", k, (self.layout.n,)))
        stay = undecided & lowest(score.masked_fill(~undecided, float("inf")), s.more["hidden"][:, k])
        s.group = torch.where(undecided & (~stay if k < s.K - 1 else True), k, s.group)
        s.put(d.where, x_BnS)
        s.k = s.k + 1

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        raise NotImplementedError("trained as the toy with random sets")
