"""The headline effects of the systems: what a paper claims beside what is counted and measured here.

A file here is one system (dashes as underscores) and offers two functions:

    counted()  -> list[Effect]    at the official sizes, from the code on the meta device or from exact formulas
    measured() -> list[Effect]    at laptop scale on two quiet cores, under three minutes

A ratio says in `quantity` what is divided by what. `published` is the paper's own number, or "" where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One number: "peak memory of VAR-d24 over that of MVAR-d24, batch 64", 3.1, "x", published "3.0x"."""

    quantity: str
    value: float
    unit: str
    how: Literal["counted", "measured"]
    published: str = ""
    note: str = ""
