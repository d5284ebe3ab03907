"""The check of M-VAR: each mutant moves the claim that is there for it, also before much is learned."""

from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import m_var
from arvis.checks.digits import digits
from arvis.checks.m_var import Length, Trained
from arvis.checks.var import cached, conditioned

broken = partial(checks.broken, m_var)


@pytest.fixture(scope="module")
def brief() -> Trained:
    """Two updates of each stage on 96 digits; then strong random weights, so that much can break."""
    steps, data = [], digits().first(96, 48)
    trained = m_var.train(lambda: steps.append(1), Length(tokenizer=2, transformer=2, batch=4), data)
    assert len(steps) == 6
    torch.manual_seed(0)
    for system in (trained.system, trained.without):
        for p in system.transformer.parameters():
            torch.nn.init.normal_(p, 0.0, 0.1)
    return trained


def test_the_twin_has_the_same_tokenizer_and_no_scan(brief):
    assert brief.without.tokenizer is brief.system.tokenizer
    x = torch.randn(1, 3, brief.system.transformer.width)
    assert not brief.without.transformer.trunk.blocks[0].mamba(x)[0].any()
    assert brief.system.transformer.trunk.blocks[0].mamba(x)[0].any()


@torch.no_grad()
def test_the_last_input_is_hidden_inside_and_back_again(brief):
    tokenizer = brief.system.tokenizer
    layout = tokenizer.layout()
    tokens = torch.zeros(1, layout.n, 1, dtype=torch.int64)
    last = slice(layout.n - layout.sizes[0] - layout.sizes[-1], None)
    with m_var._hidden(brief.system):
        assert not tokenizer.inputs(tokens, layout)[:, last].any()
        assert not tokenizer.next_input(torch.ones(1, 16, 4, 4), layout.K - 1, layout).any()
        assert tokenizer.next_input(torch.ones(1, 16, 4, 4), 1, layout).any()
    assert tokenizer.inputs(tokens, layout)[:, last].any()


@torch.no_grad()
def test_scan_and_cache_agree_and_disagree_when_broken(brief):
    assert cached(brief.system).ok and all(claim.ok for claim in m_var.scanned(brief.system))
    for mutant in ("forgotten state", "forgotten convolution", "scan from fine to coarse", "attention across scales"):
        assert not cached(broken(brief, mutant).system).ok, mutant
    for mutant in ("forgotten convolution", "scan from fine to coarse"):
        assert not any(claim.ok for claim in m_var.scanned(broken(brief, mutant).system)), mutant


@torch.no_grad()
def test_what_inputs_move_and_what_they_move_when_broken(brief):
    assert all(claim.ok for claim in m_var.reached(brief))
    for mutant, place in (("no scan", 0), ("scan from fine to coarse", 0), ("attention across scales", 1)):
        assert not m_var.reached(broken(brief, mutant))[place].ok, mutant


@torch.no_grad()
def test_the_class_matters_and_does_not_when_broken(brief):
    assert abs(conditioned(brief.system, brief.digits).value) > 1e-3
    for mutant in ("zeroed head", "ignored condition"):
        assert abs(conditioned(broken(brief, mutant).system, brief.digits).value) < 1e-6, mutant


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    assert len(m_var.parameters()) == 6 and all(claim.ok for claim in m_var.parameters())


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("m-var", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 13 + len(m_var.MUTANTS)
