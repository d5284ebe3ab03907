"""How tensors of an official checkpoint become ours, and exactly back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor


class Transform(Protocol):
    """Tensors of one row, official -> ours and exactly back; also on meta tensors."""

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Our tensors; `own` are the module's present ones, for their shapes."""
        ...

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """The official tensors."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        return official

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours


@dataclass(frozen=True)
class Rearrange:
    """One tensor in another shape, by an einops pattern official -> ours; `sizes` for the axes that need one."""

    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        return [rearrange(official[0], self.pattern, **self.sizes)]

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        left, right = self.pattern.split("->")
        return [rearrange(ours[0], f"{right.strip()} -> {left.strip()}", **self.sizes)]


@dataclass(frozen=True)
class Fuse:
    """Several official tensors in one of ours, joined along `dim`; `parts`: how many equal ones, or their sizes."""

    parts: int | tuple[int, ...]
    dim: int = 0

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        made = torch.cat(list(official), self.dim)
        lengths = [tensor.shape[self.dim] for tensor in official]
        due = [tensor.shape[self.dim] for tensor in _split(made, self.parts, self.dim)]
        if lengths != due:
            raise ValueError(f"lengths {lengths} along axis {self.dim}, expected {due}")
        return [made]

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return _split(ours[0], self.parts, self.dim)


@dataclass(frozen=True)
class Split:
    """One official tensor in several of ours, cut along `dim`; `parts`: how many equal ones, or their sizes."""

    parts: int | tuple[int, ...]
    dim: int = 0

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        return _split(official[0], self.parts, self.dim)

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat(list(ours), self.dim)]


def _split(tensor: Tensor, parts: int | tuple[int, ...], dim: int) -> Sequence[Tensor]:
    length = tensor.shape[dim]
    if isinstance(parts, int):
        if length % parts:
            raise ValueError(f"a length of {length} does not divide into {parts} equal parts")
        parts = (length // parts,) * parts
    return tensor.split(parts, dim)


@dataclass(frozen=True)
class Tied:
    """One tensor of ours that the official file holds under `copies` names, all equal."""

    copies: int

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(not _equal(official[0], other) for other in official[1:]):
            raise ValueError("tensors that should be tied differ")
        return [official[0]]

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [ours[0]] * self.copies


@dataclass(frozen=True)
class Chain:
    """Transforms one after another, in the order official -> ours."""

    steps: tuple[Transform, ...]

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        for step in self.steps:
            official = step.to_ours(official, own)
        return official

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        for step in reversed(self.steps):
            ours = step.to_official(ours)
        return ours


@dataclass(frozen=True)
class Either:
    """The first of several transforms that gives our shapes: files differ in theirs. What is written has the first."""

    choices: tuple[Transform, ...]

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        found = ", ".join(str(tuple(tensor.shape)) for tensor in official)
        for choice in self.choices:
            try:
                made = choice.to_ours(official, own)
            except (ValueError, RuntimeError):
                continue
            if [tensor.shape for tensor in made] == [tensor.shape for tensor in own]:
                return made
        raise ValueError(f"shape {found} is none of the {len(self.choices)} that files have")

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.choices[0].to_official(ours)


@dataclass(frozen=True)
class Constant:
    """An official tensor that is known: `make(like)`, or `make()` where the row has no `like`.

    It depends on the shape and the number format of `like` alone. A file with other values is refused, unless `check`
    is off (statistics that nothing here uses).
    """

    make: Callable[..., Tensor]
    check: bool = True

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.check and not _equal(official[0], self.make(*own)):
            raise ValueError("its values should be the constant ones that the model assumes, and are not")
        return []

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self.make(*ours)]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal values in whichever number format; equal shapes where there are no values."""
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return a.shape == b.shape
    return torch.equal(a, b.to(a))
