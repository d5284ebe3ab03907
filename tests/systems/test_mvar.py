"""MVAR: receptive fields, segments alone and together, its rotation, guidance that is off, no cache."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from arvis.nn import neighbourhood
from arvis.nn.attention import attend
from arvis.noise import Noise
from arvis.rows import Rows
from arvis.systems import mvar
from arvis.systems.mvar import MVAR, MVARConfig, MVARSampling
from arvis.systems.var import VARConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.walk import finish, generate

SIDES = (1, 2, 3, 4, 6, 8)
PATCH = PatchConfig(grid=(8, 8), z_channels=4, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)


def lively() -> MVAR:
    """A small one in float64 whose weights are all random."""
    torch.manual_seed(0)
    tokenizer = PyramidVQConfig(patch_nums=SIDES, vocab_size=11, z_channels=4, patch=PATCH)
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0, label_drop=0.0)
    system = mvar.build(MVARConfig(scale=scale, kernel_size=3, refine_step=4, ratio_k=3))
    for parameter in (*system.transformer.parameters(), *system.tokenizer.quantize.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return system.double().eval()


SYSTEM = lively()
LAYOUT = SYSTEM.tokenizer.layout()
REQUEST = {"class_labels": [0, 1, 2]}
COND = SYSTEM.prepare(REQUEST)


def tokens(seed: int = 0) -> Tensor:
    return (Noise.of(seed, 3).uniform("tokens", 0, (LAYOUT.n, 1)) * 11).long()


@torch.no_grad()
def test_a_cell_reaches_as_far_as_its_layers_windows_and_no_further():
    """Two layers of 3x3: logits of a cell move with inputs of a 5x5 block around it, shifted windows included."""
    scales, c = SYSTEM.transformer, SYSTEM.transformer.conditioner(COND, torch.zeros(3, dtype=torch.bool))
    for k, side in ((4, 6), (5, 8)):
        x = Noise.of(3, 3).normal("x", 0, (side * side, 4))
        base = scales(c, x, k, k + 1, SYSTEM.see)
        cells = torch.arange(side)
        start = neighbourhood.window_start(cells, 3, side)
        sees = (start[:, None] <= cells) & (cells < start[:, None] + 3)
        twice = (sees.double() @ sees.double()) > 0
        reach = (twice[:, None, :, None] & twice[None, :, None, :]).view(side * side, side * side)
        assert int(reach.sum(1).max()) == 25 and not bool(reach.all())
        for at in range(side * side):
            moved = x.clone()
            moved[:, at] += 1
            changed = (scales(c, moved, k, k + 1, SYSTEM.see) - base).abs().amax((0, 2)) > 0
            assert torch.equal(changed, reach[:, at])


@torch.no_grad()
def test_segments_together_scales_alone_and_one_pass_are_the_same():
    x, scales = tokens(), SYSTEM.transformer
    c = scales.conditioner(COND, torch.zeros(3, dtype=torch.bool))

    def logits(first: int, last: int) -> Tensor:
        features = SYSTEM.tokenizer.inputs(x, LAYOUT, max(first, 1), last) if last > 1 else None
        return scales.head(scales(c, features, first, last, SYSTEM.see), c.vector)

    one_pass = SYSTEM.teacher(x, COND).logits[:, :, 0]
    for parts in (SYSTEM.segments, [(k, k + 1) for k in range(LAYOUT.K)]):
        assert (torch.cat([logits(*part) for part in parts], 1) - one_pass).abs().max() < 1e-12


def test_the_official_rotation():
    whole = mvar.preset(16)
    with torch.device("meta"):
        system = mvar.build(replace(whole, scale=replace(whole.scale, depth=1, width=16, heads=1)))
    turns = [system.turn(step) for step in range(20)]
    assert turns == [*[(0, 8)] * 8, (8, 9), (9, 10)] * 2
    system.ratio = 1
    assert [system.turn(step) for step in range(4)] == [(0, 8), (8, 9), (9, 10), (0, 8)]


@torch.no_grad()
def test_segments_count_as_parts_of_the_whole_loss():
    nats = -SYSTEM.teacher(tokens(), COND).log_prob(tokens())
    whole = SYSTEM.loss({"tokens": tokens(), **REQUEST}, Noise.of(0, 3))
    assert float(whole["loss"]) == pytest.approx(float(nats.mean()))
    parts = [SYSTEM.loss({"tokens": tokens(), **REQUEST, "step": step}, Noise.of(0, 3)) for step in (0, 3, 4)]
    for (first, last), part in zip(SYSTEM.segments, parts, strict=True):
        span = slice(LAYOUT.offsets[first], LAYOUT.offsets[last])
        assert float(part["loss"]) == pytest.approx(float(nats[:, span].sum(1).mean()) / LAYOUT.n)
        assert set(part) == {"loss", *(f"nats_{k}" for k in range(first, last))}
        assert float(part[f"nats_{first}"]) == pytest.approx(float(nats[:, LAYOUT.span(first)].mean()))
    with pytest.raises(ValueError, match="take turns"):
        SYSTEM.loss({"tokens": tokens(), **REQUEST, "levels": 2}, Noise.of(0, 3))


def test_an_update_of_a_large_scale_holds_no_rows_but_its_own():
    seen = []
    hook = SYSTEM.transformer.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for step in range(5):
        SYSTEM.loss({"tokens": tokens(), **REQUEST, "step": step}, Noise.of(0, 3))
    hook.remove()
    assert seen == [30, 30, 30, 36, 64]


@torch.no_grad()
def test_a_guidance_scale_of_one_is_no_guidance():
    drawn = {
        scale: finish(generate(SYSTEM, COND, MVARSampling(cfg_scale=scale), Noise.of(5, 3))).tokens
        for scale in (0.0, 1.0, 0.999)
    }
    assert torch.equal(drawn[1.0], drawn[0.0]) and not torch.equal(drawn[1.0], drawn[0.999])
    assert SYSTEM.start(COND, MVARSampling(cfg_scale=1.0), Noise.of(5, 3)).weights.shape[-1] == 1
    mixed = SYSTEM.start(COND, MVARSampling(cfg_scale=[1.0, 2.0, 0.5]), Noise.of(5, 3))
    assert mixed.weight(LAYOUT.K - 1).tolist() == [[1, 0], [3, -2], [1.5, -0.5]]


@torch.no_grad()
def test_sampling_multiplies_the_pairs_of_the_rule_and_keeps_nothing(monkeypatch):
    pairs = []

    def counting(q, k, v, mask, scale):
        pairs.append(q.shape[1] * q.shape[2] * k.shape[2] // 2)
        return attend(q, k, v, mask, scale)

    one = neighbourhood.neighbours
    monkeypatch.setattr(neighbourhood, "neighbours", lambda *args: one(*args, tile=1))
    with mock.patch.object(neighbourhood, "attend", counting):
        s = finish(generate(SYSTEM, COND, MVARSampling(), Noise.of(0, 3)))
    small = sum(n * n for n in LAYOUT.sizes[:4])
    assert sum(pairs) == 2 * (small + 9 * 36 + 9 * 64)
    assert s.cache == {}
    rows = SYSTEM.transformer.rows(*range(LAYOUT.K))
    seen = SYSTEM.see(Rows(rows.step[0, :, None], rows.tag[0, :, None]), Rows(rows.step, rows.tag))
    assert int(seen.sum()) == small + 9 * 36 + 9 * 64
