"""The headline effects of the systems: what a paper claims beside what is counted and measured here.

A file here is one system (dashes as underscores) and offers two functions:

    counted()  -> list[Effect]    at the official sizes, from the code on the meta device or from exact formulas
    measured() -> list[Effect]    at laptop scale on two quiet cores, under three minutes

A ratio says in `quantity` what is divided by what. `published` is the paper's own number, or "" where it has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One number: "peak memory of VAR-d24 over that of MVAR-d24, batch 64", 3.1, "x", published "3.0x"."""

    quantity: str
    value: float
    unit: str
    how: Literal["counted", "measured"]
    published: str = ""
    note: str = ""


def fastest(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the shortest of the runs that fit into a time, after one to warm up."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
