"""The check of VARiant: each mutant moves the claim that is there for it, also before much is learned."""

import copy
from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import variant
from arvis.checks.digits import digits
from arvis.checks.variant import FEW, Length, Trained

broken = partial(checks.broken, variant)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = variant.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2, progressive=4), data)
    assert len(steps) == 8
    assert trained.whole_joint > 0 and trained.few_before != trained.whole_before
    torch.manual_seed(0)
    for p in trained.system.base.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


def test_a_copy_has_weights_of_its_own(brief):
    other = copy.deepcopy(brief).system
    assert all(a is b for a, b in zip(other.parameters(), other.base.parameters(), strict=True))
    assert not any(a is b for a, b in zip(other.parameters(), brief.system.parameters(), strict=True))


@torch.no_grad()
def test_the_base_is_met_and_is_not_when_broken(brief):
    assert all(claim.ok for claim in variant.equal(brief.system))
    assert not variant.equal(broken(brief, "forgotten keys").system)[0].ok


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    assert variant.cached(brief.system).ok
    assert not variant.cached(broken(brief, "forgotten keys").system).ok


@torch.no_grad()
def test_skipped_layers_are_not_touched_and_are_when_broken(brief):
    assert variant.untouched(brief.system).ok
    for mutant in ("ignored depth", "neighbouring layers"):
        assert not variant.untouched(broken(brief, mutant).system).ok, mutant


@torch.no_grad()
def test_the_cache_is_counted_and_is_another_when_broken(brief):
    assert all(claim.ok for claim in variant.kept(brief.system))
    for mutant in ("ignored depth", "early scales cut short", "room for everything"):
        assert not variant.kept(broken(brief, mutant).system)[0].ok, mutant


@torch.no_grad()
def test_the_class_matters_and_does_not_when_broken(brief):
    assert abs(variant.conditioned(brief.system, brief.digits).value) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(variant.conditioned(broken(brief, mutant).system, brief.digits).value) < 1e-6, mutant


@torch.no_grad()
def test_which_layers_pass_matters(brief):
    few = [variant.late_nats(x.system, brief.digits, FEW) for x in (brief, broken(brief, "neighbouring layers"))]
    assert abs(few[0] - few[1]) > 1e-3


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("variant", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 9 + len(variant.MUTANTS)
