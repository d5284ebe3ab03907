"""The check of SAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import sar
from arvis.checks.digits import digits
from arvis.checks.sar import Length, Trained

broken = partial(checks.broken, sar)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """One update of each stage and of each copy, on 96 digits."""
    steps, data = [], digits().first(96, 24)
    trained = sar.train(lambda: steps.append(1), Length(tokenizer=1, transformer=1, apart=1), data)
    assert len(steps) == 4
    return trained


@torch.no_grad()
def test_what_is_exact_holds_and_does_not_when_broken(brief):
    exact = {
        "never nothing": sar.identical,
        "enlarged otherwise": sar.fed,
        "scales see each other": sar.apart,
        "aimed at data": sar.aimed,
    }
    assert sar.separate(brief).ok
    for mutant, claim in exact.items():
        assert claim(brief).ok, str(claim(brief))
        assert not claim(broken(brief, mutant)).ok, mutant


@torch.no_grad()
def test_copies_that_are_none_do_not_pass(brief):
    parts = {n: p for n, p in brief.refined.transformer.named_parameters()}
    assert any(not torch.equal(p, parts[n]) for n, p in brief.plain.transformer.named_parameters())
    for mutant in ("forgotten refinement", "teacher forcing kept"):
        assert not all(claim.ok for claim in sar.improved(broken(brief, mutant))), mutant


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(sar.parameters()) == 3 and all(claim.ok for claim in sar.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("sar", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 12 + len(sar.MUTANTS)
