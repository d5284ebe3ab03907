"""How much of a codebook is in use: counts, perplexity, bits, what sub-tokens share, moving averages, dead codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COUNTED = 2**20
"""Codes up to which a table of counts is kept; of larger alphabets only the ids that occur are counted."""


def count(tokens: Tensor, size: int) -> Tensor:
    """How often each of `size` ids occurs in `tokens` (any shape): float32 [size]."""
    return torch.bincount(tokens.reshape(-1), minlength=size).float()


def hits(tokens: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The counts of ids [..., S], one tensor per sub-token: of all its codes or, where there are more than 2^20 in sum,
    of those that occur, which is enough for a perplexity."""
    rows = tokens.reshape(-1, len(sizes))
    if sum(sizes) > COUNTED:
        return [part.unique(return_counts=True)[1].float() for part in rows.unbind(1)]
    first = torch.tensor([sum(sizes[:s]) for s in range(len(sizes))], device=tokens.device)
    return list(count(rows + first, sum(sizes)).split(list(sizes)))


def several_ranks() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed_over_ranks(hits: Tensor) -> Tensor:
    """The sum of `hits` over all processes; `hits` itself when there is one process."""
    if several_ranks():
        hits = hits.clone()
        torch.distributed.all_reduce(hits)
    return hits


def gathered_over_ranks(x: Tensor) -> Tensor:
    """The tensors of all processes, which have one shape, along a new first axis: [ranks, ...]."""
    if not several_ranks():
        return x[None]
    out = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(out, x.contiguous())
    return torch.stack(out)


def used(hits_V: Tensor) -> Tensor:
    """Share of codes with at least one hit, along the last axis, in [0, 1]."""
    return (hits_V > 0).float().mean(-1)


def perplexity(hits_V: Tensor) -> Tensor:
    """exp of the entropy of the frequencies of a window, along the last axis, in [1, V].

    Add the counts of a window before calling: the mean of per-batch perplexities is another, smaller number.
    """
    p = hits_V.double() / hits_V.double().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(p).sum(-1).exp().to(torch.float32)


def normalised_perplexity(hits_V: Tensor) -> Tensor:
    """The perplexity as a share of the codes, along the last axis, in (0, 1]."""
    return perplexity(hits_V) / hits_V.shape[-1]


def bits(hits_V: Tensor) -> Tensor:
    """Entropy of the frequencies in bits per token, along the last axis."""
    return perplexity(hits_V).log2()


def bits_per_pixel(bits_per_token: float | Tensor, tokens: int, pixels: int) -> float:
    """What a picture of `pixels` pixels and `tokens` tokens costs a code that knows the frequencies alone."""
    return float(bits_per_token) * tokens / pixels


def token_stats(tokens: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Usage and perplexity inside one batch of ids [..., S]: scalars where S is 1, else one number per sub-token."""
    counts = hits(tokens, sizes)
    share = torch.stack([(n > 0).sum() / size for n, size in zip(counts, sizes, strict=True)])
    spread = torch.stack([perplexity(n) for n in counts])
    return {"usage": share, "perplexity": spread} if len(sizes) > 1 else {"usage": share[0], "perplexity": spread[0]}


def joint_bits(tokens: Tensor) -> Tensor:
    """Entropy in bits of whole tokens, the tuples of sub-tokens [..., S], by their frequencies: at most the sum of the
    sub-tokens' own, and at most log2 of the number of tokens, so that a small window says too little."""
    seen = torch.zeros_like(tokens[..., 0], dtype=torch.int64).flatten()
    for part in tokens.flatten(0, -2).unbind(-1):  # numbered anew after each part, so that no product overflows
        _, own = part.unique(return_inverse=True)
        _, seen = (seen * (own.max() + 1) + own).unique(return_inverse=True)
    return bits(count(seen, int(seen.max()) + 1))


def mutual_information(a: Tensor, b: Tensor) -> Tensor:
    """What two sub-tokens of any equal shape say about each other, H(a) + H(b) - H(a, b) in bits: 0 for independent
    ones (and a little above, by about |a||b| / (2 ln 2 n) from n tokens), H(a) for equal ones."""
    own = joint_bits(a.reshape(-1, 1)) + joint_bits(b.reshape(-1, 1))
    return own - joint_bits(torch.stack((a.reshape(-1), b.reshape(-1)), -1))


def dead_positions(tokens_BN: Tensor, threshold: float = 1e-5) -> Tensor:
    """Share of positions [...] whose id is the same in the whole batch: standard deviation below `threshold` (D-AR)."""
    if len(tokens_BN) < 2:
        raise ValueError(f"whether a position varies shows in two pictures or more, got {len(tokens_BN)}")
    return (tokens_BN.double().std(0) < threshold).double().mean()


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
    """The ids of the last `length` tokens, oldest first; zeros at first (which count as id 0, as in LlamaGen)."""

    ring: Tensor

    def __init__(self, length: int = 65536) -> None:
        super().__init__()
        self.register_buffer("ring", torch.zeros(length, dtype=torch.int64))

    @torch.no_grad()
    def add_(self, tokens: Tensor) -> None:
        self.ring.copy_(torch.cat((self.ring, tokens.reshape(-1).to(self.ring)))[-len(self.ring) :])

    def hits(self, size: int) -> Tensor:
        """Counts of the ids in the window: float32 [size]."""
        return count(self.ring, size)
