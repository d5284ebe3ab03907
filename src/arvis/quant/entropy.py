"""Entropies that keep codes decided (small per vector) and all in use (large over the batch), in nats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arvis.nn.wide import unrounded


class Entropies(NamedTuple):
    """`sample`: mean entropy of the choice of one vector; `batch`: entropy of the mean choice."""

    sample: Tensor
    batch: Tensor


def entropy_terms(p: Tensor, floor: float = 0.0) -> Tensor:
    """-p ln max(p, floor), elementwise, with a finite gradient at zero (that of torch.special.entr is infinite)."""
    return -p * p.clamp_min(max(floor, torch.finfo(p.dtype).tiny)).log()


def binary_entropy(p: Tensor) -> Tensor:
    """-p ln p - (1 - p) ln(1 - p), elementwise."""
    return entropy_terms(p) + entropy_terms(1 - p)


def bit_entropies(logits: Tensor) -> Entropies:
    """Of independent bits with these logits [..., d], summed over bits; `batch` is an upper bound of the joint one."""
    logits = _rows(logits)
    p = logits.sigmoid()
    return Entropies(_binary_entropy_of_logits(logits).sum(1).mean(), binary_entropy(p.mean(0)).sum())


def joint_bit_entropies(logits: Tensor, group: int, floor: float = 0.0) -> Entropies:
    """The same with the batch entropy joint inside groups of at most `group` bits (exact when d <= group).

    18 bits in groups of 9 are how Open-MAGVIT2 (arXiv 2409.04410) keeps 2^18 codes out of memory. With a `floor` under
    the probabilities in logarithms both entropies are those of the softmax over the codes of a group, which bits no
    longer share exactly (Compat: 1e-5 in public code; the sample entropy then differs by up to 1e-3).
    """
    logits = _rows(logits)
    sample, batch = _binary_entropy_of_logits(logits).sum(1).mean(), logits.new_zeros(())
    if floor:
        sample = logits.new_zeros(())
    with unrounded(logits):
        for part in logits.split(group, dim=1):
            signs = bit_table(part.shape[1], part.device).to(part.dtype) * 2 - 1  # [2^g, g]
            p = (part @ signs.T / 2).softmax(1)
            batch = batch + entropy_terms(p.mean(0), floor).sum()
            if floor:
                sample = sample + entropy_terms(p, floor).sum(1).mean()
    return Entropies(sample, batch)


def bit_table(bits: int, device: torch.device | None = None) -> Tensor:
    """All rows of `bits` bits, counting up, the first column the most significant: int64 [2^bits, bits]."""
    weights = 2 ** torch.arange(bits - 1, -1, -1, device=device)
    return torch.arange(2**bits, device=device)[:, None] // weights % 2


def distance_entropies(z: Tensor, table_VD: Tensor, temperature: float = 0.01) -> Entropies:
    """Of the soft choice of a code by squared distance, vectors [..., D] and a table [V, D] (LlamaGen's regulariser,
    arXiv 2406.06525; both of length one there).

    To be minimised: sample - batch. The temperature divides distances; that of LFQ multiplies products of codes, so
    the two are not on one scale.
    """
    rows, table_VD = _rows(z), table_VD if table_VD.dtype == torch.float64 else table_VD.float()
    with unrounded(rows):
        distance = rows.square().sum(1, keepdim=True) + table_VD.square().sum(1) - 2 * rows @ table_VD.T
    return choice_entropies(distance, temperature)


def choice_entropies(distance: Tensor, temperature: float = 0.01, epsilon: float = 1e-5) -> Entropies:
    """Of softmax(-distance / temperature) over the last axis of [..., V].

    Compat: the mean choice has `epsilon` inside its logarithm; the official one beside the logits of a single choice
    has no effect.
    """
    log_p = (-_rows(distance) / temperature).log_softmax(1)
    mean = log_p.exp().mean(0)
    return Entropies(-(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + epsilon).log()).sum())


def _rows(x: Tensor) -> Tensor:
    """[..., d] as [n, d], at least float32."""
    return (x if x.dtype == torch.float64 else x.float()).reshape(-1, x.shape[-1])


def _binary_entropy_of_logits(x: Tensor) -> Tensor:
    """Stable where the bit is nearly certain: p softplus(-x) + (1 - p) softplus(x)."""
    p = x.sigmoid()
    return p * torch.nn.functional.softplus(-x) + (1 - p) * torch.nn.functional.softplus(x)
