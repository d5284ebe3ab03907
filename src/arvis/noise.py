"""Counter-based noise: every random number is a pure function of (seed, item, use, step, index).

No generator state exists, so the numbers are the same on any device, in any batch, after any gather and after a resume.
The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014), applied once per coordinate, in wrapping int64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_M1 = 0xBF58476D1CE4E5B9 - 2**64
_M2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _hash(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


@lru_cache(maxsize=1024)
def _word(what: str) -> int:
    return int.from_bytes(blake2b(what.encode(), digest_size=8).digest(), "little", signed=True)


class Source(Protocol):
    """What asks for random numbers sees only this: `Noise`, or `Recorded` numbers of another implementation."""

    def uniform(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor: ...
    def normal(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor: ...
    def take(self, rows: Tensor) -> Source: ...
    def __len__(self) -> int: ...


class Noise:
    """Random numbers of a batch, one seed per item.

    `what` names the use ("draw", "accept", "init", ...), `at` the step (an int, or one int per item, so that items at
    different steps share a call). Item i never depends on who is in the batch with it.
    """

    def __init__(self, seed_B: Tensor, copies_B: Tensor | None = None) -> None:
        if seed_B.dim() != 1 or seed_B.dtype != torch.int64:
            raise ValueError(f"Noise needs one int64 seed per item, got {seed_B.dtype} of shape {tuple(seed_B.shape)}")
        self.seed_B = seed_B
        self.copies_B = torch.zeros_like(seed_B) if copies_B is None else copies_B
        """How many copies each item has had: no two of them ever share a seed."""

    @classmethod
    def of(cls, seed: int, items: int = 1, device: torch.device | str = "cpu") -> Noise:
        """Seeds of `items` items from one seed: item i is the same whatever `items` is."""
        counter = torch.arange(items, dtype=torch.int64, device=device)
        return cls(_hash(_hash(torch.full_like(counter, _signed(seed))) + counter * _GOLDEN))

    def __len__(self) -> int:
        return self.seed_B.shape[0]

    def bits(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        """int64 [B, *shape], all 64 bits random."""
        key = _hash(self.seed_B ^ _word(what))
        step = torch.as_tensor(at, dtype=torch.int64, device=key.device)
        key = _hash(key + step * _GOLDEN)
        index = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64, device=key.device)
        return _hash(key[:, None] + index * _GOLDEN).view(-1, *shape)

    def uniform(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        """float64 [B, *shape] in the open interval (0, 1), on a grid of 2^52 midpoints.

        Equal (what, at) give equal numbers: a longer draw begins with the shorter one."""
        return (_shift(self.bits(what, at, shape), 12).double() + 0.5) * 2.0**-52

    def normal(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        """float64 [B, *shape], standard normal (Box-Muller)."""
        radius = (-2 * self.uniform(what + "/radius", at, shape).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(what + "/angle", at, shape)).cos()

    def take(self, rows: Tensor) -> Noise:
        """The noise of rows [R]; the second, third, ... copy of a row is re-keyed, its first copy is not."""
        rows = rows.to(self.seed_B.device)
        alike = rows[:, None] == rows[None, :]
        copy = alike.tril(-1).sum(1)
        seed, copies = self.seed_B[rows], self.copies_B[rows]
        fresh = _hash(seed + (copies + copy) * _M1)
        return Noise(torch.where(copy > 0, fresh, seed), torch.where(copy > 0, 0, copies + alike.sum(1) - 1))

    @staticmethod
    def stack(parts: Sequence[Noise]) -> Noise:
        """The noise of all items, one batch after another."""
        return Noise(torch.cat([n.seed_B for n in parts]), torch.cat([n.copies_B for n in parts]))


class Recorded:
    """Numbers that were drawn elsewhere, by use: `values[what][at]` is [B, *shape] (parity with recorded runs)."""

    def __init__(
        self, uniform: Mapping[str, Sequence[Tensor]], normal: Mapping[str, Sequence[Tensor]], items: int
    ) -> None:
        self._uniform, self._normal, self._items = uniform, normal, items

    def __len__(self) -> int:
        return self._items

    def _read(self, table: Mapping[str, Sequence[Tensor]], what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        steps = {int(a) for a in at} if isinstance(at, Tensor) and at.dim() else {int(at)}
        if what not in table or len(steps) != 1:
            raise KeyError(f"no recorded noise for {what!r} at {sorted(steps)}; recorded uses: {sorted(table)}")
        value = table[what][steps.pop()]
        if tuple(value.shape[1:]) != tuple(shape):
            raise ValueError(f"recorded noise {what!r} has shape {tuple(value.shape[1:])}, asked for {tuple(shape)}")
        return value.double()

    def uniform(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        return self._read(self._uniform, what, at, shape)

    def normal(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        return self._read(self._normal, what, at, shape)

    def take(self, rows: Tensor) -> Recorded:
        def pick(table: Mapping[str, Sequence[Tensor]]) -> dict[str, Sequence[Tensor]]:
            return {what: [value[rows] for value in values] for what, values in table.items()}

        return Recorded(pick(self._uniform), pick(self._normal), len(rows))


def truncated(u: Tensor, mean: float, deviation: float, least: float, most: float) -> Tensor:
    """Gaussian numbers cut to [least, most], float64, of numbers u that are uniform in (0, 1)."""
    edges = (torch.tensor([least, most], dtype=torch.float64, device=u.device) - mean) / deviation
    below, above = torch.special.ndtr(edges).unbind()
    return mean + deviation * torch.special.ndtri(below + u.double() * (above - below))


def _signed(seed: int) -> int:
    """Any Python int as a wrapped int64."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
