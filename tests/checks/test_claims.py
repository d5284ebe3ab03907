"""Claims and the running of checks, on a check that is a single number."""

import math
import sys
from types import SimpleNamespace

import pytest

import arvis
from arvis import checks
from arvis.checks import at_least, at_most, exactly


def lower(trained: SimpleNamespace) -> None:
    trained.value -= 1


SMALL = SimpleNamespace(
    train=lambda on_step: on_step() or SimpleNamespace(value=2.0),
    examine=lambda trained: [at_least("two", trained.value, 2.0), at_most("ten", trained.value, 10.0)],
    MUTANTS={"lower": lower, "nothing": lambda trained: None},
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(checks.claims, "covered", lambda slug: slug == "small")
    monkeypatch.setitem(sys.modules, "arvis.checks.small", SMALL)


def test_rules_and_nan():
    assert at_most("a", 1.0, 1.0).ok and not at_most("a", 1.1, 1.0).ok and not at_most("a", math.nan, 1.0).ok
    assert at_least("a", 1.0, 1.0).ok and not at_least("a", 0.9, 1.0).ok and not at_least("a", math.nan, 1.0).ok
    assert exactly("a", 310_283_520, 310_283_520).ok and not exactly("a", 310_283_521, 310_283_520).ok


def test_a_claim_says_what_was_measured_and_what_it_should_be():
    assert str(at_most("gap", 0.25, 1e-4)) == "FAILED  gap: 0.25 (at most 0.0001)"
    assert str(exactly("size", 310_283_520, 310_283_520)) == "ok      size: 310,283,520 (exactly 310,283,520)"


def test_mutants_are_tried_on_copies_and_one_that_passes_is_a_failed_claim(small):
    steps = []
    assert [c.ok for c in checks.run("small", on_step=lambda: steps.append(1))] == [True, True]
    assert len(steps) == 1
    claims = checks.run("small", mutants=True)
    assert [c.ok for c in claims] == [True, True, True, False]
    assert "broken by: nothing" in claims[-1].name


def test_a_system_without_a_check_is_named():
    with pytest.raises(ValueError, match="'nowhere' has no check yet"):
        checks.run("nowhere")
    assert any(checks.covered(slug) for slug in arvis.list_systems())
