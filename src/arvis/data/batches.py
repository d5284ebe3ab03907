"""Batches as a pure function of the step: the whole state of reading a data set is one integer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arvis.data.images import to_network

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

# a change of one uint8 picture [3, H, W], with random numbers of its own
Augment = Callable[[Tensor, np.random.Generator], Tensor]


class Dataset(Protocol):
    """Items `{"image": uint8 [3, H, W], "caption": str, "label": int}`, each a pure function of its index."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class BatchesConfig:
    """`workers` threads read the items of a batch side by side; worth it for encoded pictures, not for scenes."""

    batch: int
    seed: int = 0
    shuffle: bool = True
    workers: int = 0


class Batches:
    """`{"image": float32 [B, 3, H, W] in [-1, 1], "prompt": list[str], "class_labels": int64 [B]}` for any step.

    Position p = step * batch + row reads epoch p // n of the data set, whose order is a permutation that is computed
    from (seed, epoch) one position at a time. Nothing is stored, so resuming is asking for the next step.
    """

    def __init__(self, dataset: Dataset, config: BatchesConfig, augment: Augment | None = None) -> None:
        if config.batch < 1:
            raise ValueError(f"a batch needs at least one row, got batch={config.batch}")
        if not len(dataset):
            raise ValueError("the data set is empty")
        self.dataset, self.config, self._augment = dataset, config, augment
        self._pool = ThreadPoolExecutor(config.workers, "arvis-read") if config.workers else None

    @property
    def steps_per_epoch(self) -> float:
        return len(self.dataset) / self.config.batch

    def __call__(self, step: int) -> dict[str, Any]:
        return self.batch_at(step)

    def indices_at(self, step: int) -> list[int]:
        """The rows of the data set that make up the batch of `step`."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        position_B = step * self.config.batch + np.arange(self.config.batch)
        epoch_B, within_B = np.divmod(position_B, len(self.dataset))
        if not self.config.shuffle:
            return within_B.tolist()
        return permuted(within_B, len(self.dataset), self.config.seed, epoch_B).tolist()

    def batch_at(self, step: int) -> dict[str, Any]:
        """The batch of `step`, whatever was asked for before."""
        indices = self.indices_at(step)
        first = step * self.config.batch
        read = map if self._pool is None else self._pool.map
        return collate(list(read(self._item, indices, range(first, first + len(indices)))))

    def stream(self, first: int = 0, ahead: int = 2) -> Iterator[dict[str, Any]]:
        """Batches from step `first` on, without end, `ahead` of them made in the background."""
        if ahead < 1:
            step = first
            while True:
                yield self.batch_at(step)
                step += 1
        with ThreadPoolExecutor(1, "arvis-batch") as pool:
            waiting: deque[Future[dict[str, Any]]] = deque()
            try:
                step = first
                while True:
                    while len(waiting) <= ahead:
                        waiting.append(pool.submit(self.batch_at, step))
                        step += 1
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _item(self, index: int, position: int) -> dict[str, Any]:
        item = self.dataset[index]
        if self._augment is None:
            return item
        rng = np.random.Generator(np.random.Philox(key=np.array([self.config.seed % 2**64, position], np.uint64)))
        return {**item, "image": self._augment(item["image"], rng)}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of a data set as one batch. Raises ValueError where the pictures differ in shape."""
    shapes = {tuple(item["image"].shape) for item in items}
    if len(shapes) != 1:
        raise ValueError(f"the pictures of a batch must have one shape, got {sorted(shapes)}")
    return {
        "image": to_network(torch.stack([item["image"] for item in items])),
        "prompt": [item["caption"] for item in items],
        "class_labels": torch.tensor([item["label"] for item in items], dtype=torch.int64),
    }


def crop_and_flip(size: int, *, flip: bool = True) -> Augment:
    """A random `size` x `size` part of a larger picture, mirrored left to right half of the time if `flip`."""

    def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = image.shape[-2:]
        if min(height, width) < size:
            raise ValueError(f"cannot crop {size} x {size} from a picture of {height} x {width}")
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        image = image[..., top : top + size, left : left + size]
        return image.flip(-1) if flip and rng.random() < 0.5 else image

    return augment


def permuted(position: np.ndarray, count: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where a seeded permutation of 0 ... count - 1 sends each position; another permutation for each (seed, epoch).

    A Feistel network of six rounds over the next even number of bits, walked until it lands inside (Black and Rogaway
    2002): no table, any count, any position at once.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    key = _mix(_mix(np.full(position.shape, seed % 2**64, np.uint64)) + epoch.astype(np.uint64) * _GOLDEN)
    value = position.astype(np.uint64)
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & low
        for turn in range(6):
            word = _mix(key[outside] + right * _GOLDEN + np.uint64(turn << 57))
            left, right = right, left ^ (word & low)
        value[outside] = left << np.uint64(half) | right
        outside = value >= count
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; wraps."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))
