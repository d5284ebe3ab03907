"""The check of MAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import mar
from arvis.checks.digits import digits
from arvis.checks.mar import Length, Trained
from arvis.noise import Noise
from arvis.systems.mar import MARSampling

broken = partial(checks.broken, mar)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then networks with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = mar.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2, head=2), data)
    assert len(steps) == 6
    torch.manual_seed(0)
    for p in (*trained.system.transformer.parameters(), *trained.head.parameters()):
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_sets_follow_the_schedule_and_do_not_when_broken(brief):
    assert mar.ordered(brief.system).ok
    assert not mar.ordered(broken(brief, "a set drawn twice").system).ok


@torch.no_grad()
def test_hidden_tokens_are_not_seen_and_known_ones_are(brief):
    assert all(claim.ok for claim in mar.visible(brief.system))
    hidden, known = mar.visible(broken(brief, "hidden tokens shown").system)
    assert not hidden.ok and known.ok
    hidden, known = mar.visible(broken(brief, "known tokens forgotten").system)
    assert hidden.ok and not known.ok


@torch.no_grad()
def test_the_loop_is_the_one_written_out(brief):
    exact, beside, matters = mar.unguided(brief.system)
    assert exact.ok and beside.ok and matters.value > 1e-3
    assert not mar.unguided(broken(brief, "a set drawn twice").system)[0].ok
    assert mar.unguided(broken(brief, "ignored condition").system)[2].value < 1e-4


def test_two_samples_of_one_distribution_and_of_others():
    a, b = (mar.mixture(torch.zeros(2000, dtype=torch.int64), Noise.of(seed, 2000))[:, 0] for seed in (0, 1))
    assert mar.kolmogorov_smirnov(a, b) > 0.01
    assert mar.kolmogorov_smirnov(a, b + 0.1) < 0.01
    assert mar.kolmogorov_smirnov(a, torch.full_like(b, float(b.mean()))) < 1e-6


@torch.no_grad()
def test_the_mean_of_a_mixture_is_no_sample_of_it(brief):
    assert mar.calibrated(broken(brief, "mean instead of samples"), 300)[0].value < 1e-6
    assert mar.calibrated(broken(brief, "zeroed head"), 300)[0].value < 1e-6


def test_swapped_guidance_weighs_the_null_row_up(brief):
    swapped = broken(brief, "swapped guidance").system
    s = swapped.start(swapped.prepare({"class_labels": [1]}), MARSampling(cfg_scale=2.0, num_iter=1), Noise.of(0, 1))
    torch.testing.assert_close(s.weight(0), torch.tensor([[-63 / 64, 127 / 64]]).double())


@torch.no_grad()
def test_halved_latents_have_half_the_deviation(brief):
    tokens = [x.system.tokenizer.encode(brief.digits.test_images) for x in (brief, broken(brief, "halved latents"))]
    torch.testing.assert_close(tokens[1], tokens[0] / 2)


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(mar.parameters()) == 4 and all(claim.ok for claim in mar.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("mar", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 15 + len(mar.MUTANTS)
