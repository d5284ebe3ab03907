"""Toys that are broken on purpose, each in one way: the laws must tell which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Source
from arvis.rows import same, upto
from arvis.state import Cond, State
from arvis.tokens import Layout, Pin
from toys.fronts import Fronts
from toys.masked import Masked
from toys.next_scale import NextScale
from toys.parts import Block, Toy
from toys.raster import Raster


class Peeks(NextScale):
    """Reads the tokens that it is about to predict."""

    def predict(self, s: State) -> Dist:
        d = super().predict(s)
        peek = self.code(s.tokens[:, d.where[0], 0]) - self.code.weight[0]
        return Categorical(d.where, d.logits + self.head(peek)[:, :, None] - self.head.bias, at=d.at)


class Deaf(NextScale):
    """Does not see the group before."""

    def accumulate(self, f_BDX: Tensor, x_BnS: Tensor) -> Tensor:
        return f_BDX + self.code.weight[0, :, None]


class Elephant(Cache):
    def forget(self, step: int | Tensor) -> None:
        pass


class Repeats(Fronts):
    """Leaves the rows of an earlier prediction of the same step in the cache."""

    def open(
        self, cond: Cond | None, sampling: Any, noise: Source, given: Pin | None, group: Tensor, slots: int = 0
    ) -> State:
        s = super().open(cond, sampling, noise, given, group, slots)
        s.cache = {"trunk": Elephant(len(s), 2 * slots)}
        return s


class Sighted(Block):
    """Attends to everything, whatever the mask says."""

    def mask(self, call: Call) -> Tensor | None:
        return None


class Unmasked(Masked):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(Sighted(8) for _ in range(2))


class Myopic(NextScale):
    """Sees only its own scale step by step, all earlier ones in the one pass."""

    def hidden(self, x_BGRD: Tensor, first: int, last: int, cache: Cache | None = None) -> Tensor:
        self.see = upto if cache is None else same
        return super().hidden(x_BGRD, first, last, cache)


class Amnesia(Cache):
    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen = tuple(x.clone() for x in super().join(layer, k, v))
        self.v[layer].zero_()
        return seen


class Forgets(Fronts):
    """Forgets the values of its cache, but not that they were there."""

    def open(
        self, cond: Cond | None, sampling: Any, noise: Source, given: Pin | None, group: Tensor, slots: int = 0
    ) -> State:
        s = super().open(cond, sampling, noise, given, group, slots)
        s.cache = {"trunk": Amnesia(len(s), slots)}
        return s


class Loud(Categorical):
    def log_prob(self, x_BnS: Tensor) -> Tensor:
        return super().log_prob(x_BnS) + 0.1


class Overstates(NextScale):
    """Says that codes are likelier than they are."""

    def predict(self, s: State) -> Dist:
        d = super().predict(s)
        return Loud(d.where, d.logits, at=d.at)

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        d = super().teacher(tokens, cond, layout)
        return Loud(d.where, d.logits)


class Hot(Categorical):
    def sample(self, noise: Source, pin: Pin | None = None, watch: Any = None) -> Tensor:
        return Categorical(self.where, self.logits / 4, self.at).sample(noise, pin, watch)


class Overheats(NextScale):
    """Draws from another distribution than it states."""

    def predict(self, s: State) -> Dist:
        d = super().predict(s)
        return Hot(d.where, d.logits, at=d.at)


class Swaps(NextScale):
    """Takes the unconditional row for the conditional one."""

    def run(self, x_BGRD: Tensor, call: Call) -> Tensor:
        return super().run(x_BGRD, call).flip(1)


class Ignores(NextScale):
    """Does not look at its condition."""

    def labels(self, cond: Cond | None, items: int, guided: bool) -> Tensor:
        return super().labels(None, items, guided)


class Crowds(NextScale):
    """Draws other numbers in other company."""

    def predict(self, s: State) -> Dist:
        d = super().predict(s)
        return Categorical(d.where, d.logits, at=d.at + 100 * len(s))


class Anchored(Cache):
    def take(self, rows: Tensor) -> Cache:
        return self


class Stays(Raster):
    """Leaves the cache where it was when items move."""

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = super().start(cond, sampling, noise, layout, given)
        s.cache["trunk"] = Anchored(len(s), s.cache["trunk"].slots)
        return s


class Drops(NextScale):
    """Starts from a given prefix without adding it up."""

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = super().start(cond, sampling, noise, layout, given)
        s.more["f"] = torch.zeros_like(s.more["f"])
        return s


class Blanks(Masked):
    """Takes the given tokens for known, but does not look at them."""

    def fill(self, s: State) -> State:
        return s


class Overrides(Fronts):
    """Draws where tokens are given."""

    def open(
        self, cond: Cond | None, sampling: Any, noise: Source, given: Pin | None, group: Tensor, slots: int = 0
    ) -> State:
        whole = given is not None and not bool((given.mask.any(0) ^ given.mask.all(0)).any())
        return super().open(cond, sampling, noise, given if whole else None, group, slots)


class Hoards(Raster):
    """Leaves rejected drafts in the cache."""

    def keep(self, s: State, path_BP: Tensor, tokens_BQ: Tensor) -> None:
        self._append(s, tokens_BQ, (path_BP >= 0).sum(1) + 1)


class Hidden(Raster):
    """Holds a weight that the state dict does not have."""

    def __init__(self) -> None:
        super().__init__()
        begin = self.begin.detach()
        del self.begin
        self.register_buffer("begin", begin, persistent=False)


class Mutant(NamedTuple):
    make: Callable[[], Toy]
    breaks: frozenset[str]


def _breaks(make: Callable[[], nn.Module], *laws: str) -> Mutant:
    return Mutant(make, frozenset(laws))


MUTANTS = {
    "peeks": _breaks(Peeks, "blind"),
    "deaf": _breaks(Deaf, "blind"),
    "repeats": _breaks(Repeats, "again"),
    "unmasked": _breaks(Unmasked, "row"),
    "myopic": _breaks(Myopic, "cache"),
    "forgets": _breaks(Forgets, "cache", "prefill"),
    "overstates": _breaks(Overstates, "mass"),
    "overheats": _breaks(Overheats, "mass"),
    "swaps": _breaks(Swaps, "guidance"),
    "ignores": _breaks(Ignores, "guidance"),
    "crowds": _breaks(Crowds, "seed"),
    "stays": _breaks(Stays, "gather"),
    "drops": _breaks(Drops, "prefill"),
    "blanks": _breaks(Blanks, "prefill"),
    "overrides": _breaks(Overrides, "prefill"),
    "siblings": _breaks(lambda: Raster(see=upto), "window"),
    "hoards": _breaks(Hoards, "window"),
    "hidden": _breaks(Hidden, "round-trip"),
}
"""By name: how to build it, and the laws that it breaks; it keeps all others."""
