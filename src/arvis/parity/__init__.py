"""Parity: our systems reproduce recordings of the official code, tensor by tensor."""

from arvis.parity.harness import (
    Fixture,
    KeyReport,
    ParityError,
    Row,
    Runner,
    allowed,
    covered,
    difference,
    find,
    map_keys,
    places,
    recordings,
    run,
    runners,
)

__all__ = [
    "Fixture",
    "KeyReport",
    "ParityError",
    "Row",
    "Runner",
    "allowed",
    "covered",
    "difference",
    "find",
    "map_keys",
    "places",
    "recordings",
    "run",
    "runners",
]
