"""The loop. Everything built on generation (previews, streaming, cancellation, search) consumes these steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arvis.denoise import Watch
from arvis.noise import Source
from arvis.state import Cond, State, System
from arvis.tokens import Layout, Pin, at


@dataclass
class Step:
    """More was decided: `k` of `K` groups are (in the slowest item), `fresh` bool [B, N] are the new positions."""

    k: int
    K: int
    fresh: Tensor
    state: State
    preview: Callable[[], Tensor]
    """Decode what is known so far, and what is given; call before the next step."""


def walk(system: System, s: State, until: int | None = None, watch: Watch | None = None) -> Iterator[Step]:
    """Decide group after group until the end (or until `until` groups are decided); stop iterating to cancel."""
    goal = s.K if until is None else min(until, s.K)
    while bool((s.k < goal).any()):
        before = s.known
        d = system.predict(s)
        x = d.sample(s.noise, s.pin(d.where), watch)
        system.commit(s, d, x)
        yield step_of(system, s, before)


def step_of(system: System, s: State, before_BN: Tensor) -> Step:
    """The step that led from the positions known before to those of the state."""
    return Step(
        k=int(s.k.min()),
        K=s.K,
        fresh=s.known & ~before_BN,
        state=s,
        preview=lambda: system.tokenizer.decode(*_shown(s), s.noise),
    )


def _shown(s: State) -> tuple[Tensor, Layout, Tensor]:
    """Tokens and which of them are there: those decided so far, and those given that a step has yet to come to."""
    if s.given is None:
        return s.tokens, s.layout, s.known
    given = s.given.mask & ~s.known
    return torch.where(given[..., None], s.given.value.to(s.tokens), s.tokens), s.layout, s.known | given


def generate(
    system: System,
    cond: Cond | None,
    sampling: Any,
    noise: Source,
    layout: Layout | None = None,
    given: Pin | None = None,
    watch: Watch | None = None,
) -> Iterator[Step]:
    """Start and walk; item i of the batch is a pure function of (its condition, its seed, the settings)."""
    yield from walk(system, system.start(cond, sampling, noise, layout, given), watch=watch)


def finish(steps: Iterable[Step]) -> State:
    """Run to the end and return the final state."""
    last = deque(steps, maxlen=1)
    if not last:
        raise ValueError("nothing was left to decide: every group was given")
    return last[0].state


def likelihood(
    system: System,
    tokens: Tensor,
    cond: Cond | None,
    noise: Source,
    layout: Layout | None = None,
    sampling: Any = None,
) -> Tensor:
    """log p(tokens | cond) in nats [B], walking the system's own order: of the law under some sampling settings, by
    default the unguided, unfiltered one."""
    s = system.start(cond, system.Sampling.plain() if sampling is None else sampling, noise, layout)
    total = torch.zeros(len(s), dtype=torch.float64)
    while not bool(s.done.all()):
        d = system.predict(s)
        x = at(tokens, d.where)
        total += d.log_prob(x).sum(1).double().cpu()
        system.commit(s, d, x)
    return total
