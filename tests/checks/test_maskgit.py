"""The check of MaskGIT: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import maskgit
from arvis.checks.digits import digits
from arvis.checks.maskgit import Length, Trained
from arvis.noise import Noise
from arvis.systems.maskgit import MaskGITSampling

broken = partial(checks.broken, maskgit)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 24)
    trained = maskgit.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2), data)
    assert len(steps) == 4
    torch.manual_seed(0)
    for name, p in trained.system.transformer.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_the_order_is_the_schedules_and_is_not_when_broken(brief):
    assert all(claim.ok for claim in maskgit.ordered(brief.system))
    sizes, surest = maskgit.ordered(broken(brief, "everything kept at once").system)
    assert not sizes.ok
    sizes, surest = maskgit.ordered(broken(brief, "wrong order").system)
    assert sizes.ok and not surest.ok


@torch.no_grad()
def test_hidden_codes_are_not_seen_and_known_ones_are_unless_broken(brief):
    assert all(claim.ok for claim in maskgit.visible(brief.system, brief.digits))
    hidden, known = maskgit.visible(broken(brief, "hidden codes seen").system, brief.digits)
    assert not hidden.ok and known.ok
    hidden, known = maskgit.visible(broken(brief, "known codes not seen").system, brief.digits)
    assert hidden.ok and not known.ok


@torch.no_grad()
def test_the_class_and_known_codes_matter_and_do_not_when_broken(brief):
    half, label = (abs(claim.value) for claim in maskgit.informed(brief.system, brief.digits))
    assert min(half, label) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(maskgit.informed(broken(brief, mutant).system, brief.digits)[1].value) < 1e-6, mutant
    for mutant in ("zeroed head", "known codes not seen"):
        assert abs(maskgit.informed(broken(brief, mutant).system, brief.digits)[0].value) < 1e-6, mutant


@torch.no_grad()
def test_kept_codes_stay_and_do_not_when_broken(brief):
    kept, painted, _ = maskgit.edited(brief.system, brief.digits, 12)
    assert kept.ok and painted.ok
    assert not maskgit.edited(broken(brief, "given codes forgotten").system, brief.digits, 12)[0].ok


def test_swapped_guidance_weighs_the_null_row_up(brief):
    swapped = broken(brief, "swapped guidance").system
    cond = swapped.prepare({"class_labels": [1]})
    s = swapped.start(cond, MaskGITSampling(cfg_scale=2.0), Noise.of(0, 1))
    assert s.weight(3).tolist() == [[-1.0, 2.0]]


def test_the_published_size_has_its_number_of_parameters():
    assert maskgit.parameters().ok


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("maskgit", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 12 + len(maskgit.MUTANTS)
