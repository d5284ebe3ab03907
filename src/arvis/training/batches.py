"""Batches as a pure function of the step: the rows of a rank and a chunk, their seeds, and one batch made ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]
Data = Callable[[int], Batch]
_MASK = 2**64 - 1


def seed_of(seed: int, step: int, row: int) -> int:
    """A non-negative int64 that depends on the run's seed, the step and the row of the global batch."""
    x = 0
    for part in (seed, step, row):  # the finaliser of splitmix64 after each coordinate
        x = (x + (part + 1) * 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x >> 1


def seeds(seed: int, step: int, rows: Sequence[int]) -> Tensor:
    """The noise seeds of the given rows of the batch of `step`: int64 [B]."""
    return torch.tensor([seed_of(seed, step, row) for row in rows], dtype=torch.int64)


def size(batch: Batch) -> int:
    """The number of rows of a batch. Raises ValueError where its tensors and lists differ in length."""
    lengths = {name: len(value) for name, value in batch.items() if _has_rows(value)}
    if not lengths or len(set(lengths.values())) != 1:
        raise ValueError(f"every tensor and list of a batch has one entry per row, got the lengths {lengths}")
    return next(iter(lengths.values()))


def take(batch: Batch, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The given rows of every tensor and list, tensors on `device`; other values pass through."""
    whole = list(rows) == list(range(size(batch)))
    index = torch.tensor(rows)
    taken = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim():
            taken[name] = (value if whole else value[index.to(value.device)]).to(device, non_blocking=True)
        else:
            taken[name] = [value[i] for i in rows] if _has_rows(value) else value
    return taken


def chunks(rows: Sequence[int], count: int) -> list[list[int]]:
    """The rows in `count` consecutive parts of almost equal length. Raises ValueError for fewer rows than parts."""
    if not 1 <= count <= len(rows):
        raise ValueError(f"cannot accumulate {count} parts of a batch of {len(rows)} rows; lower `accumulate`")
    edges = [len(rows) * i // count for i in range(count + 1)]
    return [list(rows[a:b]) for a, b in pairwise(edges)]


class Ahead:
    """Calls `data` one step ahead in a thread; allowed because data is a pure function of the step."""

    def __init__(self, data: Data, steps: int) -> None:
        self._data = data
        self._steps = steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="arvis-data")
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; that of the next step is begun."""
        future = self._next[1] if self._next and self._next[0] == step else self._pool.submit(self._make, step)
        batch = future.result()
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return batch

    def _make(self, step: int) -> Batch:
        with torch.no_grad():
            return self._data(step)


def _has_rows(value: object) -> bool:
    return (isinstance(value, Tensor) and value.dim() > 0) or isinstance(value, (list, tuple))
