"""The laws that every system keeps, as functions: what each promises follows from the three verbs alone.

A law takes a `Case`, returns a sentence with what it measured, and raises `LawBroken` naming law, system and numbers.
`LAWS` says for each law why it does not apply to a case, if it does not. All run in float64 on tiny systems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from arvis.laws import predictions, states
from arvis.laws.case import REQUEST, Case, LawBroken, case_of
from arvis.state import Parallel, Windowed
from arvis.tokens import at

__all__ = ["LAWS", "REQUEST", "Case", "Law", "LawBroken", "case_of", "examine", "laws_of"]


def _always(case: Case) -> str:
    return ""


def _parallel(case: Case) -> str:
    return "" if isinstance(case.system, Parallel) else "it has no one-pass form"


def _windowed(case: Case) -> str:
    return "" if isinstance(case.system, Windowed) else "it takes no windows of drafts"


def _uncached(case: Case) -> str:
    return "" if any(True for _ in predictions.trunk_calls(case)) else "it never calls a trunk without a cache"


def _guided(case: Case) -> str:
    return "" if case.start(sampling=case.system.Sampling()).weights.shape[-1] > 1 else "it is not guided"


def _likely(case: Case) -> str:
    if not case.system.space.sizes:
        return "its tokens are not codes"
    d = case.system.predict(case.start())
    try:
        d.log_prob(at(case.tokens("true"), d.where))
    except NotImplementedError:
        return "it has no likelihood"
    return ""


class Law(NamedTuple):
    check: Callable[[Case], str]
    """What was measured; raises LawBroken."""
    unfit: Callable[[Case], str]
    """Why the law does not apply, or nothing."""


LAWS: dict[str, Law] = {
    "blind": Law(predictions.blind, _always),
    "again": Law(predictions.again, _always),
    "row": Law(predictions.row, _uncached),
    "cache": Law(predictions.cache, _parallel),
    "mass": Law(predictions.mass, _likely),
    "guidance": Law(predictions.guidance, _guided),
    "seed": Law(states.seed, _always),
    "gather": Law(states.gather, _always),
    "prefill": Law(states.prefill, _always),
    "window": Law(states.window, _windowed),
    "round-trip": Law(states.round_trip, _always),
}


@torch.no_grad()
def examine(case: Case, name: str) -> str:
    """Check one law: what was measured. LawBroken if it is broken, ValueError if it does not apply."""
    law = LAWS[name]
    reason = law.unfit(case)
    if reason:
        raise ValueError(f"the {name} law does not apply to {case.name}: {reason}")
    try:
        return law.check(case)
    except (ValueError, RuntimeError, LookupError) as error:
        raise case.broken(name, f"{type(error).__name__}: {error}") from error


@torch.no_grad()
def laws_of(case: Case) -> tuple[str, ...]:
    """The laws that apply to a case."""
    return tuple(name for name, law in LAWS.items() if not law.unfit(case))
