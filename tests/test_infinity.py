"""Infinity: official files of every spelling, packed text, guidance inside, positions, self-correction, the classifier.

Bits, logits and pictures of the official code are compared in `arvis parity infinity`; here is what no recording shows.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from arvis import parity
from arvis.config import from_dict, to_dict
from arvis.laws import Case, examine
from arvis.nn.rotary_scales import scale_table
from arvis.noise import Noise
from arvis.parity.infinity import configured
from arvis.systems import infinity
from arvis.systems.infinity import CaptionConfig, Coded, InfinityConfig, InfinitySampling, build, null_rows
from arvis.tokenizers.bits import BitPyramidConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.ratios import scales_for
from arvis.tokens import Layout, Pin, at
from arvis.training.fit_config import FitConfig
from arvis.walk import finish, generate
from arvis.weights import WeightsError, load_official, to_official

HERE = Path(__file__).parent
LAYOUTS = HERE.parents[1] / "shared/keys/infinity"
SCALES = ((1, 1), (2, 1), (2, 2), (3, 3))


def config(patchify: int = 1, bits: int = 2, **changes) -> InfinityConfig:
    """A small one that reads features of five rows, everything in it strong enough to be seen."""
    patch = PatchConfig(
        patch=4, grid=(3, 3), z_channels=bits, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4
    )
    values = {
        "tokenizer": BitPyramidConfig(bits=bits, scales=SCALES, patchify=patchify, patch=patch),
        "depth": 4,
        "width": 16,
        "heads": 2,
        "caption": CaptionConfig(channels=6, length=5),
        "pool_heads": 2,
        "chunks": 2,
        "gate_init": 1.0,
        "modulation_init": 1.0,
        "head_init": 1.0,
    }
    return InfinityConfig(**{**values, **changes})


def made(**changes):
    torch.manual_seed(0)
    return build(config(**changes)).double().eval()


@pytest.fixture(scope="module")
def system():
    return made()


def request(items: int = 3) -> dict:
    lengths = torch.tensor([2, 5, 3, 1, 4])[:items]
    features = torch.randn(items, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"text_features": features, "text_visible": torch.arange(5) < lengths[:, None]}


def bits(system, layout=None, items: int = 3, seed: int = 2):
    layout = layout or system.tokenizer.layout()
    return torch.randint(2, (items, layout.n, system.space.S), generator=torch.Generator().manual_seed(seed))


def follow(system, s, tokens):
    """Logits [B, N, S, V] along given tokens."""
    out = []
    while not bool(s.done.all()):
        d = system.predict(s)
        out.append(d.logits)
        system.commit(s, d, at(tokens, d.where))
    return torch.cat(out, 1)


# -- the official code ----------------------------------------------------------------------------------------------


def test_the_recording_of_rarer_settings_is_reproduced():
    rows = parity.run("infinity", parity.Fixture(HERE / "parity/infinity-patchify"))
    assert [str(row) for row in rows if not row.ok] == []
    assert sum(row.verdict == "pass" for row in rows) > 30


@pytest.fixture(scope="module")
def recorded():
    fixture = parity.Fixture(HERE / "parity/infinity")
    return configured(fixture.model("tokenizer"), fixture.model("transformer")), fixture


def loaded(recorded, part: str, change=lambda tensors: tensors):
    fresh, table = build(recorded[0]).parts()[part], infinity.keys(recorded[0])[part]
    report = load_official(fresh, table, change(recorded[1].weights(part)))
    return report, to_official(fresh, table)


def test_files_load_whatever_they_were_saved_with(recorded):
    _, transformer = loaded(recorded, "transformer")
    _, tokenizer = loaded(recorded, "tokenizer")

    def other_kernel(tensors):
        return {n: x.transpose(1, 2) if "scale_mul" in n else x for n, x in tensors.items()}

    def one_chunk(tensors):
        return {
            n.replace("block_chunks.0.module.0", "blocks.0").replace("block_chunks.1.module.0", "blocks.1"): x
            for n, x in tensors.items()
        }

    def buffers(tensors):
        return {**tensors, "lvl_1L": torch.zeros(1, 4), "Infinity_visible_kvlen": torch.zeros(3)}

    def plain(tensors):
        return {
            n.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", ".")
            if "sample" not in n
            else n.replace(".conv.conv.", ".conv."): x
            for n, x in tensors.items()
        }

    def discriminator(tensors):
        return {**tensors, "image_disc.0.weight": torch.zeros(2), "quantizer.extra": torch.zeros(1)}

    for part, change, left_out, whole in (
        ("transformer", other_kernel, (), transformer),
        ("transformer", one_chunk, (), transformer),
        ("transformer", buffers, ("lvl_1L", "Infinity_visible_kvlen"), transformer),
        ("tokenizer", plain, (), tokenizer),
        ("tokenizer", discriminator, ("image_disc.0.weight", "quantizer.extra"), tokenizer),
    ):
        assert set(change(recorded[1].weights(part))) != set(whole) or change is other_kernel
        report, back = loaded(recorded, part, change)
        assert report.left_out == left_out and report.kept == ()
        assert all(torch.equal(x, whole[name]) for name, x in back.items()) and set(back) == set(whole)

    with pytest.raises(WeightsError, match="unexpected in the file: special_token"):
        loaded(recorded, "transformer", lambda tensors: {**tensors, "special_token": torch.zeros(4, 256)})
    with pytest.raises(WeightsError, match=r"quantizer\.lfq\.mask"):
        loaded(recorded, "tokenizer", lambda t: {**t, "quantizer.lfq.mask": t["quantizer.lfq.mask"].flip(0)})


def test_the_features_of_no_prompt_are_cropped_or_continued(recorded):
    longer = torch.randn(11, 256)
    _, back = loaded(recorded, "transformer", lambda tensors: {**tensors, "cfg_uncond": longer})
    assert torch.equal(back["cfg_uncond"], longer[:8])
    _, back = loaded(recorded, "transformer", lambda tensors: {**tensors, "cfg_uncond": longer[:3]})
    assert torch.equal(back["cfg_uncond"], torch.cat((longer[:3], null_rows(8, 256)[3:])))
    with torch.device("meta"):
        empty = build(recorded[0]).transformer
    tensors = {**recorded[1].weights("transformer"), "cfg_uncond": longer[:3]}
    load_official(empty, infinity.keys(recorded[0])["transformer"], tensors)
    assert torch.equal(empty.conditioner.null.data, back["cfg_uncond"])
    assert 0.8 < float(null_rows(512, 64).std()) * 8 < 1.2


@pytest.mark.parametrize("name", ["2b", "8b", "8b-512", "125m"])
def test_presets_are_the_official_constructors(name):
    layout = {"2b": "2b_reg", "8b": "8b", "8b-512": "8b_512x512", "125m": "layer12_125m"}[name]
    vae = {"2b": "d32reg", "125m": "d16"}.get(name, "d56_f8_14_patchify")
    files = [LAYOUTS / f"{file}.json" for file in (layout, f"infinity_vae_{vae}")]
    if not files[0].exists():
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    transformer, tokenizer = (json.loads(file.read_text())["constructor"] for file in files)
    theirs, preset = configured(tokenizer, transformer), infinity.PRESETS[f"infinity-{name}"]
    ours = preset.config()
    for field in (
        "depth",
        "width",
        "heads",
        "caption",
        "pool_heads",
        "chunks",
        "told_before",
        "levels",
        "rope",
        "ffn_width",
        "norm_eps",
        "shared_aln",
        "head_aln",
        "attn_l2_norm",
        "labels",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("bits", "patchify", "downsample"):
        assert getattr(ours.tokenizer, field) == getattr(theirs.tokenizer, field), field
    size = {"8b-512": 512, "125m": 256}.get(name, 1024)
    assert ours.tokenizer.scales[-1][0] * ours.tokenizer.downsample == size
    assert bool(preset.files) == (name != "125m") and next(iter(infinity.PRESETS)) == "infinity-2b"
    if preset.files:
        files = json.loads((LAYOUTS / f"{layout}.json").read_text()), json.loads(files[1].read_text())
        assert [preset.files[part].name for part in ("transformer", "tokenizer")] == [f["official_file"] for f in files]


def test_every_published_tokenizer_can_be_reached(recorded, tmp_path, monkeypatch):
    for name, (of, file) in infinity.TOKENIZERS.items():
        assert of.downsample == 16 and file.repo == "FoundationVision/Infinity" and name[:3] in file.name
    assert {of.bits * of.patchify**2 for of, _ in infinity.TOKENIZERS.values()} == {16, 24, 32, 56, 64}
    with pytest.raises(KeyError, match=r"d16, .*, d56-f8, got 'd8'"):
        infinity.published_tokenizer("d8")
    monkeypatch.setitem(infinity.TOKENIZERS, "d8", (recorded[0].tokenizer, infinity.TOKENIZERS["d16"][1]))
    io, weights = recorded[1].io, recorded[1].weights("tokenizer")
    for tree in ({"vae": weights, "epoch": 3}, weights):
        torch.save(tree, tmp_path / "vae.pth")
        tokenizer = infinity.published_tokenizer("d8", tmp_path / "vae.pth")
        torch.testing.assert_close(tokenizer.features(io["image"]), io["raw_features"], atol=1e-4, rtol=1e-4)


# -- text -----------------------------------------------------------------------------------------------------------


def test_padding_is_never_read(system):
    asked, tokens = request(), bits(system)
    logits = system.teacher(tokens, system.prepare(asked)).logits
    features = asked["text_features"].masked_fill(~asked["text_visible"][..., None], 1e3)
    torch.testing.assert_close(
        system.teacher(tokens, system.prepare({**asked, "text_features": features})).logits, logits
    )
    for item, length in enumerate(asked["text_visible"].sum(1).tolist()):
        alone = {"text_features": asked["text_features"][item : item + 1, :length]}  # not padded at all
        d = system.teacher(tokens[item : item + 1], system.prepare(alone))
        torch.testing.assert_close(d.logits, logits[item : item + 1])


def test_no_prompt_has_the_length_of_the_prompt(system):
    cond = system.prepare(request())
    conditioner, null = system.transformer.conditioner, system.transformer.conditioner.null.data
    c = conditioner(cond, torch.tensor([True, False, True]))
    for item, length in ((0, 2), (2, 3)):
        alone = conditioner(conditioner.prepare({"text_features": null[None, :length]}), torch.tensor([False]))
        torch.testing.assert_close(c.vector[item : item + 1], alone.vector)
    assert not torch.allclose(c.vector[0], c.vector[2])
    torch.testing.assert_close(c.vector[1], conditioner(cond, torch.tensor([False] * 3)).vector[1])
    whole = conditioner(None, torch.tensor([True]))
    given = conditioner(conditioner.prepare({"text_features": null[None]}), torch.tensor([False]))
    torch.testing.assert_close(whole.vector, given.vector)


def test_a_negative_prompt_takes_the_place_of_no_prompt(system):
    asked, tokens = request(), bits(system)
    negative = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(9))
    cond = system.prepare({**asked, "negative_features": negative})
    s = system.start(cond, replace(InfinitySampling.plain(), cfg_scale=2.0), Noise.of(0, 3))
    s.weights = torch.tensor([0.0, 1.0]).expand_as(s.weights)
    alone = system.prepare({"text_features": negative.expand(3, -1, -1)})
    torch.testing.assert_close(follow(system, s, tokens), system.teacher(tokens, alone).logits)


def test_features_of_the_wrong_shape_are_refused(system):
    for features in (torch.zeros(2, 6), torch.zeros(2, 6, 6), torch.zeros(2, 3, 7), torch.zeros(2, 0, 6)):
        with pytest.raises(ValueError, match=r"text_features are \[B, 1 to 5, 6\], got shape"):
            system.prepare({"text_features": features})
    with pytest.raises(ValueError, match=r"text_visible .* got shape \(2, 3\)"):
        system.prepare({"text_features": torch.zeros(2, 4, 6), "text_visible": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="a prompt is needed"):
        system.prepare({"class_labels": [1]})


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_on_hidden_rows_is_mixed_where_it_says(system):
    """By hand: both halves to block 2, mixed, copied, both on; without a cache, one scale after another."""
    cond, tokens, layout = system.prepare(request()), bits(system), system.tokenizer.layout()
    scales = (1.0, 3.0, 1.0, 2.0)
    sampling = replace(InfinitySampling.plain(), cfg_list=scales, guide_after=(-2,))
    found = follow(system, system.start(cond, sampling, Noise.of(0, 3)), tokens)
    t, null = system.transformer, torch.zeros(3, dtype=torch.bool)
    x, level_N = system.tokenizer.inputs(tokens, layout), layout.level_N.long()
    weight = torch.tensor(scales, dtype=torch.float64)[level_N][None, :, None]

    def mixed(h):
        c, u = h.chunk(2)
        m = weight * c + (1 - weight) * u
        return torch.cat((c.where(weight == 1, m), u.where(weight == 1, m)))

    c, u = t.conditioner(cond, null), t.conditioner(cond, ~null)
    both = type(c)(
        *(torch.cat(pair) for pair in zip(c[:2], u[:2], strict=True)),
        tuple(torch.cat(pair) for pair in zip(c.context, u.context, strict=True)),
    )
    h = t(both, torch.cat((x, x)), layout, 0, layout.K, system.see, taps={2: mixed})
    logits = t.head(h[:3], c.vector).unflatten(-1, (-1, 2))
    torch.testing.assert_close(found, logits)
    plain = follow(system, system.start(cond, replace(sampling, guide_after=(0,)), Noise.of(0, 3)), tokens)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("places", [(0,), (-1,), (-3, -1), (0, -2)])
def test_given_scales_are_fed_in_one_pass_with_the_guidance_of_each(system, places):
    cond, tokens, layout = system.prepare(request()), bits(system), system.tokenizer.layout()
    sampling = replace(InfinitySampling.plain(), cfg_list=(2.0, 1.0, 4.0, 3.0), guide_after=places)
    walked = follow(system, system.start(cond, sampling, Noise.of(0, 3)), tokens)[:, layout.span(3)]
    mask = torch.arange(layout.n).expand(3, -1) < layout.offsets[3]
    s = system.start(cond, sampling, Noise.of(0, 3), given=Pin(mask, tokens))
    assert s.at() == 3
    torch.testing.assert_close(system.predict(s).logits, walked)


def test_lists_have_one_number_per_scale(system):
    cond, tokens = system.prepare(request()), bits(system)
    plain = follow(system, system.start(cond, InfinitySampling.plain(), Noise.of(0, 3)), tokens)
    taus = (0.5, 1.0, 2.0, 4.0)
    sampling = replace(InfinitySampling.plain(), temperature_list=(*taus, 9.0))
    found = follow(system, system.start(cond, sampling, Noise.of(0, 3)), tokens)
    tau = torch.tensor(taus)[system.tokenizer.layout().level_N.long()][None, :, None, None]
    torch.testing.assert_close(found, plain / tau)
    greedy = system.predict(system.start(cond, replace(sampling, temperature_list=(0.0,) * 4), Noise.of(0, 3)))
    assert torch.equal(greedy.probs.argmax(-1), plain[:, :1].argmax(-1)) and greedy.probs.amax(-1).eq(1).all()
    with pytest.raises(ValueError, match="cfg_list has one number for each of 4 scales, got 2"):
        system.start(cond, replace(sampling, cfg_list=(1.0, 2.0)), Noise.of(0, 3))
    for place in (1, -5):
        with pytest.raises(ValueError, match=rf"guide_after is 0 .* -1\.\.-4 .* got {place}"):
            system.start(cond, replace(sampling, guide_after=(place,)), Noise.of(0, 3))


def test_a_sure_bit_is_forced_by_top_p_and_top_k_one_is_greedy(system):
    cond = system.prepare(request())
    sampling = replace(InfinitySampling.plain(), top_p=0.9)
    free = system.predict(system.start(cond, InfinitySampling.plain(), Noise.of(0, 3))).probs
    forced = system.predict(system.start(cond, sampling, Noise.of(0, 3))).probs
    assert torch.equal(forced.amax(-1) == 1, free.amax(-1) >= 0.9)
    greedy = system.predict(system.start(cond, replace(sampling, top_p=0.0, top_k=1), Noise.of(0, 3))).probs
    assert (greedy.amax(-1) == 1).all() and torch.equal(greedy.argmax(-1), free.argmax(-1))


# -- positions and levels -------------------------------------------------------------------------------------------


def test_cells_lie_on_the_fine_grid_of_their_list():
    fine, dim = scale_table(Layout(((64, 64),)), (64, 64), 8, "own").view(64, 64, 4, 2), 8
    small = scales_for(1.0, "0.06M")
    table = scale_table(small, infinity.grid(small), dim, "grid")[0]
    last = table[small.span(6)].view(16, 16, 4, 2)
    assert torch.equal(last, fine[::4, ::4]), "16 x 16 cells are every fourth of the 64 x 64 of the largest size"
    six = table[small.span(3)].view(6, 6, 4, 2)
    assert torch.equal(six[1, 5], fine[11, 53]), "10.67 -> 11, 53.33 -> 53"
    assert infinity.grid(scales_for(0.8, "0.25M")) == (56, 70) and infinity.grid(Layout(SCALES)) == (3, 3)
    halves = scale_table(Layout(((2, 2),)), (5, 5), dim, "grid")[0].view(2, 2, 4, 2)
    assert torch.equal(halves[1, 1], fine[2, 2]), "2.5 goes to the even cell"
    own = scale_table(Layout(((1, 1), (3, 2))), (64, 64), dim, "own")[0]
    assert torch.equal(own[1:].view(3, 2, 4, 2), fine[:3, :2])
    angle = 5 * 10000.0 ** -(2 / 4)
    torch.testing.assert_close(fine[0, 5, 3], torch.tensor([math.cos(angle), math.sin(angle)]))
    torch.testing.assert_close(fine[5, 0, 1], torch.tensor([math.cos(angle), math.sin(angle)]))
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        scale_table(small, (64, 64), 6, "grid")


def test_every_call_may_have_a_list_of_its_own(system):
    cond, layout = system.prepare(request()), Layout(((1, 1), (1, 3), (2, 4), (3, 5), (4, 6)))
    s = finish(generate(system, cond, InfinitySampling(), Noise.of(0, 3), layout))
    assert s.tokens.shape == (3, layout.n, 2)
    assert system.tokenizer.decode(s.tokens, layout).shape == (3, 3, 16, 24)
    one = system.teacher(s.tokens, cond, layout).logits
    torch.testing.assert_close(
        follow(system, system.start(cond, InfinitySampling.plain(), s.noise, layout), s.tokens), one
    )
    for wrong in (Layout(((2, 2), (3, 3))), Layout(((1, 1),) * 16)):
        with pytest.raises(ValueError, match="begins with one cell and has at most 15"):
            system.predict(system.start(cond, InfinitySampling.plain(), Noise.of(0, 3), wrong))


@pytest.mark.parametrize(("chunks", "each", "before"), [(2, True, (0, 2)), (1, True, (0, 1, 2, 3)), (4, False, (0,))])
def test_levels_are_told_before_chunks(chunks, each, before):
    assert config(chunks=chunks, level_each_chunk=each).told_before == before
    once, often = made(chunks=2), made(chunks=chunks, level_each_chunk=each)
    cond, tokens = once.prepare(request()), bits(once)
    same = torch.allclose(once.teacher(tokens, cond).logits, often.teacher(tokens, cond).logits)
    assert same == (before == (0,))


# -- the laws, where the registered instance does not go ------------------------------------------------------------


@pytest.mark.parametrize("law", ["blind", "cache", "prefill", "seed", "gather", "row", "round-trip"])
@pytest.mark.parametrize(
    "changes",
    [
        {"patchify": 2, "bits": 1, "level_each_chunk": True, "rope": "own"},
        {"labels": "codes", "rope": "resampled", "shared_aln": False, "head_aln": False, "attn_l2_norm": False},
    ],
    ids=["patchified", "codes"],
)
def test_laws(changes, law):
    def make(seed: int):
        torch.manual_seed(seed)
        return build(config(depth=2, **changes)).double().eval()

    assert examine(Case(name="infinity", make=make, request=request()), law)


def test_codes_are_whole_distributions_over_bits():
    system = made(labels="codes", bits=3)
    cond, tokens = system.prepare(request(1)), bits(system, items=1)
    d = system.teacher(tokens, cond)
    assert isinstance(d, Coded) and d.logits.shape == (1, 16, 1, 8)
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    total = torch.stack([d.log_prob(code.expand(1, 16, 3)).exp() for code in every]).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))
    pin = Pin(torch.arange(16)[None] % 2 == 0, tokens)
    x = d.sample(Noise.of(0, 1), pin)
    assert x.shape == tokens.shape and torch.equal(x[:, ::2], tokens[:, ::2]) and set(x.unique().tolist()) <= {0, 1}
    d.logits = torch.full_like(d.logits, -math.inf)
    d.logits[..., 0b110] = 0.0
    assert d.sample(Noise.of(0, 1))[0].tolist() == [[1, 1, 0]] * 16, "the first bit is the most significant"


# -- training -------------------------------------------------------------------------------------------------------


def batch(items: int = 3) -> dict:
    image = torch.rand(items, 3, 12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1
    return {"image": image, **request(items)}


@torch.no_grad()
@pytest.mark.parametrize("reweight", [True, False])
def test_the_loss_is_the_mean_over_bits_weighed_by_scale(reweight):
    system = made(reweight=reweight, label_drop=0.0, flip_strength=0.0)
    given, layout = batch(), system.tokenizer.layout()
    tokens = system.tokenizer.encode(given["image"])
    logits = system.teacher(tokens, system.prepare(given)).logits
    nats = F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").mean(-1)
    side = torch.cat([torch.full((n,), n**0.5, dtype=torch.float64) for n in layout.sizes])
    weight = 1 / side if reweight else torch.ones_like(side)
    found = system.loss(given, Noise.of(0, 3))
    torch.testing.assert_close(found["loss"], (nats * weight / weight.sum()).sum(1).mean())
    torch.testing.assert_close(found["nats_2"], nats[:, layout.span(2)].mean())
    torch.testing.assert_close(found["accuracy"], (logits.argmax(-1) == tokens).double().mean(), check_dtype=False)
    short = system.loss({**given, "levels": 2}, Noise.of(0, 3))
    torch.testing.assert_close(short["nats_1"], found["nats_1"])
    assert "nats_2" not in short


@torch.no_grad()
def test_pictures_features_and_tokens_can_be_learned_from():
    system, given = made(label_drop=0.0), batch()
    stored = {n: x for n, x in given.items() if n != "image"} | system.latents(given["image"])
    noise = Noise.of(3, 3)
    assert torch.equal(system.loss(stored, noise)["loss"], system.loss(given, noise)["loss"])
    assert not torch.equal(system.loss(given, Noise.of(4, 3))["loss"], system.loss(given, noise)["loss"])
    still = made(label_drop=0.0, flip_strength=0.0)
    tokens = {**request(), "tokens": still.tokenizer.encode(given["image"])}
    assert torch.equal(still.loss(tokens, noise)["loss"], still.loss(given, noise)["loss"])
    wide = {**request(1), "image": torch.zeros(1, 3, 12, 20, dtype=torch.float64)}
    assert torch.isfinite(system.loss(wide, Noise.of(0, 1))["loss"])


def test_flips_are_as_many_as_drawn_and_labels_follow_them():
    system, items = made(flip_levels=2, flip_strength=0.3), 400
    f = torch.randn(items, 2, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    labels, x, layout = system._targets({"features": f}, Noise.of(1, items), system.config.flip_strength)
    tokens, clean = system.tokenizer.corrected(f, layout)
    assert torch.equal(labels[:, 0], tokens[:, 0])
    share = 1 - torch.isclose(x[:, :2], clean[:, :2]).all(-1).double().mean()
    assert 0.2 < share < 0.4, "a token of two bits is hit with probability 2 p, p uniform up to 0.3"
    late = Noise.of(1, 7).uniform("strength", 0, (4,))
    short = made(flip_levels=1)._targets({"features": f[:7]}, Noise.of(1, 7), system.config.flip_strength)
    assert late.shape == (7, 4) and not torch.equal(short[0], tokens[:7])
    alone = system._targets(
        {"features": f[5:6]}, Noise.of(1, items).take(torch.tensor([5])), system.config.flip_strength
    )
    assert torch.equal(alone[0], labels[5:6]), "an item's flips are its own"


def test_padding_of_captions_costs_nothing_in_training(monkeypatch):
    """A batch is cut to its longest caption; loss and gradients are those of the whole rows, dropped items included."""
    system, given, widths, results = made(label_drop=0.5), batch(), [], []
    given["text_visible"] = torch.arange(5) < torch.tensor([2, 3, 1])[:, None]
    system.transformer.conditioner.path.register_forward_hook(lambda m, x, c: widths.append(c.context[0].shape[1]))
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr("arvis.systems.infinity.longest", lambda cond: cond)
        system.zero_grad()
        loss = system.loss(given, Noise.of(0, 3))["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in system.transformer.parameters() if p.grad is not None)])
    assert widths == [3, 5]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_dropped_conditions_are_not_read():
    system, given = made(label_drop=1.0), batch()
    other = {**given, "text_features": torch.randn(3, 5, 6)}
    assert torch.equal(system.loss(given, Noise.of(0, 3))["loss"], system.loss(other, Noise.of(0, 3))["loss"])
    kept = made(label_drop=0.0)
    assert not torch.equal(kept.loss(given, Noise.of(0, 3))["loss"], kept.loss(other, Noise.of(0, 3))["loss"])


def test_a_short_training_learns_which_picture_belongs_to_which_text():
    torch.manual_seed(0)
    system = build(config(label_drop=0.1, gate_init=0.1, modulation_init=0.5, head_init=0.02))
    given = {"image": batch(2)["image"].float(), **{n: x[:2] for n, x in request(2).items()}}
    before = {n: p.detach().clone() for n, p in system.transformer.named_parameters()}
    optimizer = torch.optim.Adam(system.transformer.parameters(), lr=5e-3)
    for step in range(80):
        loss = system.loss(given, Noise.of(step, 2))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [n for n, p in system.transformer.named_parameters() if torch.equal(p, before[n])] == []
    tokens, cond = system.tokenizer.encode(given["image"]), system.prepare(given)
    swapped = {n: x.flip(0) for n, x in cond.items()}
    with torch.no_grad():
        own, other = (system.teacher(tokens, c).log_prob(tokens).mean() for c in (cond, swapped))
    assert own > -0.5 and own > other + 0.2


def test_given_bits_stay_and_the_rest_is_painted(system):
    cond, tokens = system.prepare(request()), bits(system)
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(8)) < 0.4
    s = finish(generate(system, cond, InfinitySampling(), Noise.of(0, 3), given=Pin(mask, tokens)))
    assert torch.equal(s.tokens[mask], tokens[mask]) and not torch.equal(s.tokens, tokens)


@pytest.mark.parametrize("name", infinity.PRESETS)
def test_presets_are_plain_data_and_their_settings_are_known(name):
    preset = infinity.PRESETS[name]
    of = preset.config()
    assert from_dict(InfinityConfig, json.loads(json.dumps(to_dict(of)))) == of
    assert from_dict(InfinitySampling, preset.sampling).top_p == 0.97
    for settings in preset.training.values():
        assert from_dict(FitConfig, settings).steps > 0


def test_configurations_that_contradict_themselves_are_refused():
    for changes, told in (
        ({"caption": None}, "exactly one of caption and text"),
        ({"chunks": 3}, "4 blocks do not divide into 3 chunks"),
        ({"labels": "codes", "patchify": 2}, "codes are those of one cell"),
        ({"pool_heads": 3}, "width 16 is not a multiple of heads 3"),
    ):
        with pytest.raises(ValueError, match=told):
            build(config(**changes))
