"""VARiant: any system over scales on fewer layers in late scales, exactly, and with as few keys as it needs."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arvis.laws import REQUEST, Case, examine
from arvis.loading import picture_size
from arvis.nn.mamba import Mamba2Config
from arvis.nn.text import TextConfig
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.rows import Rows
from arvis.state import join_states
from arvis.systems import flexvar, infinity, m_var, var, variant
from arvis.systems.variant import ProgressConfig, Variant, equidistant
from arvis.tokenizers.bits import BitPyramidConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import Pin, at

DEPTH = 5


def patch(side: int, channels: int) -> PatchConfig:
    return PatchConfig(
        grid=(side, side), z_channels=channels, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4
    )


def scales(depth: int = DEPTH, **sizes) -> var.VARConfig:
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=7, z_channels=4, patch=patch(4, 4))
    return var.VARConfig(tokenizer=tokenizer, depth=depth, width=16, heads=2, num_classes=3, **sizes)


def bits() -> infinity.InfinityConfig:
    """Levels are told before every other block, so rows get them in layers that they skip, too."""
    return infinity.InfinityConfig(
        tokenizer=BitPyramidConfig(bits=2, scales=((1, 1), (1, 2), (2, 2), (3, 3)), patch=patch(3, 2)),
        depth=6,
        width=16,
        heads=2,
        chunks=3,
        level_each_chunk=True,
        text=TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2),
        pool_heads=2,
    )


BASES = {
    "var": lambda: var.build(scales()),
    "var with one modulation": lambda: var.build(scales(shared_aln=True)),
    "infinity": lambda: infinity.build(bits()),
    "flexvar": lambda: flexvar.build(replace(flexvar.tiny_config(), depth=DEPTH)),
    "m-var": lambda: m_var.build(m_var.MVarConfig(scale=scales(), mamba=Mamba2Config(d_state=4, headdim=8))),
}
"""Systems of four kinds, none of which knows of the method."""


def lively(name: str, seed: int = 0):
    """A base with random weights of a size that shows, float64."""
    torch.manual_seed(seed)
    base = BASES[name]().double().eval()
    for p in base.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    return base


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return lively(request.param)


def total(base) -> int:
    return len(base.transformer.trunk)


def tokens_of(system, items: int = 2) -> Tensor:
    sizes = torch.tensor(system.space.sizes)
    return (Noise.of(3, items).uniform("true", 0, (system.tokenizer.layout().n, len(sizes))) * sizes).long()


def condition(system):
    return system.prepare({name: x[:2] for name, x in REQUEST.items()})


def followed(system, sampling, tokens: Tensor, s=None) -> tuple[list[Tensor], object]:
    """Log-probabilities step by step along given tokens, and the state at the end."""
    s = system.start(condition(system), sampling, Noise.of(0, len(tokens))) if s is None else s
    out = []
    while not bool(s.done.all()):
        d = system.predict(s)
        out.append(d.log_prob(at(tokens, d.where)))
        system.commit(s, d, at(tokens, d.where))
    return out, s


# -- which layers ---------------------------------------------------------------------------------------------------


def test_layers_are_the_published_ones():
    for depth, wanted in {
        16: (0, *range(1, 30, 2)),
        8: (0, 4, 8, 12, 16, 20, 24, 29),
        4: (0, 9, 19, 29),
        2: (0, 29),
    }.items():
        assert equidistant(30, (30,) * 6 + (depth,) * 4) == (tuple(range(30)),) * 6 + (wanted,) * 4


def test_every_depth_from_two_to_all_has_its_layers():
    for depth in range(2, 31):
        layers = equidistant(30, (depth,))[0]
        assert len(layers) == len(set(layers)) == depth and layers[0] == 0 and layers[-1] == 29
        assert list(layers) == sorted(layers)
        steps = {b - a for a, b in itertools.pairwise(layers)}
        assert max(steps) - min(steps) <= 1


def test_a_scale_passes_layers_of_the_scale_before():
    layers = equidistant(30, (30, 16, 16, 8, 2))
    assert all(set(fine) <= set(coarse) for coarse, fine in itertools.pairwise(layers))
    assert [len(kept) for kept in layers] == [30, 16, 16, 8, 2]


@pytest.mark.parametrize("depths", [(30, 1), (30, 31), (8, 16)])
def test_depths_that_cannot_be_are_refused(depths):
    with pytest.raises(ValueError, match=f"scale 1 may pass 2 to {depths[0]} layers, .* got {depths[1]}"):
        equidistant(30, depths)


# -- exactness, over every base -------------------------------------------------------------------------------------


@torch.no_grad()
def test_all_layers_or_no_late_scale_is_the_base_bit_for_bit(base):
    tokens, system = tokens_of(base), Variant(base, 2, 2)
    wanted, _ = followed(base, base.Sampling(), tokens)
    for given in ({"depth": 0}, {"depth": total(base), "full_scales": 1}, {"depth": 2, "full_scales": 4}):
        found, _ = followed(system, system.Sampling(**given), tokens)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), given
        one_pass = system.at(system.Sampling(**given)).teacher(tokens, condition(base))
        assert torch.equal(one_pass.logits, base.teacher(tokens, condition(base)).logits), given
    (fewer, _), (wanted, _) = (followed(x, x.Sampling.plain(), tokens) for x in (system, base))
    assert torch.equal(fewer[1], wanted[1]) and (fewer[2] - wanted[2]).abs().max() > 1e-2


@torch.no_grad()
def test_a_sub_network_walks_as_a_system_of_its_own(base):
    tokens, system = tokens_of(base), Variant(base, 2, 2)
    found, _ = followed(system.at(), base.Sampling(), tokens)
    wanted, _ = followed(system, system.Sampling(), tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_sampling_over_the_cache_is_the_one_pass_at_every_depth(base):
    tokens, system, cond = tokens_of(base), Variant(base, 2, 2), condition(base)
    for full in range(5):
        for depth in range(2, total(base)):
            sampling = system.Sampling.plain()
            sampling = replace(sampling, full_scales=full, depth=depth)
            found, _ = followed(system, sampling, tokens)
            wanted = system.at(sampling).teacher(tokens, cond).log_prob(tokens)
            torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_depth_for_each_scale(base):
    tokens, system, cond = tokens_of(base), Variant(base, 2, 2), condition(base)
    seen = []
    for depths in ((total(base), 4, 3, 2), (4, 2), (total(base), total(base), 3)):
        sampling = replace(system.Sampling.plain(), depths=depths)
        found, _ = followed(system, sampling, tokens)
        wanted = system.at(sampling).teacher(tokens, cond).log_prob(tokens)
        torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-10, rtol=1e-10)
        seen.append(wanted)
        assert [len(kept) for kept in system.layers(sampling, 4)] == [*depths, *depths[-1:] * 4][:4]
    assert (seen[0] - seen[1]).abs().max() > 1e-3 and (seen[0] - seen[2]).abs().max() > 1e-3


@torch.no_grad()
def test_late_scales_never_touch_the_layers_that_they_skip(base):
    """Early scales run with clean weights; then the weights of the skipped blocks are no numbers any more."""
    system, tokens = Variant(base, 2, 2), tokens_of(base)
    wanted, _ = followed(system, system.Sampling(), tokens)
    s = system.start(condition(system), system.Sampling(), Noise.of(0, 2))
    for k in range(2):
        d = system.predict(s)
        system.commit(s, d, tokens[:, s.layout.span(k)])
    skipped = [p for block in base.transformer.trunk.blocks[1:-1] for p in block.parameters()]
    kept = [p.clone() for p in skipped]
    for p in skipped:
        p.fill_(torch.nan)
    found, _ = followed(system, None, tokens, s)
    for p, value in zip(skipped, kept, strict=True):
        p.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[2:], strict=True))


@torch.no_grad()
def test_given_tokens_are_fed_in_one_pass_across_the_border(base):
    tokens, system = tokens_of(base), Variant(base, 2, 3)
    for free in (False, True):
        sampling = replace(system.Sampling(), free=free)
        wanted, _ = followed(system, sampling, tokens)
        for k in range(1, base.tokenizer.layout().K):
            known = (torch.arange(tokens.shape[1]) < base.tokenizer.layout().offsets[k]).expand(len(tokens), -1)
            s = system.start(condition(system), sampling, Noise.of(0, 2), given=Pin(known, tokens))
            assert s.at() == k
            found, _ = followed(system, sampling, tokens, s)
            for a, b in zip(found, wanted[k:], strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_the_cache_holds_what_is_needed_and_no_more(base):
    """Early rows of every layer, late rows of the layers that pass them; without the last scale, which nobody reads."""
    system, tokens, layout = Variant(base, 2, 3), tokens_of(base), base.tokenizer.layout()
    width, streams, early, rows = 16, 2, layout.offsets[2], layout.offsets[-2]
    held = {}
    for free in (False, True):
        _, s = followed(system, replace(system.Sampling(), free=free), tokens)
        cache = s.cache["trunk"]
        late = set(system.layers(system.Sampling(), 4)[-1])
        slots = {i: x.shape[3] for i, x in cache.k.items()}
        recurrent = {int(name.partition(".")[0]) for name in cache.extra}
        if slots:
            assert slots == {i: rows if i in late else early for i in range(total(base)) if i in late or not free}
        assert (recurrent or set(slots)) == (late if free else set(range(total(base))))
        held[free] = sum(x[0].numel() for store in (cache.k, cache.v) for x in store.values())
    assert held[False] == (2 * width * streams * (early * (total(base) - 3) + rows * 3) if slots else 0)
    assert held[True] == (2 * width * streams * rows * 3 if slots else 0)


@torch.no_grad()
def test_keys_that_were_given_up_are_missed_only_on_the_way_back():
    system, tokens = Variant(lively("var"), 2, 2), tokens_of(lively("var"))
    s = system.start(None, replace(system.Sampling.plain(), free=True), Noise.of(0, 2))
    for k in range(3):
        d = system.predict(s)
        system.commit(s, d, tokens[:, s.layout.span(k)])
    s.k -= 2
    with pytest.raises(ValueError, match="layer 1 runs for the first time, but 1 rows were cached without it"):
        system.predict(s)


@pytest.mark.parametrize("name", ["infinity", "m-var"])
def test_the_laws_hold_over_other_bases(name):
    def make(seed: int) -> Variant:
        return Variant(lively(name, seed), 2, 3).eval()

    case = Case(name=f"variant of {name}", make=make, request=REQUEST)
    for law in ("again", "row", "gather", "prefill", "round-trip"):  # the others are not about layers, or tested above
        assert examine(case, law)


@torch.no_grad()
def test_thirty_layers_at_each_depth():
    """Every sub-network of the published depth, from the same weights."""
    torch.manual_seed(0)
    base = var.build(replace(scales(30), tokenizer=PyramidVQConfig(patch_nums=(1, 2), z_channels=4, patch=patch(2, 4))))
    for p in base.double().eval().transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.2)
    system, tokens, seen = Variant(base, 1, 2), tokens_of(base), []
    for depth in range(2, 31):
        sampling = replace(system.Sampling.plain(), depth=depth)
        found, _ = followed(system, sampling, tokens)
        wanted = system.at(sampling).teacher(tokens, condition(base)).log_prob(tokens)
        torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-10, rtol=1e-10)
        seen.append(found[1])
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(seen))


# -- one set of weights ---------------------------------------------------------------------------------------------


def test_files_of_the_base_are_files_of_the_supernet(base):
    system = Variant(base, 2, 2)
    assert list(system.state_dict()) == list(base.state_dict())
    assert all(a is b for a, b in zip(system.parameters(), base.parameters(), strict=True))
    assert system.parts() == base.parts() and system.conditions == base.conditions
    copied = pickle.loads(pickle.dumps(system))
    assert all(a is b for a, b in zip(copied.parameters(), copied.base.parameters(), strict=True))


def test_states_of_unequal_depths_do_not_share_a_batch(base):
    system = Variant(base, 2, 2)
    states = [system.start(None, replace(system.Sampling(), depth=d), Noise.of(0, 1)) for d in (2, 3, 3)]
    assert len(join_states(states[1:])) == 2
    with pytest.raises(ValueError, match="different kinds"):
        join_states(states)


@torch.no_grad()
def test_scales_beyond_those_that_are_listed_pass_what_the_last_one_passes():
    base = lively("var")
    layout, x = base.tokenizer.layout(), torch.randn(1, 30, 16, dtype=torch.float64)
    call = Call(vector=torch.randn(1, 16, dtype=torch.float64), rows=Rows.of(layout.level_N))
    full, few = tuple(range(DEPTH)), (0, 2, 4)
    wanted = variant.Shortened(base.transformer.trunk, (full, few, few, few))(x, call)
    assert torch.equal(variant.Shortened(base.transformer.trunk, (full, few))(x, call), wanted)


def test_a_call_without_rows_is_refused():
    trunk = lively("var").transformer.trunk
    with pytest.raises(ValueError, match="the call needs rows"):
        variant.Shortened(trunk, ((0, 1),))(torch.zeros(1, 1, 16), Call())


# -- training -------------------------------------------------------------------------------------------------------


def test_the_whole_network_is_trained_less_and_less():
    progress = ProgressConfig(whole=0.2, joint=0.5, fading=0.25)
    assert [progress.share(x) for x in (0, 0.25, 0.5)] == [0.2] * 3
    assert progress.share(0.625) == pytest.approx(0.1)
    assert [progress.share(x) for x in (0.75, 0.9, 1)] == [0] * 3
    assert [ProgressConfig(fading=0).share(x) for x in (0.4, 0.6)] == [0.2, 0]


def test_turns_follow_the_schedule_and_draw_every_depth():
    system = Variant(lively("var"), 2, 2, ProgressConfig(whole=0.5, depths=(2, 3)))
    turns = [system.turn(step, 800) for step in range(800)]
    assert turns[:9] == [system.turn(step, 800) for step in range(9)]
    first, last = turns[:400], turns[600:]
    assert 0.42 < first.count(0) / 400 < 0.58 and last.count(0) == 0
    assert 70 < last.count(2) < 130 and last.count(2) + last.count(3) == 200


def test_an_update_is_the_base_s_own_of_the_network_whose_turn_it_is(base):
    system, noise = Variant(base, 2, 2, ProgressConfig(whole=0.5, depths=(3,))), Noise.of(0, 2)
    image = torch.rand(2, 3, *picture_size(base), dtype=torch.float64)
    batch = {"tokens": tokens_of(base), "image": image, **{name: x[:2] for name, x in REQUEST.items()}}
    turns = {system.turn(step, 100): step for step in range(50)}
    assert set(turns) == {0, 3}
    for depth, step in turns.items():
        found = system.loss({**batch, "step": step, "steps": 100}, noise)["loss"]
        wanted = system.at(replace(system.Sampling(), depth=depth)).loss(batch, noise)["loss"]
        assert torch.equal(found, wanted)
    assert torch.equal(system.loss(batch, noise)["loss"], system.at().loss(batch, noise)["loss"])
    several = [Noise.of(i, 2) for i in range(4)]  # one draws lists of scales, which may be short
    assert any(system.loss(batch, n)["loss"] != base.loss(batch, n)["loss"] for n in several)


def test_skipped_layers_learn_from_early_scales_alone():
    base = lively("var")
    system = Variant(base, 2, 2)
    batch, layout = {"tokens": tokens_of(base), "class_labels": [0, 1]}, base.tokenizer.layout()
    nats = -system.at().teacher(batch["tokens"], system.prepare(batch)).log_prob(batch["tokens"])
    middle = base.transformer.trunk.blocks[2].get_parameter("ffn.up.weight")
    (late,) = torch.autograd.grad(nats[:, layout.offsets[2] :].sum(), middle, retain_graph=True)
    (early,) = torch.autograd.grad(nats[:, : layout.offsets[2]].sum(), middle)
    assert early.abs().max() > 1e-3
    assert late.abs().max() > 1e-6, "late rows read the keys that early rows have in the last layer"
    alone = system.at(replace(system.Sampling(), full_scales=0)).loss(batch, Noise.of(0, 2))["loss"]
    (none,) = torch.autograd.grad(alone, middle, allow_unused=True)
    assert none is None
