"""Every system of the registry and every toy keeps every law that applies to it; every mutant breaks its own."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from arvis.laws import LAWS, REQUEST, Case, LawBroken, case_of, examine, laws_of
from arvis.systems import SYSTEMS
from toys import TOYS, toy
from toys.mutants import MUTANTS

REGISTERED = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]


@cache
def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    if name in TOYS:
        return Case(name=name, make=lambda seed: toy(name, seed, dtype), request=REQUEST)
    return case_of(name, dtype)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", [*TOYS, *REGISTERED])
def test_law(name: str, law: str) -> None:
    reason = LAWS[law].unfit(case(name))
    if reason:
        pytest.skip(reason)
    assert examine(case(name), law)


@pytest.mark.parametrize("name", [*TOYS, *REGISTERED])
def test_laws_in_float32(name: str) -> None:
    """In the precision of use: no float64 slips into a network, and caches stay within 1e-4 of one pass."""
    c = case(name, torch.float32)
    assert c.tolerance == 1e-4
    for law in set(laws_of(c)) & {"cache", "prefill", "guidance", "mass", "round-trip"}:
        assert examine(c, law)


def test_laws_apply_where_they_should() -> None:
    """A law that silently applies to nothing would pass for ever."""
    missing = {name: set(LAWS) - set(laws_of(case(name))) for name in TOYS}
    assert missing == {
        "raster": set(),
        "raster-window": set(),
        "next-scale": {"window"},
        "fronts": {"window"},
        "levels": {"window"},
        "masked": {"window", "cache"},
        "masked-flow": {"window", "cache", "mass"},
        "confident": {"window", "cache", "mass"},
        "clean-noisy": {"window", "mass"},
    }


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_breaks_its_own_law_and_no_other(name: str) -> None:
    def make(seed: int):
        torch.manual_seed(seed)
        return MUTANTS[name].make().double().eval()

    mutant, broken = Case(name=name, make=make, request=REQUEST), {}
    for law in laws_of(mutant):
        try:
            examine(mutant, law)
        except LawBroken as error:
            broken[law] = str(error)
    assert set(broken) == MUTANTS[name].breaks, broken
    assert all(name in text and law in text for law, text in broken.items())


def test_every_law_has_a_mutant() -> None:
    assert set().union(*(mutant.breaks for mutant in MUTANTS.values())) == set(LAWS)


def test_a_law_that_does_not_apply_says_why() -> None:
    with pytest.raises(ValueError, match="window law does not apply to fronts: it takes no windows"):
        examine(case("fronts"), "window")
