"""Search over states: consumers of steps that gather items between two of them.

A state is gathered whole (tokens, caches, accumulators, histories), first copies keep their noise and further ones get
their own, so best-of-n, resampling and beams need nothing from a system. Copies of a prompt lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arvis.sampling import draw
from arvis.state import State, System
from arvis.walk import Step, walk


class Search(Protocol):
    """A way to walk: steps over several paths of each item, at the end of which each has one again.

    `asked` says what each item of the state is for, as a reward wants to know it.
    """

    @property
    def most(self) -> int:
        """Paths of an item at most."""
        ...

    def __call__(self, system: System, s: State, asked: Sequence[Any]) -> Iterator[Step]: ...


def search(steps: Iterable[Step], select: Callable[[Step], Tensor | None]) -> Iterator[Step]:
    """Yield steps, gathering the rows that `select` names (None: leave the items as they are) before each goes on."""
    for step in steps:
        rows = select(step)
        if rows is not None:
            step.state.take_(rows)
        yield step


def copies(items: int, n: int) -> Tensor:
    """The rows of n copies of each item."""
    return torch.arange(items).repeat_interleave(n)


def best(score_B: Tensor, n: int) -> Tensor:
    """The row of the best of each n copies (the first of equals)."""
    score = score_B.view(-1, n)
    return score.argmax(1).cpu() + n * torch.arange(len(score))


def resample(weight_B: Tensor, n: int, u: Tensor) -> Tensor:
    """Rows of a systematic resampling inside each n copies, weights >= 0 (all zero: none), one uniform u per prompt.

    A copy of weight w among n of mean weight m goes on floor(w/m) or ceil(w/m) times, w/m times on average.
    """
    weight = weight_B.view(-1, n).double().cpu()
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
    cdf = weight.cumsum(1)
    points = (torch.arange(n) + u.cpu().double()[:, None]) / n * cdf[:, -1:]
    rows = torch.searchsorted(cdf, points, right=True).clamp(max=n - 1)
    return (rows + n * torch.arange(len(weight))[:, None]).flatten()


def multinomial(weight: Tensor, m: int, u: Tensor) -> Tensor:
    """Rows [items * m] of m draws with replacement among each item's n copies, weights [items, n] >= 0 of any positive
    sum, uniform numbers u [items, m] in (0, 1)."""
    rows = draw(weight.double()[:, None].expand(-1, m, -1), u.to(weight.device))
    return (rows + weight.shape[1] * torch.arange(len(weight), device=rows.device)[:, None]).flatten().cpu()


def best_of_n(system: System, s: State, n: int, score: Callable[[State], Tensor]) -> State:
    """Finish n copies of each item and keep the one with the best score [B * n]."""
    s.take_(copies(len(s), n))
    for _ in walk(system, s):
        pass
    return s.take_(best(score(s), n))
