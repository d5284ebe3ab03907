"""The check of Infinity: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import infinity
from arvis.checks.infinity import Length, Trained

broken = partial(checks.broken, infinity)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 24 pictures; then a transformer with strong random weights, so that much breaks."""
    steps = []
    trained = infinity.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2), infinity.world(24))
    assert len(steps) == 4
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


def given(trained: Trained):
    """(features, conditions) of the first pictures."""
    rows = torch.arange(8)
    cond = trained.system.prepare(trained.world.request(rows))
    return trained.system.tokenizer.features(trained.world.images[rows]), cond


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    cond = given(brief)[1]
    assert infinity.cached(brief.system, cond).ok
    for mutant in ("ignored mask", "forgotten cache", "forgotten scale"):
        assert not infinity.cached(broken(brief, mutant).system, cond).ok, mutant


@torch.no_grad()
def test_scales_see_coarser_ones_only_and_others_when_broken(brief):
    f, cond = given(brief)
    assert all(claim.ok for claim in infinity.masked(brief.system, f, cond))
    coarser, _ = infinity.masked(broken(brief, "ignored mask").system, f, cond)
    assert not coarser.ok
    _, finer = infinity.masked(broken(brief, "zeroed head").system, f, cond)
    assert not finer.ok


@torch.no_grad()
def test_codes_code_themselves_and_do_not_when_broken(brief):
    f, _ = given(brief)
    own, _ = infinity.quantised(brief.system, f)
    assert own.ok
    own, left = infinity.quantised(broken(brief, "inverted codes").system, f)
    assert not own.ok and not left.ok
    _, left = infinity.quantised(broken(brief, "no residual").system, f)
    assert not left.ok


@torch.no_grad()
def test_labels_make_good_for_flips_and_do_not_when_kept(brief):
    f, images = given(brief)[0], brief.world.images[:8]
    f = 4 * f / f.norm(dim=1, keepdim=True)  # as far out as after a training
    assert infinity.corrected(brief.system, f, images).value != 0
    assert infinity.corrected(broken(brief, "kept labels").system, f, images).value == 0


@torch.no_grad()
def test_the_caption_matters_and_does_not_when_broken(brief):
    f, cond = given(brief)
    assert abs(infinity.captioned(brief.system, f, cond).value) > 1e-3
    for mutant in ("zeroed head", "ignored text"):
        assert abs(infinity.captioned(broken(brief, mutant).system, f, cond).value) < 1e-9, mutant
    own, other = (
        infinity.captioned(s, f, cond).value for s in (brief.system, broken(brief, "reversed outcomes").system)
    )
    assert own != other


def test_captions_are_read_by_a_frozen_encoder():
    one = infinity.world(24)
    assert one.features.shape == (24, infinity.WORDS.words, infinity.CHANNELS) and one.visible[:, 0].all()
    assert torch.equal(one.features == 0, (~one.visible)[..., None].expand_as(one.features))
    assert torch.equal(infinity.world(20).features, one.features[:20])
    assert not torch.allclose(one.features[0], one.features[1])


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(infinity.parameters()) == 3 and all(claim.ok for claim in infinity.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("infinity", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 10 + len(infinity.MUTANTS)
