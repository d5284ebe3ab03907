"""The check of LlamaGen: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import llamagen
from arvis.checks.digits import digits
from arvis.checks.llamagen import Length, Trained

broken = partial(checks.broken, llamagen)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then a transformer with strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = llamagen.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2), data)
    assert len(steps) == 4
    torch.manual_seed(0)
    for p in trained.system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


@torch.no_grad()
def test_cached_and_one_pass_logits_agree_and_disagree_when_broken(brief):
    assert llamagen.cached(brief.system).ok
    for mutant in ("ignored mask", "forgotten cache"):
        assert not llamagen.cached(broken(brief, mutant).system).ok, mutant


@torch.no_grad()
def test_guidance_is_the_formula_and_is_not_when_broken(brief):
    assert all(claim.ok for claim in llamagen.guided(brief.system, brief.digits))
    first, second, rows = llamagen.guided(broken(brief, "swapped guidance").system, brief.digits)
    assert not first.ok and not second.ok
    rows = llamagen.guided(broken(brief, "always two rows").system, brief.digits)[2]
    assert rows.value == 2 and not rows.ok


@torch.no_grad()
def test_the_condition_is_silent_and_is_not_when_broken(brief):
    assert all(claim.ok for claim in llamagen.silent(brief.system, brief.digits))
    keys, _ = llamagen.silent(broken(brief, "condition not switched off").system, brief.digits)
    assert not keys.ok and keys.value > 1e-3
    _, values = llamagen.silent(broken(brief, "zeroed head").system, brief.digits)
    assert values.value == 0


@torch.no_grad()
def test_without_a_condition_or_a_head_all_classes_are_drawn_alike(brief):
    for mutant in ("zeroed head", "ignored condition"):
        system = broken(brief, mutant).system
        labels = system.prepare({"class_labels": torch.arange(10)})
        logits = system.teacher(torch.zeros(10, 64, 1, dtype=torch.int64), labels).logits
        assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5), mutant


@torch.no_grad()
def test_the_wrong_order_is_the_reverse_one(brief):
    tokens = torch.arange(64).view(1, 64, 1)
    whole, turned = (t.system.tokenizer for t in (brief, broken(brief, "wrong order")))
    assert torch.equal(turned.decode(tokens), whole.decode(tokens.flip(1)))
    assert not torch.equal(turned.decode(tokens), whole.decode(tokens))


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(llamagen.parameters()) == 6 and all(claim.ok for claim in llamagen.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("llamagen", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 15 + len(llamagen.MUTANTS)
