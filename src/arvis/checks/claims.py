"""A published claim at laptop scale: train a small system, measure, compare with thresholds, and break it on purpose.

The file of a system here offers

    train(on_step)       the small system, trained; `on_step()` is called after every update
    examine(trained)     its claims
    MUTANTS              name -> a function that breaks what was trained, in place; a good check notices each
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from arvis.published import Preset

OnStep = Callable[[], None]


class Claim(NamedTuple):
    """A measured value and what it has to be."""

    name: str
    value: float
    threshold: float
    ok: bool
    rule: Literal["at most", "at least", "exactly"] = "at least"

    def __str__(self) -> str:
        value, threshold = (f"{x:,.0f}" if abs(x) >= 1e4 else f"{x:.4g}" for x in (self.value, self.threshold))
        return f"{'ok' if self.ok else 'FAILED':6}  {self.name}: {value} ({self.rule} {threshold})"


def at_most(name: str, value: float, threshold: float) -> Claim:
    """NaN is never at most anything."""
    return Claim(name, value, threshold, value <= threshold, "at most")


def at_least(name: str, value: float, threshold: float) -> Claim:
    return Claim(name, value, threshold, value >= threshold, "at least")


def exactly(name: str, value: float, threshold: float) -> Claim:
    return Claim(name, value, threshold, value == threshold, "exactly")


def sizes(build: Callable[[Any], Any], presets: Mapping[str, Preset], counts: Mapping[str, int]) -> tuple[Claim, ...]:
    """The transformers of presets have the given numbers of parameters; counted without memory for them."""
    claims = []
    for name, count in counts.items():
        with torch.device("meta"):
            transformer = build(presets[name].config()).transformer
        claims.append(exactly(f"parameters of {name}", sum(p.numel() for p in transformer.parameters()), count))
    return tuple(claims)


def mean(x: Tensor) -> float:
    """The mean of numbers or truths, in float64."""
    return float(x.double().mean())


class Check(Protocol):
    """What the file of a system offers."""

    MUTANTS: Mapping[str, Callable[[Any], None]]

    def train(self, on_step: OnStep) -> Any: ...
    def examine(self, trained: Any) -> list[Claim]: ...


def covered(slug: str) -> bool:
    """Whether a system has a check."""
    return find_spec(_home(slug)) is not None


def _home(slug: str) -> str:
    return f"{__package__}.{slug.replace('-', '_')}"


def run(slug: str, mutants: bool = False, on_step: OnStep | None = None) -> list[Claim]:
    """The claims of a system, trained here; with `mutants` one more for each of them: that a claim fails on it.

    Raises ValueError for a system without a check.
    """
    if not covered(slug):
        raise ValueError(f"{slug!r} has no check yet: it would be the module {_home(slug)}")
    check: Check = import_module(_home(slug))  # type: ignore[assignment]
    trained = check.train(on_step or (lambda: None))
    claims = check.examine(trained)
    for name in check.MUTANTS if mutants else ():
        noticed = notice(check, trained, name)
        claims.append(at_least(f"claims that fail when broken by: {name}", len(noticed), 1))
    return claims


def notice(check: Check, trained: Any, mutant: str) -> list[Claim]:
    """The claims that fail on a broken copy of what was trained."""
    return [claim for claim in check.examine(broken(check, trained, mutant)) if not claim.ok]


def broken(check: Check, trained: Any, mutant: str) -> Any:
    """A copy of what was trained, broken by a mutant."""
    copied = copy.deepcopy(trained)
    check.MUTANTS[mutant](copied)
    return copied
