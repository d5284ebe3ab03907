"""The grid tokenizer: codes by angle and by distance, previews, sizes, upkeep of the codebook, training, names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from arvis.noise import Noise
from arvis.systems.llamagen import tokenizer_keys, vq
from arvis.tokenizers import CNNConfig, PatchConfig, Trainable
from arvis.tokenizers.grid import GridVQ, GridVQConfig
from arvis.tokens import Layout, Space
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.weights import load_official, map_shapes, to_official
from arvis.weights.families import Recent

PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)
CNN = CNNConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=16)
BY_ANGLE = GridVQConfig(grid=(4, 4), vocab_size=40, code_width=4, patch=PATCH)
BY_DISTANCE = replace(BY_ANGLE, l2_norm=False)
LAYOUTS = Path(__file__).parents[3] / "shared/keys/llamagen"
NOISE = Noise.of(0)


def make(config: GridVQConfig = BY_ANGLE, seed: int = 0) -> GridVQ:
    torch.manual_seed(seed)
    return GridVQ(config).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("config", [BY_ANGLE, BY_DISTANCE, replace(BY_ANGLE, patch=None, cnn=CNN)])
def test_tokens_are_the_nearest_codes_and_decode_to_what_training_sees(config, images):
    tokenizer = make(config)
    layout = tokenizer.layout()
    assert tokenizer.space == Space(sizes=(40,)) and layout == tokenizer.layout((16, 16)) == Layout(((4, 4),))
    f = tokenizer.features(images)
    z, table = f.flatten(2).transpose(1, 2), tokenizer.quantize.embedding.weight
    assert torch.allclose(table.norm(dim=1), torch.ones(40)) == config.l2_norm, "unit codes at first"
    table *= torch.linspace(0.5, 2, 40)[:, None]  # the stored table is used as unit codes all the same
    if config.l2_norm:
        z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
    nearest = (z[:, :, None] - table).square().sum(-1).argmin(-1)
    quantized = tokenizer.quantized(f, layout, NOISE)
    assert torch.equal(tokenizer.encode(images, layout)[..., 0], nearest)
    assert torch.equal(quantized.tokens[..., 0], nearest)
    codes = table[nearest].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(tokenizer.codes(quantized.tokens, layout), codes, atol=1e-6)
    assert torch.allclose(quantized.values, codes, atol=1e-6)
    assert torch.allclose(quantized.losses["vq"], 1.25 * F.mse_loss(z, table[nearest]), rtol=1e-5)
    wanted = tokenizer.reconstruct(codes).clamp(-1, 1)
    assert torch.allclose(tokenizer.decode(quantized.tokens, layout), wanted, atol=1e-5)
    assert torch.allclose(tokenizer(images)[0].clamp(-1, 1), wanted, atol=1e-5)


def test_the_gradient_goes_straight_through_the_unit_vectors(images):
    tokenizer = make()
    f = tokenizer.features(images).detach().requires_grad_()
    g = torch.randn(3, 4, 4, 4)
    (tokenizer.quantized(f, tokenizer.layout(), NOISE).values * g).sum().backward()
    unit = F.normalize(f.detach(), dim=1)
    wanted = (g - unit * (g * unit).sum(1, keepdim=True)) / f.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(f.grad, wanted, atol=1e-5)


def test_the_entropy_term_has_its_ratio(images):
    plain, regular = make(), make(replace(BY_ANGLE, entropy_ratio=0.1))
    with torch.no_grad():
        f = plain.features(images)
        z = F.normalize(f, dim=1).flatten(2).transpose(1, 2).flatten(0, 1)
        e = F.normalize(plain.quantize.embedding.weight, dim=1)
        p = (-(z[:, None] - e).square().sum(-1) / 0.01).softmax(-1)
        sample = -(p * p.clamp_min(1e-30).log()).sum(1).mean()
        batch = -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
        both = [t.quantized(f, t.layout(), NOISE).losses["vq"] for t in (plain, regular)]
    assert torch.isclose(both[1] - both[0], 0.1 * (sample - batch), atol=1e-5)


@torch.no_grad()
def test_previews_are_grey_where_nothing_is_known_and_read_nothing_there(images):
    tokenizer = make()
    tokens, layout = tokenizer.encode(images), tokenizer.layout()
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[0] = True
    known[1, :6] = True  # a row and a half
    garbled = tokens.where(known[..., None], 2**30)
    seen = tokenizer.decode(garbled, layout, known)
    assert torch.equal(seen[0], tokenizer.decode(tokens)[0])
    assert (seen[1, :, :4] != 0).any() and (seen[1, :, 4:8, :8] != 0).any()
    assert (seen[1, :, 4:8, 8:] == 0).all() and (seen[1, :, 8:] == 0).all() and (seen[2] == 0).all()
    codes = tokenizer.codes(tokens)[1:2]
    mean = codes.flatten(2)[:, :, :6].mean(2)[..., None, None]
    filled = torch.where(known[1].view(1, 1, 4, 4), codes, mean)
    assert torch.allclose(seen[1, :, :4], tokenizer.reconstruct(filled)[0, :, :4].clamp(-1, 1), atol=1e-6)


@torch.no_grad()
def test_other_sizes_and_wrong_ones():
    tokenizer = make()
    x = torch.rand(2, 3, 8, 24) * 2 - 1
    layout = tokenizer.layout((8, 24))
    assert layout == Layout(((2, 6),))
    tokens = tokenizer.encode(x, layout)
    assert tokens.shape == (2, 12, 1) and tokenizer.decode(tokens, layout).shape == x.shape
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.layout((30, 16))
    with pytest.raises(ValueError, match=r"give \(2, 6\) cells"):
        tokenizer.encode(x, tokenizer.layout())
    with pytest.raises(ValueError, match="one level"):
        tokenizer.decode(tokens, Layout(((1, 1), (2, 2))))
    with pytest.raises(ValueError, match="exactly one"):
        GridVQConfig()


@torch.no_grad()
def test_autocast_rounds_no_distances(images):
    tokenizer = make()
    f = tokenizer.features(images)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = tokenizer.quantized(f, tokenizer.layout(), NOISE)
        assert tokenizer.features(images).dtype == tokenizer.decode(quantized.tokens).dtype == torch.float32
    assert torch.equal(quantized.tokens, tokenizer.quantized(f, tokenizer.layout(), NOISE).tokens)


# -- the codebook ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", [BY_ANGLE, BY_DISTANCE])
def test_the_table_starts_from_data(config, images):
    tokenizer = make(config)
    f = tokenizer.features(images)
    tokenizer.init_(f, tokenizer.layout(), NOISE)
    vectors = f.flatten(2).transpose(1, 2).flatten(0, 1)
    vectors = F.normalize(vectors, dim=1) if config.l2_norm else vectors
    table = tokenizer.quantize.embedding.weight
    assert torch.cdist(table, vectors).amin(1).max() < 1e-3
    assert len(table.unique(dim=0)) == 40, "48 vectors give 40 different codes"
    assert len(tokenizer.encode(images).unique()) > 30


@torch.no_grad()
def test_hits_and_recent_ids_are_kept_and_dead_codes_come_back(images):
    tokenizer = make()
    layout, f = tokenizer.layout(), tokenizer.features(images)
    tokens = torch.arange(48).view(3, 16, 1) % 20
    assert tokenizer.tend_(f, tokens, layout, NOISE, 0, None) == 0
    hits = torch.bincount(tokens.flatten(), minlength=40).float()
    assert torch.equal(tokenizer.hits, hits)
    assert torch.equal(tokenizer.recent.ring[-48:], tokens.flatten())
    found = tokenizer.metrics()
    assert found["usage"] == 0.5 and 19 < found["perplexity"] < 20
    before = tokenizer.quantize.embedding.weight.clone()
    assert tokenizer.tend_(f, tokens, layout, NOISE, 1, 0.05) == 20
    after = tokenizer.quantize.embedding.weight
    assert torch.equal(after[:20], before[:20])
    vectors = F.normalize(f.flatten(2).transpose(1, 2).flatten(0, 1), dim=1)
    assert torch.cdist(after[20:], vectors).amin(1).max() < 1e-3
    assert torch.allclose(tokenizer.hits[20:], hits.mean().expand(20))
    assert tokenizer.tend_(f, tokens, layout, NOISE, 2, 0.05) == 0, "revived codes get time"


def test_looking_changes_no_statistic(images):
    tokenizer = make().train()
    before = {n: t.clone() for n, t in tokenizer.named_buffers()}
    tokenizer_loss(tokenizer, {"image": images}, NOISE, TokenizerLossConfig())
    tokenizer.encode(images)
    assert all(torch.equal(before[n], t) for n, t in tokenizer.named_buffers())


@pytest.mark.parametrize("backbone", ["cnn", "patch"])
def test_a_short_training_uses_the_codebook_and_lowers_the_error(backbone):
    config = BY_ANGLE if backbone == "patch" else replace(BY_ANGLE, patch=None, cnn=replace(CNN, ch_mult=(1, 1)))
    tokenizer: Trainable = GridVQ(config).train()
    x = F.interpolate(torch.rand(4, 3, 4, 4), scale_factor=config.downsample, mode="bilinear") * 2 - 1
    with torch.no_grad():
        tokenizer.init_(tokenizer.features(x), tokenizer.layout(), NOISE)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    start = {n: p.detach().clone() for n, p in tokenizer.named_parameters()}
    terms, found = TokenizerLossConfig(l1=0.0, revive_every=5), []
    for step in range(30):
        loss = tokenizer_loss(tokenizer, {"image": x}, NOISE, terms, step)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        found.append(loss)
    assert found[-1]["l2"] < 0.5 * found[0]["l2"]
    assert found[-1]["usage"] > 0.5 and found[-1]["perplexity"] > 10
    assert [n for n, p in tokenizer.named_parameters() if torch.equal(p, start[n])] == []


# -- official names -------------------------------------------------------------------------------------------------


def test_official_names_and_back_are_exact():
    config = replace(BY_ANGLE, patch=None, cnn=replace(CNN, decoder_ch_mult=(1, 1, 2)))
    tokenizer, keys = make(config), tokenizer_keys(config)
    tokenizer.recent.add_(torch.arange(100) % 30)
    tokenizer.hits.copy_(tokenizer.recent.hits(40))
    official = to_official(tokenizer, keys)
    for name in ("encoder.conv_blocks.2.attn.0.q.weight", "decoder.conv_blocks.0.attn.1.proj_out.bias"):
        assert name in official
    assert not any(".attn." in name for name in official if "conv_blocks.1" in name)
    assert "decoder.conv_blocks.1.upsample.conv.weight" in official
    assert "decoder.conv_blocks.2.upsample.conv.weight" not in official, "the last of the list is the full size"
    assert official["quantize.codebook_used"].dtype == torch.float32
    fresh = make(config, seed=1)
    report = load_official(fresh, keys, official)
    assert not report.left_out and not report.kept
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), tokenizer.state_dict().values(), strict=True)
    )
    del official["quantize.codebook_used"]
    assert set(load_official(fresh, keys, official).kept) == {"hits", "recent.ring"}


def test_the_ring_of_a_file_gives_the_hits():
    ring, hits = torch.tensor([0.0, 3.0, 3.0, 1.0]), torch.zeros(5)
    ours = Recent().to_ours([ring], [torch.zeros(4, dtype=torch.int64), hits])
    assert ours[1].tolist() == [1, 1, 0, 2, 0]
    assert torch.equal(Recent().to_official(ours)[0], ring)


@pytest.mark.parametrize(
    ("name", "downsample", "count"), [("vq_ds16_c2i", 16, 71_883_403), ("vq_ds8_c2i", 8, 70_109_835)]
)
def test_the_published_tokenizers_have_the_published_sizes(name, downsample, count):
    config = vq(downsample, 256 // downsample)
    with torch.device("meta"):
        tokenizer = GridVQ(config)
    assert config.downsample == downsample and sum(p.numel() for p in tokenizer.parameters()) == count
    file = LAYOUTS / f"{name}.json"
    if not file.exists():
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    shapes = {n: tuple(shape) for n, (_, shape) in json.loads(file.read_text())["tensors"].items()}
    report = map_shapes(tokenizer, tokenizer_keys(config), shapes)
    assert report.ok and len(report.mapped) == len(shapes)
