"""The check of NFIG: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import nfig
from arvis.checks.digits import Digits
from arvis.checks.nfig import Length, Trained

broken = partial(checks.broken, nfig)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each tokenizer on 40 pieces of noise that is smooth like pictures."""
    noise = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, size=32, mode="bicubic").clamp(-1, 1)
    labels, steps = torch.zeros(48, dtype=torch.int64), []
    data = Digits(images[:40], labels[:40], images[40:], labels[40:])
    trained = nfig.train(lambda: steps.append(1), Length(tokenizer=2), data)
    assert len(steps) == 4
    return trained


@torch.no_grad()
def test_the_quantiser_is_the_recursion_and_is_not_when_broken(brief):
    f = brief.system.tokenizer.features(brief.data.test_images)
    assert all(claim.ok for claim in nfig.cut(brief.system.tokenizer, f))
    assert nfig.recursive(brief.system.tokenizer, f).ok
    for mutant in ("ignored masks", "shifted bands", "reversed bands", "forgotten rest", "no sum"):
        assert not nfig.recursive(broken(brief, mutant).system.tokenizer, f).ok, mutant


@torch.no_grad()
def test_coarse_levels_know_of_no_high_frequencies_and_do_when_masks_are_ignored(brief):
    f = brief.system.tokenizer.features(brief.data.test_images)
    assert nfig.unknown(brief.system.tokenizer, f).ok
    assert not nfig.unknown(broken(brief, "ignored masks").system.tokenizer, f).ok


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    assert nfig.cached(brief.system).ok
    assert not nfig.cached(broken(brief, "forgotten cache").system).ok


def test_both_tokenizers_start_alike(brief):
    assert brief.system.tokenizer.state_dict().keys() == brief.areas.state_dict().keys()


def test_photographs_are_cut_into_pieces_of_which_some_are_held_out():
    pytest.importorskip("skimage", reason="scikit-image is an extra of development")
    data = nfig.photographs()
    assert len(data.images) > 150 and len(data.test_images) > 20 and data.images.shape[1:] == (3, 32, 32)
    assert data.images.min() >= -1 and data.images.max() <= 1 and data.images.std() > 0.3


def test_the_published_sizes_are_vars():
    assert len(nfig.parameters()) == 2 and all(claim.ok for claim in nfig.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("nfig", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 10 + len(nfig.MUTANTS)
