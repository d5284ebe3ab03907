"""Entropies that keep codes decided (small per vector) and all in use (large over the batch), in nats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arvis.quant.vq import unit


class Entropies(NamedTuple):
    """`sample`: mean entropy of the choice of one vector; `batch`: entropy of the mean choice."""

    sample: Tensor
    batch: Tensor


def entropy_terms(p: Tensor) -> Tensor:
    """-p ln p, elementwise, with a finite gradient at zero (that of torch.special.entr is infinite)."""
    return -p * p.clamp_min(torch.finfo(p.dtype).tiny).log()


def binary_entropy(p: Tensor) -> Tensor:
    """-p ln p - (1 - p) ln(1 - p), elementwise."""
    return entropy_terms(p) + entropy_terms(1 - p)


def bit_entropies(logits: Tensor) -> Entropies:
    """Of independent bits with these logits [..., d], summed over bits; `batch` is an upper bound of the joint one."""
    logits = logits.reshape(-1, logits.shape[-1])
    p = logits.sigmoid()
    return Entropies(_binary_entropy_of_logits(logits).sum(1).mean(), binary_entropy(p.mean(0)).sum())


def joint_bit_entropies(logits: Tensor, group: int) -> Entropies:
    """The same with the batch entropy joint inside groups of at most `group` bits (exact when d <= group)."""
    logits = logits.reshape(-1, logits.shape[-1])
    batch = logits.new_zeros(())
    for part in logits.split(group, dim=1):
        signs = bit_table(part.shape[1], part.device).to(part.dtype) * 2 - 1  # [2^g, g]
        mean = (part @ signs.T / 2).softmax(1).mean(0)
        batch = batch + entropy_terms(mean).sum()
    return Entropies(_binary_entropy_of_logits(logits).sum(1).mean(), batch)


def bit_table(bits: int, device: torch.device | None = None) -> Tensor:
    """All rows of `bits` bits, counting up, the first column the most significant: int64 [2^bits, bits]."""
    weights = 2 ** torch.arange(bits - 1, -1, -1, device=device)
    return torch.arange(2**bits, device=device)[:, None] // weights % 2


def distance_entropies(z: Tensor, table_VD: Tensor, temperature: float = 0.01, cosine: bool = True) -> Entropies:
    """Of softmax(-squared distance / temperature) over the codes of a table, [..., D] (LlamaGen, arXiv 2406.06525).

    Compat: the mean choice has 1e-5 inside its logarithm.
    """
    rows, table_VD = z.reshape(-1, z.shape[-1]).float(), table_VD.float()
    if cosine:
        rows, table_VD = unit(rows), unit(table_VD)
    logits = -(rows.square().sum(1, keepdim=True) + table_VD.square().sum(1) - 2 * rows @ table_VD.T) / temperature
    log_p = logits.log_softmax(1)
    mean = log_p.exp().mean(0)
    return Entropies(-(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())


def _binary_entropy_of_logits(x: Tensor) -> Tensor:
    """Stable where the bit is nearly certain: p softplus(-x) + (1 - p) softplus(x)."""
    p = x.sigmoid()
    return p * torch.nn.functional.softplus(-x) + (1 - p) * torch.nn.functional.softplus(x)
