"""How much of a codebook is in use: counts, perplexity, moving averages, dead codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def count(tokens: Tensor, size: int) -> Tensor:
    """How often each of `size` ids occurs in `tokens` (any shape): float32 [size]."""
    return torch.bincount(tokens.reshape(-1), minlength=size).float()


def summed_over_ranks(hits: Tensor) -> Tensor:
    """The sum of `hits` over all processes; `hits` itself when there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        hits = hits.clone()
        torch.distributed.all_reduce(hits)
    return hits


def used(hits_V: Tensor) -> Tensor:
    """Share of codes with at least one hit, along the last axis, in [0, 1]."""
    return (hits_V > 0).float().mean(-1)


def perplexity(hits_V: Tensor) -> Tensor:
    """exp of the entropy of the frequencies of a window, along the last axis, in [1, V].

    Add the counts of a window before calling: the mean of per-batch perplexities is another, smaller number.
    """
    p = hits_V.double() / hits_V.double().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(p).sum(-1).exp().to(torch.float32)


def bits(hits_V: Tensor) -> Tensor:
    """Entropy of the frequencies in bits per token, along the last axis."""
    return perplexity(hits_V).log2()


def hit_decay(updates: int) -> float:
    """VAR's decay of the hit average: the first update sets it, 0.9 until the hundredth, then 0.99."""
    return 0.0 if updates == 0 else 0.9 if updates < 100 else 0.99


@torch.no_grad()
def update_hits_(average: Tensor, hits: Tensor, updates: int) -> Tensor:
    """Moves `average` towards `hits` (same shape) in place; `updates` is the number of updates made before."""
    decay = hit_decay(updates)
    return average.mul_(decay).add_(hits.to(average), alpha=1 - decay)


def used_by_average(average_V: Tensor, margin: float = 0.08) -> Tensor:
    """Share of codes whose average hits reach `margin` times the mean over codes, along the last axis."""
    return (average_V >= margin * average_V.mean(-1, keepdim=True)).float().mean(-1)


def dead(average_V: Tensor, threshold: float = 0.05) -> Tensor:
    """Which codes have fewer average hits than `threshold` times the mean over codes: bool [V]."""
    return average_V < threshold * average_V.mean()


class UsageRing(nn.Module):
    """The ids of the last `length` tokens in a ring, zeros at first (which count as id 0, as in LlamaGen)."""

    ring: Tensor
    at: Tensor

    def __init__(self, length: int = 65536) -> None:
        super().__init__()
        self.register_buffer("ring", torch.zeros(length, dtype=torch.int64))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add_(self, tokens: Tensor) -> None:
        ids = tokens.reshape(-1)[-len(self.ring) :].to(self.ring)
        self.ring[(self.at + torch.arange(len(ids), device=self.ring.device)) % len(self.ring)] = ids
        self.at.copy_((self.at + len(ids)) % len(self.ring))

    def hits(self, size: int) -> Tensor:
        """Counts of the ids in the window: float32 [size]."""
        return count(self.ring, size)
