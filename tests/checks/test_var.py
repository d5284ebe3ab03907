"""The check of VAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import var
from arvis.checks.digits import digits
from arvis.checks.var import Length, Trained
from arvis.noise import Noise
from arvis.systems.var import VARSampling

broken = partial(checks.broken, var)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = var.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2), data)
    assert len(steps) == 4
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    assert var.cached(brief.system).ok
    for mutant in ("ignored mask", "forgotten cache"):
        assert not var.cached(broken(brief, mutant).system).ok, mutant


@torch.no_grad()
def test_the_class_matters_and_does_not_when_broken(brief):
    assert abs(var.conditioned(brief.system, brief.digits).value) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(var.conditioned(broken(brief, mutant).system, brief.digits).value) < 1e-6, mutant


@torch.no_grad()
def test_scales_add_up_and_do_not_when_broken(brief):
    share, error = var.residual(brief.system, brief.digits)
    assert share.ok
    for mutant in ("no residual", "wrong order"):
        _, worse = var.residual(broken(brief, mutant).system, brief.digits)
        assert worse.value > error.value + 0.05, mutant


def test_swapped_guidance_weighs_the_null_row_up(brief):
    swapped = broken(brief, "swapped guidance").system
    cond = swapped.prepare({"class_labels": [1]})
    s = swapped.start(cond, VARSampling(cfg_scale=2.0), Noise.of(0, 1))
    assert s.weight(3).tolist() == [[-2.0, 3.0]]


def test_real_digits_are_recognised_and_wrong_ones_are_not():
    data = var.digits()
    assert len(data.images) == 1500 and len(data.test_images) == 297
    assert data.recognised(data.test_images, data.test_labels) > 0.97
    assert data.recognised(data.test_images, (data.test_labels + 1) % 10) < 0.05


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(var.parameters()) == 5 and all(claim.ok for claim in var.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("var", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 11 + len(var.MUTANTS)
