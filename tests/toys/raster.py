"""Next token in raster order, with a two-row prefix, windows of drafts and items at different steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.attention import grid_angles
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.orders import raster
from arvis.rows import Rows, See, depths, render, tree, tree_tags
from arvis.sampling import mix
from arvis.state import Cond, State
from arvis.tokens import NEVER, Layout, Pin, Space
from toys.parts import Toy

T = 2
"""Prefix rows (label, start) of steps -1 and 0; the row of step t lies in slot t + T - 1."""


class Raster(Toy):
    def __init__(self, side: tuple[int, int] = (2, 2), codes: int = 3, see: See = tree) -> None:
        super().__init__(Space(sizes=(codes,)), Layout((side,)))
        self.see = see
        self.begin = nn.Parameter(torch.randn(8))
        self.code, self.head = nn.Embedding(codes, 8), nn.Linear(8, codes)
        table = F.pad(grid_angles(self.layout.coords_NA, (2, 2)), (0, 0, 0, 0, T, 0))
        self.register_buffer("table", table)  # prefix rows are switched off by rows of zeros

    # -- rows -----------------------------------------------------------------------------------------------------

    def rows(self, label_BGD: Tensor, tokens: Tensor) -> Tensor:
        """Input rows of all steps, [B, G, T + N, D]."""
        start = self.begin.expand_as(label_BGD)
        codes = self.code(tokens[..., 0])[:, None].expand(-1, label_BGD.shape[1], -1, -1)
        return torch.cat((label_BGD[:, :, None], start[:, :, None], codes), 2)

    def feed(self, s: State, x_BGRD: Tensor, step_BR: Tensor, rows: Rows, at_BR: Tensor) -> Tensor:
        cache = s.cache["trunk"]
        mask = cache.place(self.see, rows, at=at_BR)
        table = self.table[0, (step_BR + T - 1).clamp(max=self.table.shape[1] - 1)]
        return self.run(x_BGRD, Call(mask=mask, table=table, cache=cache))

    def logits(self, s: State, h_BGRD: Tensor, step_BR: Tensor) -> Tensor:
        return self.filter(s, mix(self.head(h_BGRD), s.weight(step_BR)))

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.open(cond, sampling, noise, given, raster(self.layout), slots=T + self.layout.n)
        s.ragged = True
        if given is not None:
            s.k = given.mask.long().cumprod(1).sum(1)
            s.tokens = torch.where(s.known[..., None], given.value, s.tokens)
        return s

    def predict(self, s: State) -> Dist:
        cache = s.cache["trunk"]
        cache.forget(s.k)
        first = cache.filled - T + 1  # the step of the first row that is not cached
        step = first[:, None] + torch.arange(int((s.k - first).max()) + 1)
        index = (step + T - 1).clamp(max=T + self.layout.n - 1)
        x = self.rows(s.more["label"], s.tokens)
        x = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        rows = Rows.of(torch.where(step <= s.k[:, None], step, NEVER))  # rows past an item's step are padding
        cache.reserve(int(step.max()) + T)
        h = self.feed(s, x, step, rows, step + T - 1)
        last = (s.k - first)[:, None, None, None].expand(-1, *h.shape[1:2], 1, h.shape[3])
        logits = self.logits(s, h.gather(2, last), s.k[:, None])
        return Categorical(s.k.clamp(max=self.layout.n - 1)[:, None], logits[:, :, None], at=s.k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self._append(s, x_BnS[..., 0], torch.ones_like(s.k))

    def _append(self, s: State, tokens_BQ: Tensor, count_B: Tensor) -> None:
        """Write the first count tokens of each item at its own end, as far as there is room."""
        to = s.k[:, None] + torch.arange(tokens_BQ.shape[1])
        live = (to < s.K) & (to < (s.k + count_B)[:, None])
        item = torch.arange(len(s))[:, None].expand_as(to)
        s.tokens[item[live], to[live], 0] = tokens_BQ[live]
        s.k = (s.k + count_B).clamp(max=s.K)

    # -- one pass, windows, loss ----------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        x = self.rows(self.labels(cond, len(tokens), False), tokens)[:, :, :-1]
        rows = Rows.of(torch.arange(1 - T, self.layout.n))
        h = self.run(x, Call(mask=render(self.see, rows, rows), table=self.table[:, :-1]))
        return Categorical(torch.arange(self.layout.n)[None], self.head(h[:, 0, T - 1 :])[:, :, None])

    def window(self, s: State, drafts_BL: Tensor, parent_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        items, count = drafts_BL.shape
        cache = s.cache["trunk"]
        cache.forget(s.k)
        if bool((cache.filled < s.k + T - 1).any()):
            self.predict(s)  # feeds what is pending; the row of step k comes again below
            cache.forget(s.k)
        if parent_BL is None:
            parent_BL = torch.arange(-1, count - 1).expand(items, -1)
        step = s.k[:, None] + F.pad(depths(parent_BL), (1, 0))
        tag = F.pad(tree_tags(parent_BL), (1, 0))
        root = self.rows(s.more["label"], s.tokens)
        root = root.gather(2, (s.k + T - 1)[:, None, None, None].expand(-1, root.shape[1], 1, root.shape[3]))
        x = torch.cat((root, self.code(drafts_BL)[:, None].expand(-1, root.shape[1], -1, -1)), 2)
        at = (s.k + T - 1)[:, None] + torch.arange(count + 1)
        cache.reserve(int(at.max()) + 1)
        h = self.feed(s, x, step, Rows.of(step, tag), at)
        return Categorical(step, self.logits(s, h, step)).probs, h

    def keep(self, s: State, path_BP: Tensor, tokens_BQ: Tensor) -> None:
        s.cache["trunk"].keep(s.k + T, path_BP)
        self._append(s, tokens_BQ, (path_BP >= 0).sum(1) + 1)

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        return {"loss": -self.teacher(batch["tokens"], self.prepare(batch)).log_prob(batch["tokens"]).mean()}
