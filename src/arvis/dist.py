"""Distributions of the next group: the only interface between a network and the loop.

A network that maps hidden states to one of these is a plain nn.Module; whatever is joint inside a group (chains over
sub-tokens, solvers, refinement) lives in `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arvis.denoise import Field, Solver, Watch
from arvis.noise import Source
from arvis.sampling import draw
from arvis.tokens import Pin


class Dist(Protocol):
    """`where` [B|1, n]: the positions it speaks about; `at`: the step (one, or one per item) that keys its noise."""

    where: Tensor
    at: int | Tensor

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        """[B, n, S]; pinned positions take their given values, and the others are drawn in their presence."""
        ...

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        """[B, n] nats; NotImplementedError where no likelihood exists."""
        ...


def pinned(x_BnS: Tensor, pin: Pin | None) -> Tensor:
    """x with the given values in place."""
    return x_BnS if pin is None else torch.where(pin.mask[..., None], pin.value.to(x_BnS.dtype), x_BnS)


@dataclass
class Categorical:
    """Independent codes: logits [B, n, S, V], -inf for what cannot be drawn (ragged alphabets are -inf padded)."""

    where: Tensor
    logits: Tensor
    at: int | Tensor = 0

    @property
    def probs(self) -> Tensor:
        wide = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        return self.logits.softmax(-1, dtype=wide)

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        u = noise.uniform("draw", self.at, self.logits.shape[1:-1])
        return pinned(draw(self.probs, u.to(self.logits.device)), pin)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        return logits.log_softmax(-1).gather(-1, x_BnS[..., None])[..., 0].sum(-1)


@dataclass
class Guess:
    """Codes guessed at more positions than the step will keep (confidence orders): logits [B, n, S, V].

    Which guesses are kept depends on the guesses, so the joint of those that are has no closed form; `marginal` is the
    log-probability of each guess by itself, which a confidence is made of.
    """

    where: Tensor
    logits: Tensor
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        return self._codes.sample(noise, pin, watch)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        raise NotImplementedError("which guesses are kept depends on the guesses: there is no likelihood")

    def marginal(self, x_BnS: Tensor) -> Tensor:
        """[B, n] nats of each guess, as if it were alone."""
        return self._codes.log_prob(x_BnS)

    @property
    def _codes(self) -> Categorical:
        return Categorical(self.where, self.logits, self.at)


@dataclass
class Chain:
    """Codes drawn one sub-token after another inside each position (TokenBridge, FQGAN, residual depth).

    `next_logits(z [B, n, D], drawn [B, n, s])` -> logits [B, n, V] of sub-token s.
    """

    where: Tensor
    z: Tensor
    next_logits: Callable[[Tensor, Tensor], Tensor]
    depth: int
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        u = noise.uniform("draw", self.at, (self.z.shape[1], self.depth)).to(self.z.device)
        x = torch.zeros(*self.z.shape[:2], 0, dtype=torch.int64, device=self.z.device)
        for s in range(self.depth):
            probs = Categorical(self.where, self.next_logits(self.z, x)).probs
            code = draw(probs, u[..., s])
            if pin is not None:
                code = torch.where(pin.mask, pin.value[..., s], code)
            x = torch.cat((x, code[..., None]), -1)
        return x

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        parts = [
            Categorical(self.where, self.next_logits(self.z, x_BnS[..., :s])[..., None, :]).log_prob(
                x_BnS[..., s, None]
            )
            for s in range(self.depth)
        ]
        return torch.stack(parts).sum(0)


@dataclass
class Solved:
    """A sample at the end of a solver: diffusion, flow and few-step heads. No likelihood."""

    where: Tensor
    field: Field
    solver: Solver
    shape: Sequence[int]
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        return self.solver(self.field, noise, self.at, self.shape, pin, watch)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        raise NotImplementedError("a solved distribution has no likelihood")
