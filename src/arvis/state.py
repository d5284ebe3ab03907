"""The explicit decoding state and the three verbs.

    start(condition) -> state        predict(state) -> distribution of the next group        commit(state, drawn tokens)

Every tensor of a state has the batch on axis 0, so one gather moves a generation, with caches and noise. `predict` is
lazy: tokens just drawn are fed by the next predict, so the last group is never fed and a roll-back never un-feeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.nn.scales import Condition
from arvis.noise import Noise, Recorded, Source
from arvis.rows import See
from arvis.tokens import Layout, Pin, Space

Cond = dict[str, Tensor]
"""Raw conditions of a batch, one tensor [B, ...] per name ("class_labels", "text", ...)."""


@dataclass
class State:
    """Everything a generation is, between two verbs."""

    tokens: Tensor
    """[B, N, S]; undecided positions hold zeros."""
    group: Tensor
    """int32 [B, N]: the step that draws each position, NEVER while undecided, -1 where known from the start."""
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
    """What changes shapes (solver length, mode). States of equal `kind` may share a batch."""
    ragged: bool = False
    """The system's verbs take items that stand at different steps."""
    then: State | None = None
    """A state of the same items that waits to go on in place of this one, as another model will."""

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

    def weight(self, k: int | Tensor) -> Tensor:
        """Guidance weights [B, G] of step k (one for all, or one per item [B]), or [B, G, n] of steps [B, n]."""
        last = self.weights.shape[1] - 1
        if isinstance(k, int):
            return self.weights[:, min(k, last)]
        item = torch.arange(len(self)).view(-1, *(1,) * (k.dim() - 1))
        return self.weights[item, k.cpu().clamp(0, last)].movedim(-1, 1)

    @property
    def kind(self) -> Hashable:
        """What must be equal for states to share a batch."""
        k = None if self.ragged else self.at()
        ends = tuple((name, None if self.ragged else c.end) for name, c in self.cache.items())
        tensors = tuple((name, *v.shape[1:]) for d in (self.cond, self.knobs, self.more) for name, v in d.items())
        then = None if self.then is None else self.then.kind
        return self.layout, self.K, self.key, k, self.weights.shape[1:], ends, tensors, then

    def pin(self, where: Tensor) -> Pin | None:
        """The given tokens among positions `where`."""
        return None if self.given is None else self.given.at(where)

    def put(self, where: Tensor, x_BnS: Tensor) -> None:
        """Write drawn tokens at those of the positions where [B|1, n] that the current step draws."""
        where = where.to(self.tokens.device).expand(len(self), -1)
        mine = self.group.gather(1, where) == self.k[:, None].to(self.group.device)
        index = where[..., None].expand(-1, -1, x_BnS.shape[-1])
        kept = torch.where(mine[..., None], x_BnS.to(self.tokens), self.tokens.gather(1, index))
        self.tokens = self.tokens.scatter(1, index, kept)

    def given_groups(self) -> int:
        """How many leading groups are wholly given in every item: a system may commit them at the start."""
        k = 0
        while self.given is not None and k < self.K and bool((self.given.mask | (self.group != k)).all()):
            k += 1
        return k

    def take_(self, rows: Tensor) -> State:
        """Gather items in place; a second copy of an item continues with noise of its own."""
        for f in fields(self):
            setattr(self, f.name, _take(getattr(self, f.name), rows))
        return self

    def fork(self) -> State:
        """A copy that goes its own way with the same noise."""
        return replace(self).take_(torch.arange(len(self)))


def _take(value: Any, rows: Tensor) -> Any:
    match value:
        case Tensor():
            return value[rows.to(value.device)]
        case dict():
            return {name: _take(v, rows) for name, v in value.items()}
        case Pin() | Cache() | Noise() | Recorded():
            return value.take(rows)
        case State():
            return replace(value).take_(rows)
    return value


def join_states(states: Sequence[State]) -> State:
    """One state of all items, which must be of equal `kind`; ValueError otherwise."""
    kinds = {s.kind for s in states}
    if len(kinds) != 1:
        raise ValueError(f"states of {len(kinds)} different kinds cannot share a batch: {kinds}")
    none = [Pin(torch.zeros_like(s.group, dtype=torch.bool), torch.zeros_like(s.tokens)) for s in states]
    if any(s.given is not None for s in states):
        states = [replace(s, given=s.given or pin) for s, pin in zip(states, none, strict=True)]
    return State(**{f.name: _stack([getattr(s, f.name) for s in states]) for f in fields(State)})


def _stack(values: list[Any]) -> Any:
    match values[0]:
        case Tensor():
            return torch.cat(values)
        case dict():
            return {name: _stack([v[name] for v in values]) for name in values[0]}
        case Pin():
            return Pin(*map(torch.cat, zip(*values, strict=True)))
        case Cache():
            return Cache.stack(values)
        case Noise():
            return Noise.stack(values)
        case State():
            return join_states(values)
    if any(value != values[0] for value in values):
        raise ValueError(f"these cannot be joined: {values}")
    return values[0]


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

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        ...

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


@runtime_checkable
class Parallel(Protocol):
    """Systems whose groups can all be predicted in one pass."""

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Dist:
        """The distribution of every position given the true earlier groups."""
        ...


@runtime_checkable
class Windowed(Protocol):
    """Causal systems with one code per group: what speculative decoding needs. Their states are ragged."""

    def window(self, s: State, drafts_BL: Tensor, parent_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Guided, filtered probabilities [B, 1 + L, V] of the position after what is decided, then after each draft,
        and the hidden rows [B, G, 1 + L, D] behind them.

        Drafts form a chain, or a tree by the parent of each (-1: follows what is decided; parents come first). A draft
        of depth d lies at position k + d - 1; drafts beyond the end are computed but mean nothing.
        """
        ...

    def keep(self, s: State, path_BP: Tensor, tokens_BQ: Tensor) -> None:
        """Accept a path of drafts of the last window, padded with -1 (items may accept different numbers), and the
        token after it: tokens [B, P + 1] holds the path's and then that one. k grows by the path's length plus one."""
        ...


@runtime_checkable
class Compilable(Protocol):
    """Systems whose steps have one shape, so that they can run as one compiled graph."""

    def compile_step(self) -> None:
        """From now on they do; the first step of a generation of another size takes the time of compiling."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """Systems whose sampling settings say where the tokens lie: the number of steps, the size and shape of pictures."""

    def layout(self, sampling: Any) -> Layout: ...


class Lesson(NamedTuple):
    """One step of teacher forcing: tokens [B, N, S] and where they lie, the raw conditions, what was predicted (with
    its gradient), and the losses."""

    tokens: Tensor
    layout: Layout
    cond: Cond
    predicted: Categorical
    losses: dict[str, Tensor]


@runtime_checkable
class Staged(Protocol):
    """Systems over scales that run on any inputs: what training on a model's own predictions needs."""

    tokenizer: Any
    transformer: Any
    see: See
    label_drop: float

    def lesson(self, batch: dict[str, Any], noise: Source) -> Lesson:
        """A step of teacher forcing; its losses are those of `loss` (without what disturbs its inputs)."""
        ...

    def one_pass(self, x_BNC: Tensor, c: Condition, layout: Layout, scales: Sequence[int], see: See) -> Categorical:
        """The distributions of scale 0 and of `scales` alone under any inputs of these and any visibility."""
        ...
