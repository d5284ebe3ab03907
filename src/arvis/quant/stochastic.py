"""Random code choices and substitutions for training: sampled codes, Gumbel-softmax, noise in place of the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.quant.vq import unit

if TYPE_CHECKING:
    from arvis.noise import Noise


def sample_codes(z_BND: Tensor, table_VD: Tensor, temperature: float, noise: Noise, at: int) -> Tensor:
    """Ids [B, N] drawn from softmax(cosine / temperature) over a table, one uniform number per position."""
    p = (unit(z_BND) @ unit(table_VD).T / temperature).double().softmax(-1)
    u = noise.uniform("code", at, (z_BND.shape[1], 1)).to(p.device)
    return (p.cumsum(-1) < u * p.sum(-1, keepdim=True)).sum(-1).clamp_max(len(table_VD) - 1)


def gumbel_softmax(logits_BNV: Tensor, temperature: float, noise: Noise, at: int, hard: bool = True) -> Tensor:
    """A relaxed one-hot choice [B, N, V] (dVAE, arXiv 2102.12092); `hard` gives the one-hot with the soft gradient."""
    gumbel = -(-noise.uniform("gumbel", at, logits_BNV.shape[1:]).log()).log()
    soft = ((logits_BNV + gumbel.to(logits_BNV)) / temperature).softmax(-1)
    if not hard:
        return soft
    one = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return soft + (one - soft).detach()


def noise_substitution(z_BND: Tensor, q_BND: Tensor, noise: Noise, at: int) -> Tensor:
    """z plus a random direction as long as the quantisation error: differentiable in both (NSVQ)."""
    n = noise.normal("substitute", at, z_BND.shape[1:]).to(z_BND)
    length = (q_BND - z_BND).norm(dim=-1, keepdim=True)
    return z_BND + length * n / n.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def keep_some(z_BND: Tensor, q_BND: Tensor, rate: float, noise: Noise, at: int) -> Tensor:
    """The quantised vectors, a share `rate` of positions replaced by the continuous ones."""
    kept = noise.uniform("keep", at, (z_BND.shape[1], 1)).to(z_BND.device) < rate
    return torch.where(kept, z_BND, q_BND)
