"""The check of HMAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import hmar
from arvis.checks.digits import digits
from arvis.checks.hmar import Length, Trained
from arvis.noise import Noise

broken = partial(checks.broken, hmar)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of everything on 96 digits; then transformers with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = hmar.train(lambda: steps.append(1), Length(tokenizer=2, scales=2, mask=2), data)
    assert len(steps) == 8
    assert not trained.system.transformer.scales.word.weight.requires_grad, "stage 2 must freeze stage 1"
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_scales_are_independent_and_are_not_when_broken(brief):
    assert hmar.independent(brief.system, brief.digits).ok
    assert not hmar.independent(broken(brief, "ignored rule").system, brief.digits).ok


@torch.no_grad()
def test_passes_draw_the_least_sure_tokens_and_do_not_when_broken(brief):
    assert hmar.at_once(brief.system).ok
    assert all(claim.ok for claim in hmar.redrawn(brief.system))
    assert not hmar.redrawn(broken(brief, "everything drawn again").system)[0].ok


@torch.no_grad()
def test_the_branch_is_told_tokens_and_is_not_when_broken(brief):
    tokens = brief.system.tokenizer.encode(brief.digits.test_images)
    noise, few, many = Noise.of(0, 48), torch.full((48,), 0.25), torch.full((48,), 0.75)
    for system, blind in ((brief.system, False), (broken(brief, "branch told nothing").system, True)):
        cond = system.prepare({"class_labels": brief.digits.test_labels})
        c = system.transformer.scales.conditioner(cond, torch.zeros(48, dtype=torch.bool))
        a, b = (system.masked_pass(tokens, system.hidden(noise, share), c) for share in (few, many))
        assert torch.equal(a, b) == blind


@torch.no_grad()
def test_pairs_are_those_of_the_schedule_and_are_not_when_broken(brief):
    assert all(claim.ok for claim in hmar.economical(brief.system))
    assert not hmar.economical(broken(brief, "ignored rule").system)[0].ok


@torch.no_grad()
def test_the_head_and_the_class_matter(brief):
    own = hmar.unseen(brief.system, brief.digits)
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(hmar.unseen(broken(brief, mutant).system, brief.digits) - own) > 1e-3, mutant


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(hmar.parameters()) == 4 and all(claim.ok for claim in hmar.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("hmar", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 14 + len(hmar.MUTANTS)
