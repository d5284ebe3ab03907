"""A system under examination, and how its states and distributions are turned into numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from arvis.dist import Dist, Solved
from arvis.noise import Noise
from arvis.state import Cond, State, System
from arvis.systems import system as module_of
from arvis.tokens import Pin, at
from arvis.walk import walk

REQUEST = {"class_labels": [0, 1, 2], "prompt": ["a red apple", "two dogs", "a blue square left of a dog"]}
"""Three items; a system's `prepare` takes what it needs."""


class LawBroken(AssertionError):
    """A law does not hold: the message names the law, the system and the numbers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A system to examine: `make(seed)` builds it with random weights, in float64 unless precision is the question."""

    name: str
    make: Callable[[int], System]
    request: dict[str, Any]

    @cached_property
    def system(self) -> System:
        return self.make(0)

    @cached_property
    def cond(self) -> Cond:
        return self.system.prepare(self.request)

    @cached_property
    def noise(self) -> Noise:
        return Noise.of(11, len(next(iter(self.request.values()))))

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(cast(nn.Module, self.system).parameters()).dtype

    @property
    def tolerance(self) -> float:
        """The relative difference that counts as equal."""
        return 1e-10 if self.dtype == torch.float64 else 1e-4

    @cached_property
    def first(self) -> State:
        """The state before the first step, to look at."""
        return self.start()

    @property
    def N(self) -> int:
        return self.first.layout.n

    @property
    def steps(self) -> range:
        return range(self.first.K)

    def start(
        self, items: Tensor | None = None, sampling: Any = None, cond: bool = True, given: Pin | None = None
    ) -> State:
        """A fresh state of (some of) the items; plain sampling unless told."""
        rows = torch.arange(len(self.noise)) if items is None else items
        sampling = self.system.Sampling.plain() if sampling is None else sampling
        chosen = {name: x[rows] for name, x in self.cond.items()} if cond else None
        return self.system.start(chosen, sampling, self.noise.take(rows), given=given)

    def tokens(self, what: str) -> Tensor:
        """Random tokens [B, N, S]; another `what` gives others."""
        noise, space, shape = Noise.of(5, len(self.noise)), self.system.space, (self.N, self.system.space.S)
        if not space.sizes:
            return noise.normal(what, 0, shape).to(self.dtype)
        return (noise.uniform(what, 0, shape) * torch.tensor(space.sizes)).long()

    def others(self, tokens: Tensor) -> Tensor:
        """Random tokens that differ from the given ones at every position."""
        u, space = self.noise.uniform("others", 0, tokens.shape[1:]), self.system.space
        if not space.sizes:
            return tokens + 1 + u.to(tokens)
        sizes = torch.tensor(space.sizes)
        return (tokens + 1 + (u * (sizes - 1)).long()) % sizes

    def reach(self, tokens: Tensor, k: int, s: State | None = None) -> State:
        """Step a state (a fresh one by default) to step k along the given tokens."""
        s = self.start() if s is None else s
        while int(s.k.min()) < k:
            d = self.system.predict(s)
            self.system.commit(s, d, at(tokens, d.where))
        return s

    def read(self, d: Dist) -> Tensor:
        """A distribution as numbers [B, n, .]: likelihoods or directions of a few random tokens, else a few samples."""
        if isinstance(d, Solved):
            probes = [at(self.tokens(f"probe {i}"), d.where) for i in range(2)]
            width = d.shape[-1]  # a variance that comes behind the direction is not guided
            return torch.cat([d.field(x.double(), t)[..., :width] for x in probes for t in (0.125, 0.5)], -1)
        try:
            return torch.stack([d.log_prob(at(self.tokens(f"probe {i}"), d.where)) for i in range(4)], -1)
        except NotImplementedError:
            return torch.cat([d.sample(Noise.of(seed, len(self.noise))) for seed in range(8)], -1).double()

    def broken(self, law: str, text: str) -> LawBroken:
        return LawBroken(f"the {law} law is broken by {self.name}: {text}")


def case_of(slug: str, dtype: torch.dtype = torch.float64) -> Case:
    """The smallest system of a row of the registry."""

    def make(seed: int) -> System:
        torch.manual_seed(seed)
        return module_of(slug).tiny().to(dtype).eval()

    return Case(name=slug, make=make, request=REQUEST)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to 1 + |b|; equal infinities differ by nothing, NaN by infinity."""
    if a.shape != b.shape:
        return math.inf
    difference = torch.where(a == b, 0.0, (a - b).abs() / (1 + b.abs()))
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).amax()) if difference.numel() else 0.0


def walked(case: Case, s: State, until: int | None = None) -> State:
    """Let a state draw its tokens to the end (or until a step)."""
    for _ in walk(case.system, s, until):
        pass
    return s
