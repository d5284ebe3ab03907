"""Masked sets: random partitions with a categorical or a flow head, and an order that is found on the way.

All rows go in at once, known ones with step 0 and undecided ones with step NEVER: everybody sees the label and the
known rows, nobody sees an undecided one. No cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arvis.denoise import euler
from arvis.dist import Categorical, Dist, Solved
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import cosine_counts, members, random_sets
from arvis.rows import Rows, render, upto
from arvis.sampling import lowest, mix
from arvis.state import Cond, State
from arvis.tokens import NEVER, Layout, Pin, Space
from toys.parts import Toy, put


class Masked(Toy):
    """Random sets, independent codes inside a set."""

    def __init__(self, space: Space | None = None, counts: tuple[int, ...] = (1, 1, 2)) -> None:
        super().__init__(space or Space(sizes=(3,)), Layout(((sum(counts),),)))
        self.counts = counts
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
        s = self.open(cond, sampling, noise, given, random_sets(self.counts, noise))
        s.k = s.k + s.given_groups()
        if given is not None:
            s.tokens = torch.where(s.known[..., None], given.value, s.tokens)
        return s

    def predict(self, s: State) -> Dist:
        k = s.at()
        where = members(s.group, k)
        logits = self.head(self.rows(s))
        logits = logits.gather(2, where[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3]))
        return Categorical(where, self.filter(s, mix(logits, s.weight(k))[:, :, None]), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        put(s, d.where, x_BnS)
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


class Guess(Categorical):
    """Codes for all undecided positions, of which a part is kept: the joint has no closed form."""

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        raise NotImplementedError("which guesses are kept depends on the guesses")


class Confident(Masked):
    """Every step guesses all undecided positions and keeps the most confident ones; `group` is filled on the way."""

    def __init__(self) -> None:
        super().__init__(counts=cosine_counts(5, 3))

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.open(cond, sampling, noise, given, torch.full((1, self.layout.n), NEVER, dtype=torch.int32))
        s.K = len(self.counts)
        return s

    def predict(self, s: State) -> Dist:
        k = s.at()
        where = (s.group == NEVER).nonzero()[:, 1].view(len(s), -1)
        logits = self.head(self.rows(s))
        logits = logits.gather(2, where[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3]))
        return Guess(where, self.filter(s, mix(logits, s.weight(k))[:, :, None]), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        k = s.at()
        chosen = Categorical.log_prob(d, x_BnS) - s.noise.uniform("rank", k, d.where.shape[1:]).log()
        pin = s.pin(d.where)
        if pin is not None:
            chosen = chosen.masked_fill(pin.mask, float("inf"))
        best = lowest(-chosen, self.counts[k])
        put(s, d.where[best].view(len(s), -1), x_BnS[best].view(len(s), -1, 1))
        s.group.scatter_(1, d.where, torch.where(best, k, NEVER).int())
        s.k = s.k + 1

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        raise NotImplementedError("trained as the toy with random sets")
