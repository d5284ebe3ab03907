"""What is done with codes that no vector chooses: random restarts and pulling them towards the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arvis.quant.vq import nearest

if TYPE_CHECKING:
    from arvis.noise import Noise


@torch.no_grad()
def pick(vectors: Tensor, n: int, noise: Noise, at: int, weight: Tensor | None = None) -> Tensor:
    """`n` of the M `vectors` [..., D], drawn without replacement (again from the start when n > M): [n, D].

    `weight` [...] makes vectors more or less likely. Only the first row of `noise` is used: a codebook belongs to no
    item of a batch.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    first = noise.take(torch.zeros(1, dtype=torch.int64))
    race = -first.uniform("revive", at, (len(rows),))[0].to(rows.device).log()  # exponential: the smallest win
    if weight is not None:
        race = race / weight.reshape(-1).double().clamp_min(1e-30)
    order = race.argsort()
    return rows[order[torch.arange(n, device=rows.device) % len(rows)]]


@torch.no_grad()
def restart_(
    table_VD: Tensor, dead_V: Tensor, vectors: Tensor, noise: Noise, at: int, weight: Tensor | None = None
) -> int:
    """Sets the codes marked in `dead_V` to random encoder vectors of this batch, in place; says how many.

    `weight` as in `pick`; `at` is the training step. With several processes the table of rank 0 is sent to all, so that
    they stay equal.
    """
    n = int(dead_V.sum())
    if n:
        table_VD[dead_V] = pick(vectors, n, noise, at, weight).to(table_VD)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(table_VD, 0)
    return n


@torch.no_grad()
def pull_(table_VD: Tensor, frequency_V: Tensor, vectors: Tensor, decay: float = 0.99) -> None:
    """Moves every code towards its nearest vector, the more the rarer it is used, in place (CVQ, arXiv 2307.15139).

    `frequency_V` is a moving average (by `decay`) of the share of vectors of each code.
    """
    rows = vectors.reshape(-1, vectors.shape[-1]).to(table_VD)
    alpha_V = torch.exp(-10 * len(table_VD) * frequency_V / (1 - decay) - 1e-3)[:, None]
    table_VD.lerp_(rows[nearest(table_VD, rows)], alpha_V.to(table_VD))
