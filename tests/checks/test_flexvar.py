"""The check of FlexVAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import flexvar
from arvis.checks.digits import digits
from arvis.checks.flexvar import LARGE, LONG, SHORT, Length, Trained

broken = partial(checks.broken, flexvar)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 24)
    trained = flexvar.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2), data)
    assert len(steps) == 4
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_on_every_list_and_disagree_when_broken(brief):
    assert all(flexvar.cached(brief.system, layout).ok for layout in flexvar.LISTS)
    for mutant in ("ignored mask", "forgotten cache"):
        for layout in (SHORT, LARGE):
            assert not flexvar.cached(broken(brief, mutant).system, layout).ok, mutant


@torch.no_grad()
def test_the_class_matters_and_does_not_when_broken(brief):
    def moved(trained):
        tokens = trained.system.tokenizer.encode(trained.digits.test_images[:4], SHORT)
        logits = [
            trained.system.teacher(tokens, trained.system.prepare({"class_labels": [y] * 4}), SHORT).logits
            for y in (0, 1)
        ]
        return float((logits[0] - logits[1]).abs().max())

    assert moved(brief) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert moved(broken(brief, mutant)) < 1e-6, mutant


@torch.no_grad()
def test_other_broken_parts_move_what_they_should(brief):
    assert abs(flexvar.swapped(brief.system, brief.digits).value) > 1e-4
    assert abs(flexvar.swapped(broken(brief, "blind input").system, brief.digits).value) < 1e-6
    images = brief.digits.test_images
    assert not torch.equal(
        broken(brief, "residual codes").system.tokenizer.encode(images, SHORT),
        brief.system.tokenizer.encode(images, SHORT),
    )
    tokens = brief.system.tokenizer.encode(images[:4], LONG)
    cropped = broken(brief, "cropped positions").system
    assert not torch.allclose(
        cropped.teacher(tokens, None, LONG).logits, brief.system.teacher(tokens, None, LONG).logits
    )
    swapped = broken(brief, "swapped guidance").system
    s = swapped.start(swapped.prepare({"class_labels": [1]}), flexvar.FlexVARSampling(), flexvar.Noise.of(0, 1), SHORT)
    assert s.weight(3).tolist() == [[-2.5, 3.5]]


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(flexvar.parameters()) == 3 and all(claim.ok for claim in flexvar.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("flexvar", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 15 + len(flexvar.MUTANTS)
