"""The check of the search over paths: with a tiny model, each mutant moves the claim that is there for it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from arvis import checks
from arvis.checks import tts_var
from arvis.checks.tts_var import Trained
from arvis.systems import system as module_of
from arvis.systems.tts_var import TTSVARConfig

broken = partial(checks.broken, tts_var)


@pytest.fixture
def tiny(monkeypatch) -> Trained:
    """A small model of prompts over five scales, with strong random weights."""
    module = module_of("brush")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build", seen.append)
        module.tiny()
    config = seen[0]
    patch = replace(config.scale.tokenizer.patch, grid=(5, 5))
    tokenizer = replace(config.scale.tokenizer, patch_nums=(1, 2, 3, 4, 5), patch=patch)
    torch.manual_seed(0)
    system = module.build(replace(config, scale=replace(config.scale, tokenizer=tokenizer))).eval()
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    few = TTSVARConfig(paths=(6, 6, 2, 2, 2), cluster=(), resample=(2,), strength=200.0)
    monkeypatch.setattr(tts_var, "EARLY", few)
    return Trained(system)


@torch.no_grad()
def test_a_search_without_choices_is_plain_and_is_not_when_the_first_is_taken(tiny):
    assert tts_var.plain(tiny).ok
    assert not tts_var.plain(broken(tiny, "the first taken")).ok


@torch.no_grad()
def test_chosen_paths_are_as_if_alone_and_are_not_with_stale_caches(tiny):
    assert tts_var.alone(tiny).ok
    assert not tts_var.alone(broken(tiny, "stale caches")).ok


@torch.no_grad()
def test_paths_are_drawn_by_weights_and_are_not_when_broken(tiny):
    assert tts_var.drawn(tiny).ok
    for mutant in ("chosen by chance", "the worst chosen"):
        assert not tts_var.drawn(broken(tiny, mutant)).ok, mutant


@torch.no_grad()
def test_groups_keep_a_path_and_do_not_without_clusters(tiny):
    assert tts_var.grouped(tiny).ok
    assert not tts_var.grouped(broken(tiny, "no clusters")).ok


@pytest.mark.slow
def test_the_claim_holds_and_every_mutant_is_noticed():
    claims = checks.run("tts-var", mutants=True)
    assert [str(claim) for claim in claims if not claim.ok] == []
    assert len(claims) == 5 + len(tts_var.MUTANTS)
