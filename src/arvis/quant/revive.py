"""What is done with codes that no vector chooses: random restarts and pulling them towards the data.

With several processes the vectors of all of them are drawn from, and all end with the same table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arvis.quant.usage import gathered_over_ranks, perplexity, several_ranks
from arvis.quant.vq import nearest

if TYPE_CHECKING:
    from arvis.noise import Source


@torch.no_grad()
def pick(vectors: Tensor, n: int, noise: Source, at: int, weight: Tensor | None = None) -> Tensor:
    """`n` of the M `vectors` [..., D], drawn without replacement (again from the start when n > M): [n, D].

    `weight` [...] makes vectors more or less likely. Only the first row of `noise` is used: a codebook belongs to no
    item of a batch. Every process draws from its own vectors.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    order = _race(len(rows), noise, at, 0, weight).to(rows.device).argsort()
    return rows[order[torch.arange(n, device=rows.device) % len(rows)]]


@torch.no_grad()
def pick_from_all(vectors: Tensor, n: int, noise: Source, at: int, weight: Tensor | None = None) -> Tensor:
    """The same from the vectors of all processes, which all call this with the same `n` and get the same result."""
    if not several_ranks():
        return pick(vectors, n, noise, at, weight)
    rows = vectors.reshape(-1, vectors.shape[-1])
    race = _race(len(rows), noise, at, torch.distributed.get_rank(), weight).to(rows.device)
    best = race.argsort()[:n]
    times, candidates = race.new_full((n,), torch.inf), rows.new_zeros(n, rows.shape[1])
    times[: len(best)], candidates[: len(best)] = race[best], rows[best]
    times, candidates = gathered_over_ranks(times).flatten(), gathered_over_ranks(candidates).flatten(0, 1)
    order = times.argsort()[: int(times.isfinite().sum())]
    return candidates[order[torch.arange(n, device=rows.device) % len(order)]]


def _race(count: int, noise: Source, at: int, rank: int, weight: Tensor | None) -> Tensor:
    """A waiting time for each vector, exponential with its weight as rate, float64 [count]: the smallest win.

    So the winners are drawn without replacement, and the winners among winners are those of all. Each rank has numbers
    of its own.
    """
    first = noise.take(torch.zeros(1, dtype=torch.int64))
    race = -first.uniform("revive", at, ((rank + 1) * count,))[0][rank * count :].log()
    return race if weight is None else race / weight.reshape(-1).to(race).clamp_min(1e-30)


@torch.no_grad()
def restart_(
    table_VD: Tensor, dead_V: Tensor, vectors: Tensor, noise: Source, at: int, weight: Tensor | None = None
) -> int:
    """Sets the codes marked in `dead_V` to random encoder vectors of this batch, in place; says how many.

    `weight` as in `pick`; `at` is the training step. All processes have to mark the same codes.
    """
    n = int(dead_V.sum())
    if n:
        table_VD[dead_V] = pick_from_all(vectors, n, noise, at, weight).to(table_VD)
    return n


def scarce_positions(hits_NV: Tensor) -> Tensor:
    """How likely vectors of each position are to become codes, [N]: the more, the fewer codes the position uses
    (Selftok, arXiv 2505.07538): softmax(10 w / max w) with w = 1 / perplexity of the position's hits."""
    w = 1 / perplexity(hits_NV).clamp_min(1)
    return (10 * w / w.max()).softmax(0)


@torch.no_grad()
def pull_(table_VD: Tensor, frequency_V: Tensor, vectors: Tensor, decay: float = 0.99) -> None:
    """Moves every code towards its nearest vector, the more the rarer it is used, in place (CVQ, arXiv 2307.15139).

    `frequency_V` is a moving average (by `decay`) of the share of vectors of each code, the same in all processes.
    """
    rows = vectors.reshape(-1, vectors.shape[-1]).to(table_VD)
    anchors = rows[nearest(table_VD, rows)]
    if several_ranks():
        every = gathered_over_ranks(anchors)  # [ranks, V, D]
        best = (every - table_VD).square().sum(2).argmin(0)
        anchors = every[best, torch.arange(len(table_VD), device=best.device)]
    alpha_V = torch.exp(-10 * len(table_VD) * frequency_V / (1 - decay) - 1e-3)[:, None]
    table_VD.lerp_(anchors, alpha_V.to(table_VD))
