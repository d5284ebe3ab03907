"""The check of MVAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import mvar
from arvis.checks.digits import digits
from arvis.checks.mvar import Length, Trained
from arvis.noise import Noise
from arvis.systems.mvar import MVARSampling

broken = partial(checks.broken, mvar)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Few updates on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = mvar.train(lambda: steps.append(1), Length(tokenizer=2, visits=1), data)
    assert len(steps) == 2 + 3 + 1
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_windows_are_those_of_the_rule_and_are_not_when_broken(brief):
    assert all(claim.ok for claim in mvar.windows(brief.system))
    for mutant in ("windows cut at borders", "whole scales seen", "ignored rule"):
        assert not mvar.windows(broken(brief, mutant).system)[0].ok, mutant


@torch.no_grad()
def test_cells_reach_as_far_as_the_layers_and_do_not_when_broken(brief):
    assert mvar.reach(brief.system).ok
    assert not mvar.reach(broken(brief, "whole scales seen").system).ok
    assert not mvar.reach(broken(brief, "windows cut at borders").system).ok


@torch.no_grad()
def test_scales_are_independent_and_are_not_when_broken(brief):
    assert mvar.independent(brief.system, brief.digits).ok
    assert not mvar.independent(broken(brief, "ignored rule").system, brief.digits).ok


@torch.no_grad()
def test_pairs_are_those_of_the_rule(brief):
    assert [claim.ok for claim in mvar.economical(brief.system)] == [True, True]


@torch.no_grad()
def test_the_class_matters_and_does_not_when_broken(brief):
    assert abs(mvar.conditioned(brief.system, brief.digits).value) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(mvar.conditioned(broken(brief, mutant).system, brief.digits).value) < 1e-6, mutant


def test_swapped_guidance_weighs_the_null_row_up(brief):
    swapped = broken(brief, "swapped guidance").system
    s = swapped.start(swapped.prepare({"class_labels": [1]}), MVARSampling(cfg_scale=2.0), Noise.of(0, 1))
    assert s.weight(5).tolist() == [[-2.0, 3.0]]


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(mvar.parameters()) == 3 and all(claim.ok for claim in mvar.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("mvar", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 12 + len(mvar.MUTANTS)
