"""The bit pyramid: the recursion as the paper states it, patchified tokens, self-correction, lists for every shape."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arvis.noise import Noise
from arvis.tokenizers import BitPyramid, BitPyramidConfig, CNNConfig, CNNDecoder, CNNEncoder, PatchConfig
from arvis.tokenizers.ratios import RATIOS, SIZES, scales_for, scales_to, whole
from arvis.tokens import Layout, Space
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss

PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)
CNN = CNNConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=6, using_sa=False, using_mid_sa=False)
SCALES = ((1, 1), (2, 1), (3, 2), (4, 4))


def fresh(**changes) -> BitPyramid:
    torch.manual_seed(0)
    config = BitPyramidConfig(**{"bits": 6, "scales": SCALES, "patch": PATCH, **changes})
    return BitPyramid(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return fresh()


@pytest.fixture(scope="module")
def patchified():
    return fresh(scales=((1, 1), (2, 1), (2, 2)), patchify=2)


def features(tokenizer: BitPyramid, items: int = 3) -> torch.Tensor:
    y, x = (side * tokenizer.config.patchify for side in tokenizer.layout().levels[-1])
    return torch.randn(items, 6, y, x, generator=torch.Generator().manual_seed(1))


def of_the_paper(f, cells):
    """(bits, inputs, partial sums) with five axes, residuals taken off one after another, inputs trilinear."""
    f, d = f[:, :, None], f.shape[1]
    rest, total, bits, seen, sums = f, torch.zeros_like(f), [], [], []
    for k, (h, w) in enumerate(cells):
        r = F.interpolate(rest, size=(1, h, w), mode="area")
        u = r / r.norm(dim=1, keepdim=True)
        code = torch.where(u > 0, 1.0, -1.0) / d**0.5
        bits.append((u > 0)[:, :, 0].long())
        up = F.interpolate(code, size=(1, *cells[-1]), mode="trilinear", align_corners=False)
        rest, total = rest - up, total + up
        sums.append(total[:, :, 0])
        if k + 1 < len(cells):
            down = F.interpolate(total, size=(1, *cells[k + 1]), mode="trilinear", align_corners=False)
            seen.append(down[:, :, 0])
    return bits, seen, sums


# -- the recursion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tokenizer", "patchified"])
def test_bits_inputs_and_sums_are_those_of_the_paper(which, request):
    tokenizer = request.getfixturevalue(which)
    f, layout, p = features(tokenizer), tokenizer.layout(), tokenizer.config.patchify
    bits, seen, sums = of_the_paper(f, [(h * p, w * p) for h, w in layout.levels])
    labels, inputs = tokenizer.corrected(f, layout)
    assert labels.dtype == torch.int64 and labels.shape == (3, layout.n, 6 * p * p)

    def rows(x):
        return F.pixel_unshuffle(x, p).flatten(2).mT

    assert torch.equal(labels, torch.cat([rows(x) for x in bits], 1))
    torch.testing.assert_close(inputs, torch.cat([rows(x) for x in seen], 1), atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(tokenizer.fhats(labels, layout), sums, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(inputs, tokenizer.inputs(labels, layout))
    assert torch.equal(inputs[:, layout.sizes[1] :], tokenizer.inputs(labels, layout, 2))
    assert tokenizer.inputs(labels, layout, 0, 1).shape == (3, 0, 6 * p * p)


def test_a_token_has_the_bits_of_its_cells_channel_by_channel(patchified):
    layout = patchified.layout()
    tokens = torch.randint(2, (1, layout.sizes[1], 24), generator=torch.Generator().manual_seed(2))
    cells = patchified.cell_rows(tokens, 1, layout).view(4, 2, 6)  # level (2, 1) in cells: (4, 2)
    for i in range(2):
        for y in range(2):
            for x in range(2):
                assert cells[2 * i + y, x].tolist() == tokens[0, i].view(6, 2, 2)[:, y, x].tolist()


def test_codes_have_length_one_and_are_their_own_codes(tokenizer):
    layout = Layout((SCALES[-1],))
    f = features(tokenizer)
    tokens = tokenizer.corrected(f, layout)[0]
    code = tokenizer.fhats(tokens, layout)[0]
    torch.testing.assert_close(code.norm(dim=1), torch.ones(3, 4, 4))
    assert torch.equal(tokenizer.corrected(code, layout)[0], tokens)
    assert tokenizer.corrected(torch.zeros_like(f), layout)[0].sum() == 0, "zero counts as minus"


def test_features_must_fit_the_layout(tokenizer):
    with pytest.raises(ValueError, match=r"\(4, 4\) cells do not fit .*: \(5, 5\)"):
        tokenizer.corrected(features(tokenizer), Layout(((1, 1), (5, 5))))


# -- self-correction ------------------------------------------------------------------------------------------------


def test_labels_make_good_for_flips(tokenizer):
    layout, f = tokenizer.layout(), features(tokenizer, 32)
    flips = torch.rand(32, layout.n, 6, generator=torch.Generator().manual_seed(3)) < 0.2
    flips[:, layout.span(3)] = False
    tokens = tokenizer.corrected(f, layout)[0]
    labels, inputs = tokenizer.corrected(f, layout, flips)
    assert torch.equal(labels[:, layout.span(0)], tokens[:, layout.span(0)]) and not torch.equal(labels, tokens)

    def error(x):
        return (tokenizer.fhats(x, layout)[-1] - f).square().mean()

    assert error(labels ^ flips) < error(tokens ^ flips) - 0.02
    assert torch.equal(inputs, tokenizer.inputs(labels ^ flips, layout)), "the model sees the flipped bits"
    late = torch.zeros_like(flips)
    late[:, layout.span(3)] = True
    same = tokenizer.corrected(f, layout, late)
    assert torch.equal(same[0], tokens) and torch.equal(same[1], tokenizer.inputs(tokens, layout))


def test_a_flip_reaches_finer_labels_only(tokenizer):
    layout, f = tokenizer.layout(), features(tokenizer)
    flips = torch.zeros(3, layout.n, 6, dtype=torch.bool)
    flips[1, layout.span(1)] = True
    moved = (tokenizer.corrected(f, layout, flips)[0] != tokenizer.corrected(f, layout)[0]).any(2)
    assert not moved[0].any() and not moved[2].any() and not moved[1, : layout.offsets[2]].any()
    assert moved[1, layout.offsets[2] :].any()


# -- images ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_previews_add_the_levels_that_are_wholly_known_in_each_row(tokenizer):
    layout = tokenizer.layout()
    tokens = tokenizer.encode(torch.rand(3, 3, 16, 16) * 2 - 1)
    fhats, known = tokenizer.fhats(tokens, layout), torch.zeros(3, layout.n, dtype=torch.bool)
    known[0] = True
    known[1, : layout.offsets[2] + 4] = True  # a part of level 2
    seen = tokenizer.decode(tokens.where(known[..., None], 7), known=known)
    for row, f in enumerate((fhats[3], fhats[1], tokenizer.start(3, layout))):
        torch.testing.assert_close(seen[row], tokenizer.decode_features(f)[row], atol=1e-6, rtol=1e-5)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode_features(fhats[-1]))


@torch.no_grad()
def test_other_sizes_and_layouts(tokenizer):
    for shape, layout in (((8, 24), None), ((16, 16), Layout(((1, 1), (4, 4)))), ((20, 12), None)):
        layout = layout or tokenizer.layout(shape)
        x = torch.rand(2, 3, *shape) * 2 - 1
        tokens = tokenizer.encode(x, layout)
        assert tokens.shape == (2, layout.n, 6) and tokenizer.decode(tokens, layout).shape == x.shape


@torch.no_grad()
def test_autocast_leaves_the_recursion_alone(tokenizer):
    f, layout = features(tokenizer), tokenizer.layout()
    labels, inputs = tokenizer.corrected(f, layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.features(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
        again, seen = tokenizer.corrected(f, layout)
        values = tokenizer.quantized(f, layout, Noise.of(0, 3)).values
    assert torch.equal(labels, again) and torch.equal(inputs, seen) and values.dtype == torch.float32


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tokenizer", "patchified"])
def test_the_training_pass_gives_the_same_bits_and_straight_through_gradients(which, request):
    tokenizer = request.getfixturevalue(which)
    f, layout = features(tokenizer).double().requires_grad_(), tokenizer.layout()
    q = tokenizer.quantized(f, layout, Noise.of(0, 3))
    assert torch.equal(q.tokens, tokenizer.corrected(f.detach(), layout)[0])
    torch.testing.assert_close(q.values, tokenizer.fhats(q.tokens, layout)[-1].double(), atol=1e-6, rtol=1e-6)
    pull = torch.randn(f.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mine = torch.autograd.grad((q.values * pull).sum(), f, retain_graph=True)[0]

    p, total = tokenizer.config.patchify, torch.zeros_like(f)
    losses = []
    for h, w in layout.levels:
        cells, (y, x) = (h * p, w * p), f.shape[2:]
        u = F.normalize(F.interpolate(f - total.detach(), size=cells, mode="area"), dim=1)
        code = torch.where(u > 0, 1.0, -1.0).double() / 6**0.5
        total = total + F.interpolate(u + (code - u).detach(), size=(y, x), mode="bilinear")
        soft = (-4 * 100 / 6**0.5 * u).sigmoid().clamp(1e-12, 1 - 1e-12)  # of the minus bit

        def entropy(b):
            return -(b * b.log() + (1 - b) * (1 - b).log()).sum(-1)

        soft = soft.movedim(1, -1)
        sample, batch = entropy(soft).mean(), entropy(soft.flatten(0, 2).mean(0))
        losses.append(0.1 / 100 * (sample - batch) + 0.25 * (u - code).square().mean())
    torch.testing.assert_close(mine, torch.autograd.grad((total * pull).sum(), f)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(q.losses["vq"], torch.stack(losses).mean(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("backbone", [{"patch": PATCH}, {"patch": None, "cnn": CNN}])
def test_a_short_training_lowers_the_error_and_moves_every_parameter(backbone):
    tokenizer = fresh(**backbone).train()
    before = {n: p.detach().clone() for n, p in tokenizer.named_parameters()}
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    x = F.interpolate(torch.rand(8, 3, 2, 2), size=(16, 16), mode="bilinear") * 2 - 1
    errors, terms = [], TokenizerLossConfig(l1=0.0)
    for step in range(30):
        out = tokenizer_loss(tokenizer, {"image": x}, Noise.of(step, 8), terms, updates=step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        errors.append(out["l2"].item())
    assert errors[-1] < 0.5 * errors[0] and "vq" in out and out["revived"] == 0
    assert [n for n, p in tokenizer.named_parameters() if torch.equal(p, before[n])] == []


# -- layouts --------------------------------------------------------------------------------------------------------


def test_lists_of_the_paper():
    assert len(RATIOS) == 15 and all(len(scales) == 13 for scales in RATIOS.values())
    assert set(RATIOS) == {1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0, 0.8, 0.75, 0.666, 0.571, 0.5, 0.4, 0.333}
    assert all(abs(s[n - 1][0] / s[n - 1][1] - r) < 0.01 for r, s in RATIOS.items() for n in SIZES.values())
    assert scales_for(1.0, "0.06M").levels == tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16))
    assert scales_for(0.8, "0.06M").levels == ((1, 1), (2, 2), (3, 3), (4, 5), (8, 10), (12, 15), (16, 20))
    assert [scales_for(1.0, size).n for size in SIZES] == [521, 2521, 6425, 10521]
    assert scales_for(1.34).levels == RATIOS[1.333] and scales_for(9.0).levels == RATIOS[3.0]
    with pytest.raises(ValueError, match=r"0\.06M, 0\.25M.*'2M'"):
        scales_for(1.0, "2M")


def test_a_list_knows_its_largest_size():
    assert whole(scales_for(1.5, "0.25M")) == whole(scales_for(1.5)) == scales_for(1.5)
    assert whole(Layout(RATIOS[1.5][:8])) is None and whole(Layout(((1, 1), (2, 2)))) is None
    assert scales_to((56, 70)) == scales_for(0.8) and scales_to((7, 7)) is None


def test_layouts_of_shapes(tokenizer):
    assert tokenizer.space == Space(sizes=(2,) * 6)
    assert tokenizer.layout() == tokenizer.layout((16, 16)) == Layout(SCALES)
    assert tokenizer.layout((32, 8)).levels == ((1, 1), (4, 1), (6, 1), (8, 2))
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.layout((30, 16))
    patch = replace(PATCH, patch=16)
    official = BitPyramid(BitPyramidConfig(bits=6, scales=scales_for(1.0, "0.25M").levels, patch=patch))
    assert official.layout((512, 512)) == official.layout() == scales_for(1.0, "0.25M")
    assert official.layout((1024, 1024)) == scales_for(1.0)
    assert official.layout((896, 1120)) == scales_for(0.8)
    assert official.layout((512, 256)).levels[-1] == (32, 16), "no list ends there: stretched"
    halves = BitPyramid(BitPyramidConfig(bits=6, scales=scales_for(1.0, "0.06M").levels, patchify=4, patch=PATCH))
    assert halves.space.S == 96 and halves.config.downsample == 16
    assert halves.layout((320, 256)) == scales_for(1.25, "0.06M")


def test_configurations_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        BitPyramidConfig()
    with pytest.raises(ValueError, match=r"one channel per bit: 7, got z_channels=6"):
        BitPyramidConfig(bits=7, patch=PATCH)
    with pytest.raises(ValueError, match=r"3 resolutions can be halved up to 2 times, got halvings=3"):
        replace(CNN, halvings=3)


def test_fewer_halvings_and_a_decoder_of_its_own_widths():
    config = replace(CNN, halvings=1, decoder_ch_mult=(2, 1))
    encode, decode = CNNEncoder(config), CNNDecoder(config)
    z = encode(torch.zeros(1, 3, 16, 8))
    assert config.downsample == 2 and z.shape == (1, 6, 8, 4) and decode(z).shape == (1, 3, 16, 8)
    assert decode.norm_out.num_channels == 64 and len(decode.up) == 2 and len(encode.down) == 3


def test_the_log_tells_how_even_the_bits_are(tokenizer):
    """A bit that is set in half of the tokens has an entropy of 1, one that never is of 0."""
    assert tokenizer.metrics() == {}
    tokens = torch.zeros(2, 4, tokenizer.space.S, dtype=torch.int64)
    tokens[0, :, 1:] = 1
    f, layout = torch.zeros(0), tokenizer.layout()
    tokenizer.tend_(f, tokens, layout, Noise.of(0, 2), 0, None)
    told = tokenizer.metrics()
    assert told["bit_entropy_least"] == 0
    torch.testing.assert_close(told["bit_entropy"], torch.tensor(1 - 1 / tokenizer.space.S))
