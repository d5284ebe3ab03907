"""Checks: the claim of each published system at laptop scale, and mutants that it has to notice."""

from arvis.checks.claims import Check, Claim, OnStep, at_least, at_most, broken, covered, exactly, notice, run

__all__ = ["Check", "Claim", "OnStep", "at_least", "at_most", "broken", "covered", "exactly", "notice", "run"]
