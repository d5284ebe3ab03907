"""The check of collaborative decoding: each mutant moves the claim that is there for it, before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import code
from arvis.checks.code import Length, Trained
from arvis.checks.digits import digits

broken = partial(checks.broken, code)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then strong random weights and codes, so that much can break."""
    steps, data = [], digits().first(96, 48)
    length = Length(tokenizer=2, large=2, distilled=2, specialised=2)
    trained = code.train(lambda: steps.append(1), length, data)
    assert len(steps) == 10
    torch.manual_seed(0)
    for system in (*trained.pair.models.values(), trained.large):
        for p in system.transformer.parameters():
            torch.nn.init.normal_(p, 0.0, 0.1)
    torch.nn.init.normal_(trained.pair.tokenizer.quantize.embedding.weight)
    return trained


@torch.no_grad()
def test_the_hand_over_is_a_walk_and_is_not_when_broken(brief):
    assert code.alone(brief.large).ok and code.prefilled(brief.pair).ok
    for mutant in ("ignored mask", "forgotten cache", "forgotten draft", "no hand-over", "swapped models"):
        assert not code.prefilled(broken(brief, mutant).pair).ok, mutant


@torch.no_grad()
def test_both_laws_are_followed_and_are_not_when_broken(brief):
    assert all(claim.ok for claim in code.followed(brief.pair, 1000))
    assert not all(claim.ok for claim in code.followed(broken(brief, "swapped models").pair, 1000))


@torch.no_grad()
def test_the_cache_is_saved_and_is_not_without_a_hand_over(brief):
    assert code.saved(brief).ok
    assert code.saved(broken(brief, "no hand-over")).value < code.saved(brief).value


@torch.no_grad()
def test_the_refiner_matters_and_does_not_when_broken(brief):
    own, zeroed = code.fine(brief), code.fine(broken(brief, "zeroed refiner"))
    assert abs(own.value - zeroed.value) > 1e-3


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(code.parameters()) == 2 and all(claim.ok for claim in code.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("code", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 10 + len(code.MUTANTS)
