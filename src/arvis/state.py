"""The explicit decoding state and the three verbs.

    start(condition) -> state        predict(state) -> distribution of the next group        commit(state, drawn tokens)

Every tensor of a state has the batch on axis 0, so one gather moves a generation, with caches and noise. `predict` is
lazy: tokens just drawn are fed by the next predict, so the last group is never fed and a roll-back never un-feeds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from arvis.dist import Dist
from arvis.nn.cache import Cache
from arvis.noise import Noise, Source
from arvis.tokens import Layout, Pin, Space

Cond = dict[str, Tensor]
"""Raw conditions of a batch, one tensor [B, ...] per name ("class_labels", "text", ...)."""


@dataclass
class State:
    """Everything a generation is, between two verbs."""

    tokens: Tensor
    """[B, N, S]; undecided positions hold zeros."""
    group: Tensor
    """int32 [B, N]: the step that draws each position, NEVER while undecided."""
    k: Tensor
    """int64 [B] on the host: groups decided so far."""
    K: int
    """Number of groups."""
    noise: Source
    layout: Layout
    cond: Cond = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1))
    """Guidance weights on the host, float [B, K|1, G]."""
    knobs: dict[str, Tensor] = field(default_factory=dict)
    """Per-item settings on the host, [B] each (temperature, top_k, ...): different users share a batch."""
    given: Pin | None = None
    """Tokens known beforehand, [B, N] and [B, N, S]: prefixes, in-painting, editing."""
    cache: dict[str, Cache] = field(default_factory=dict)
    more: dict[str, Tensor] = field(default_factory=dict)
    """What a system carries beside tokens: accumulators, next inputs, histories."""
    key: Hashable = None
    """What changes shapes (solver length, mode). States of equal layout, G and key may share a batch."""

    def __post_init__(self) -> None:
        if len(self.weights) == 1 and len(self) > 1:
            self.weights = self.weights.expand(len(self), -1, -1)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def done(self) -> Tensor:
        """bool [B] on the host."""
        return self.k >= self.K

    @property
    def known(self) -> Tensor:
        """bool [B, N]: positions decided so far."""
        return self.group < self.k[:, None].to(self.group.device)

    def at(self) -> int:
        """The common step; ValueError when items stand at different steps."""
        first = int(self.k[0])
        if bool((self.k != first).any()):
            raise ValueError(f"items stand at different steps: {self.k.tolist()}")
        return first

    def weight(self, k: int) -> Tensor:
        """Guidance weights of step k, [B, G]."""
        return self.weights[:, min(k, self.weights.shape[1] - 1)]

    def pin(self, where: Tensor) -> Pin | None:
        """The given tokens among positions `where`."""
        return None if self.given is None else self.given.at(where)

    def take_(self, rows: Tensor) -> State:
        """Gather items in place; a second copy of an item continues with noise of its own."""
        for f in fields(self):
            setattr(self, f.name, _take(getattr(self, f.name), rows))
        return self


def _take(value: Any, rows: Tensor) -> Any:
    match value:
        case Pin() | Cache() | Noise():
            return value.take(rows)
        case Tensor():
            return value[rows.to(value.device)]
        case dict():
            return {name: _take(v, rows) for name, v in value.items()}
        case Layout() | int() | None:
            return value
    return value.take(rows) if callable(getattr(value, "take", None)) else value


def join_states(states: list[State]) -> State:
    """One state of all items: equal layout, K and key, the same step; ValueError otherwise."""
    first = states[0]
    alike = {(s.layout, s.K, s.key, s.at(), s.weights.shape[1:], tuple(s.more), tuple(s.cond)) for s in states}
    if len(alike) != 1:
        raise ValueError(f"states of {len(alike)} different kinds or steps cannot share a batch")

    def stack(values: list[Any]) -> Any:
        match values[0]:
            case Tensor():
                return torch.cat(values)
            case Cache():
                return Cache.stack(values)
            case Noise():
                return Noise(torch.cat([v.seed_B for v in values]))
            case dict():
                return {name: stack([v[name] for v in values]) for name in values[0]}
        return values[0]

    out = State(**{f.name: stack([getattr(s, f.name) for s in states]) for f in fields(first) if f.name != "given"})
    if any(s.given is not None for s in states):
        pins = [s.given or Pin(torch.zeros_like(s.group, dtype=torch.bool), s.tokens) for s in states]
        out.given = Pin(torch.cat([p.mask for p in pins]), torch.cat([p.value for p in pins]))
    return out


class Tokenizer(Protocol):
    """Pixels (or features, points, ...) <-> tokens. `known` None means all; noise None means mean or argmax."""

    space: Space

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout: ...
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor: ...
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor: ...


class System(Protocol):
    """A published generator: an nn.Module with three verbs and a loss."""

    space: Space
    tokenizer: Any
    Sampling: ClassVar[type]
    """Frozen dataclass of the official sampling settings; `Sampling.plain()` is the unguided, unfiltered law."""

    def prepare(self, request: dict[str, Any]) -> Cond:
        """The conditions in a request or training batch ("class_labels", "prompt", ...) as tensors."""
        ...

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        """A fresh state; cond None = unconditional. May commit leading groups that are wholly given."""
        ...

    def predict(self, s: State) -> Dist:
        """groups < k -> the distribution of group k. Feeds the pending rows; touches nothing but caches."""
        ...

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        """Write the drawn tokens, advance accumulators, k += 1. No network call."""
        ...

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Training losses by name; "loss" is minimised."""
        ...


class Parallel(Protocol):
    """Systems whose groups can all be predicted in one pass."""

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Dist:
        """The distribution of every position given the true earlier groups."""
        ...


class Windowed(Protocol):
    """Causal systems with one code per group: what speculative decoding needs."""

    def window(
        self, s: State, tokens_BL: Tensor, at_BL: Tensor, parent_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Guided, filtered probabilities [B, L, V] of the position after each token, and hidden rows [B, G, L, D]."""
        ...

    def keep(self, s: State, nodes_BP: Tensor) -> None:
        """Accept a path of window nodes, padded with -1; items may accept different lengths."""
        ...
