"""Several data sets as one, in fixed proportions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from arvis.data.batches import Dataset

_CYCLE = 1000  # weights are rounded to thousandths


class Mixture:
    """Data sets interleaved evenly by weight, as a pure function of the index.

    Item i comes from one of the data sets; each is read in its own order and starts again when it is through. The
    length is such that the one that takes longest is read once. Classes are put one after another, labels shifted to
    match.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(datasets) if weights is None else list(weights)
        if not datasets or len(weights) != len(datasets) or min(weights) <= 0:
            raise ValueError(
                f"a mixture needs data sets with one positive weight each, got {len(datasets)} and {weights}"
            )
        total = sum(weights)
        self._datasets = tuple(datasets)
        self._slots = [0] * _CYCLE  # which data set owns each slot of a cycle
        self._owned: list[list[int]] = [[] for _ in datasets]
        for slot in range(_CYCLE):
            # the one furthest behind its share is next
            behind = [(slot + 1) * w / total - len(owned) for w, owned in zip(weights, self._owned, strict=True)]
            chosen = max(range(len(behind)), key=behind.__getitem__)
            self._slots[slot] = chosen
            self._owned[chosen].append(slot)
        if not all(self._owned):
            raise ValueError(f"weights {weights} give a data set less than a thousandth of the mixture")
        self._length = max(-(-len(d) * _CYCLE // len(owned)) for d, owned in zip(datasets, self._owned, strict=True))
        # a data set without classes still has the label 0
        counts = [max(1, len(d.classes)) for d in datasets]
        self._offsets = [sum(counts[:k]) for k in range(len(counts))]
        self.classes = tuple(name for d in datasets for name in (d.classes or ("",)))

    def __len__(self) -> int:
        return self._length

    def source_of(self, i: int) -> tuple[int, int]:
        """Which data set item i comes from, and which of its items it is."""
        if not 0 <= i < self._length:
            raise IndexError(f"item {i} of a mixture of {self._length}")
        cycle, slot = divmod(i, _CYCLE)
        k = self._slots[slot]
        owned = self._owned[k]
        return k, (cycle * len(owned) + bisect_left(owned, slot)) % len(self._datasets[k])

    def __getitem__(self, i: int) -> dict[str, Any]:
        k, j = self.source_of(i)
        item = self._datasets[k][j]
        return {**item, "label": item["label"] + self._offsets[k]}
