"""The check of STAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import star
from arvis.checks.digits import digits
from arvis.checks.star import Length, Trained

broken = partial(checks.broken, star)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then transformers with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = star.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2, patterns=2), data)
    assert len(steps) == 6
    torch.manual_seed(0)
    for system in (trained.system, trained.alike):
        for p in system.transformer.parameters():
            torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    assert star.cached(brief.system).ok
    assert not star.cached(broken(brief, "forgotten cache").system).ok


def test_equal_places_are_alike_and_are_not_when_cells_are_counted(brief):
    assert star.placed_alike(brief.system).ok
    assert not star.placed_alike(broken(brief, "counted cells").system).ok


@torch.no_grad()
def test_tokens_are_placed_once_and_are_not_when_drawn_again(brief):
    assert star.placed_once(brief.system).ok
    assert not star.placed_once(broken(brief, "tokens drawn again").system).ok


@torch.no_grad()
def test_the_words_matter_and_do_not_when_broken(brief):
    assert abs(star.worded(brief.system, brief.digits).value) > 1e-3
    for mutant in ("zeroed head", "ignored words"):
        assert abs(star.worded(broken(brief, mutant).system, brief.digits).value) < 1e-6, mutant


@torch.no_grad()
def test_what_is_placed_matters_to_the_sampler_and_does_not_when_broken(brief):
    t = brief.alike.transformer
    h, placed, pooled = torch.randn(2, 16, 64), torch.randn(2, 16, 16), torch.randn(2, 64)
    assert not torch.allclose(t.stable(h, placed, pooled, 3, 4), t.stable(h, 0 * placed, pooled, 3, 4), atol=1e-3)
    t = broken(brief, "sampler that sees nothing").alike.transformer
    assert torch.equal(t.stable(h, placed, pooled, 3, 4), t.stable(h, 0 * placed, pooled, 3, 4))
    one = broken(brief, "one step").alike
    s = one.start(one.prepare({"prompt": [""]}), star.STARSampling(inside="stable"), star.Noise.of(0))
    for _ in range(3):
        d = one.predict(s)
        one.commit(s, d, d.sample(s.noise))
    assert one.predict(s).plan.steps == 1


def test_patterns_have_one_code_in_the_last_scale_of_which_nothing_tells(brief):
    tokens = star.patterns(brief.alike, 500, 0)[..., 0]
    assert (tokens[:, 14:] == tokens[:, 14:15]).all() and tokens[:, 14].bincount(minlength=16).min() > 10
    assert 0.02 < (tokens[:, 13] == tokens[:, 14]).float().mean() < 0.12
    assert star.alike(brief.alike, "independent", 50) < 0.2


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(star.parameters()) == 5 and all(claim.ok for claim in star.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("star", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 13 + len(star.MUTANTS)
