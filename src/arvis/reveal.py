"""Tokens of one group drawn with regard to each other: a few at a time, the surest or at random places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arvis.denoise import Watch
from arvis.dist import pinned
from arvis.noise import Source
from arvis.sampling import draw, lowest
from arvis.tokens import Pin


class Plan(NamedTuple):
    """`steps` steps, of which the first `plain` draw from the transformer alone and the first `random` reveal at
    random places."""

    steps: int
    plain: int
    random: int


def reveal_counts(unknown_B: Tensor, steps: int) -> Tensor:
    """How many of the unknown tokens of each item each step places, int64 [B, steps] on the host.

    In proportion to arccos(r), r from 1 to 0: few at first. At least one at each, the last step places the rest.
    """
    share = torch.linspace(1, 0, steps).arccos() / (torch.pi / 2)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    n = unknown_B.cpu()[:, None]
    placed = (share * n).round().long().clamp_min(1).cumsum(1).minimum(n)
    placed[:, -1] = n[:, 0]
    return placed.diff(dim=1, prepend=torch.zeros_like(n))


@dataclass
class Revealed:
    """Tokens of one scale that are drawn with regard to each other: a few at a time, from `law(x [B, n, 1],
    known [B, n], step)` -> probabilities [B, n, V] given those that are placed. No likelihood."""

    where: Tensor
    law: Callable[[Tensor, Tensor, int], Tensor]
    plan: Plan
    items: int
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        steps, plain, random = self.plan
        n, device = self.where.shape[1], self.where.device
        u = noise.uniform("draw", self.at, (steps, n)).to(device)
        random = min(random, steps)
        chance = noise.uniform("reveal", self.at, (random, n)).to(device) if random else u
        x = torch.zeros(self.items, n, 1, dtype=torch.int64, device=device)
        known, unknown = torch.zeros_like(x[..., 0], dtype=torch.bool), torch.full((self.items,), n, device="cpu")
        if pin is not None:
            x, known, unknown = pinned(x, pin), pin.mask, (~pin.mask).sum(1)
        counts = reveal_counts(unknown, steps)
        for step in range(steps):
            probs = self.law(x, known, step)
            guess = draw(probs, u[:, step])[..., None]
            sure = probs.gather(-1, guess)[..., 0]
            places = highest(sure, counts[:, step]) if step < plain else torch.zeros_like(known)
            before = known | places  # Compat: the surest of all tokens first, then as many of those that are left
            score = chance[:, step] if step < random else sure
            fresh = (places | highest(score.masked_fill(before, -1), counts[:, step])) & ~known
            x, known = torch.where(fresh[..., None], guess, x), known | fresh
            if watch is not None:
                watch(x, step, steps)
        return x

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        raise NotImplementedError("which tokens are placed first depends on the tokens: there is no likelihood")


def highest(score_Bn: Tensor, m_B: Tensor) -> Tensor:
    """bool [B, n], True at the m highest scores of each item; ties: the earlier one."""
    return lowest(-score_Bn, m_B)
