"""Codes of many sizes, each the whole picture: levels by themselves, pictures of one alone, training at any size."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arvis.noise import Noise
from arvis.tokenizers import CNNConfig, PatchConfig
from arvis.tokenizers.resized import ResizedVQ, ResizedVQConfig
from arvis.tokens import Layout, Space, pyramid
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss

PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)
CNN = CNNConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=16)
BY_ANGLE = ResizedVQConfig(patch_nums=(1, 2, 4), vocab_size=40, code_width=4, patch=PATCH)
BY_DISTANCE = replace(BY_ANGLE, l2_norm=False)
LISTS = (pyramid((1, 2, 4)), pyramid((1, 3, 3, 7)), Layout(((1, 1), (2, 3), (4, 6))))


def make(config: ResizedVQConfig = BY_ANGLE, seed: int = 0) -> ResizedVQ:
    torch.manual_seed(seed)
    return ResizedVQ(config).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def averaged(f, size):
    """Means over the cells that a target cell covers, written out."""
    h, w = f.shape[2:]
    rows = [slice(i * h // size[0], -(-(i + 1) * h // size[0])) for i in range(size[0])]
    columns = [slice(j * w // size[1], -(-(j + 1) * w // size[1])) for j in range(size[1])]
    return torch.stack([torch.stack([f[:, :, r, c].mean((2, 3)) for c in columns], -1) for r in rows], -2)


@torch.no_grad()
@pytest.mark.parametrize("layout", LISTS)
@pytest.mark.parametrize("config", [BY_ANGLE, BY_DISTANCE, replace(BY_ANGLE, patch=None, cnn=CNN)])
def test_each_level_is_the_nearest_code_of_the_averaged_features(config, layout, images):
    tokenizer = make(config)
    assert tokenizer.space == Space(sizes=(40,)) and tokenizer.channels == 4
    table = tokenizer.quantize.embedding.weight
    table *= torch.linspace(0.5, 2, 40)[:, None]  # the stored table is used as unit codes all the same
    f, tokens, found = tokenizer.features(images), tokenizer.encode(images, layout), []
    for level in layout.levels:
        z, e = averaged(f, level).flatten(2).transpose(1, 2), table
        if config.l2_norm:
            z, e = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
        found.append((z[:, :, None] - e).square().sum(-1).argmin(-1))
    assert torch.equal(tokens[..., 0], torch.cat(found, 1))
    assert torch.equal(tokens, tokenizer.tokens(f, layout))


@torch.no_grad()
def test_the_picture_is_the_last_level_alone_and_each_level_makes_one(images):
    tokenizer, layout = make(), LISTS[0]
    tokens = tokenizer.encode(images, layout)
    shown = tokenizer.decode(tokens, layout)
    other = tokens.clone()
    other[:, : layout.offsets[2]] = (other[:, : layout.offsets[2]] + 1) % 40
    assert torch.equal(tokenizer.decode(other, layout), shown)
    codes = F.normalize(tokenizer.quantize.embedding.weight, dim=1)
    for k, side in enumerate((1, 2, 4)):
        assert torch.allclose(tokenizer.codes(tokens, layout, k).flatten(2).mT, codes[tokens[:, layout.span(k), 0]])
        assert tokenizer.reconstruct(tokenizer.codes(tokens, layout, k)).shape == (3, 3, 4 * side, 4 * side)
    assert torch.allclose(shown, tokenizer.reconstruct(tokenizer.codes(tokens, layout, 2)).clamp(-1, 1))


@torch.no_grad()
def test_a_preview_is_the_finest_level_that_is_wholly_known_enlarged(images):
    tokenizer, layout = make(), LISTS[0]
    tokens = tokenizer.encode(images, layout)
    known = torch.ones(3, layout.n, dtype=torch.bool)
    known[0, 1:], known[1, layout.offsets[2] + 3], known[2] = False, False, True
    shown = tokenizer.decode(tokens.where(known[..., None], 39), layout, known)
    for item, k in enumerate((0, 1, 2)):
        alone = tokenizer.reconstruct(tokenizer.codes(tokens[item : item + 1], layout, k)).clamp(-1, 1)
        wanted = F.interpolate(alone, size=(16, 16), mode="bilinear") if k < 2 else alone
        assert torch.allclose(shown[item], wanted[0], atol=1e-6)
    assert not tokenizer.decode(tokens, layout, torch.zeros_like(known)).any(), "grey where nothing is known"


@torch.no_grad()
@pytest.mark.parametrize("layout", LISTS)
def test_a_generator_sees_the_level_before_enlarged_and_nothing_else(layout, images):
    tokenizer = make()
    tokens = tokenizer.encode(images, layout)
    seen, codes = tokenizer.inputs(tokens, layout), F.normalize(tokenizer.quantize.embedding.weight, dim=1)
    assert tokenizer.inputs(tokens, layout, 2).shape[1] == layout.n - layout.offsets[2]
    f = tokenizer.start(3, layout)
    for k in range(1, layout.K):
        f = tokenizer.accumulate(f, tokens[:, layout.span(k - 1)], k - 1, layout)
        unit = codes[tokens[:, layout.span(k - 1), 0]].mT.unflatten(2, layout.levels[k - 1])
        wanted = F.interpolate(unit, size=layout.levels[k], mode="bicubic").flatten(2).mT
        part = seen[:, layout.offsets[k] - 1 : layout.offsets[k + 1] - 1]
        assert torch.allclose(part, wanted, atol=1e-6)
        assert torch.equal(part, tokenizer.next_input(f, k, layout))
    assert not torch.allclose(seen.norm(dim=-1), torch.ones(1), atol=1e-3), "not normalised again"


def test_lists_stretch_to_the_shape_of_a_picture():
    tokenizer = make()
    assert tokenizer.layout() == tokenizer.layout((16, 16)) == pyramid((1, 2, 4))
    assert tokenizer.layout(None, (1, 3, 5)) == pyramid((1, 3, 5))
    assert tokenizer.layout((16, 32)) == Layout(((1, 1), (2, 4), (4, 8)))
    assert tokenizer.layout((8, 16), (1, 2, 3, 8)) == Layout(((1, 1), (1, 1), (1, 2), (2, 4)))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(10, 16\)"):
        tokenizer.layout((10, 16))


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_size_of_a_training_pass_is_random_and_shared_by_a_batch():
    tokenizer = make(replace(BY_ANGLE, whole=0.25, least=2))
    sizes = Counter(tokenizer.trained_size((8, 4), Noise.of(seed, 5)) for seed in range(1000))
    assert set(sizes) == {(8, 4), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)}
    assert sizes[8, 4] == pytest.approx(250, abs=55)
    assert all(count == pytest.approx(125, abs=45) for size, count in sizes.items() if size != (8, 4))
    assert tokenizer.trained_size((2, 2), Noise.of(0)) == (2, 2), "there is no smaller one"


def test_a_coarse_code_map_is_compared_with_the_averaged_picture(images):
    tokenizer, terms = make(replace(BY_ANGLE, whole=0.0, least=2)), TokenizerLossConfig(l1=0.0, l2=1.0, vq=0.0)
    noise = next(n for n in map(Noise.of, range(50)) if tokenizer.trained_size((4, 4), n) == (2, 2))
    found = tokenizer_loss(tokenizer, {"image": images}, noise, terms)["loss"]
    z = F.normalize(averaged(tokenizer.features(images), (2, 2)).flatten(2).mT, dim=-1)
    codes = F.normalize(tokenizer.quantize.embedding.weight, dim=1)
    q = codes[(z @ codes.mT).argmax(-1)].mT.unflatten(2, (2, 2))
    assert torch.allclose(found, F.mse_loss(tokenizer.reconstruct(q), averaged(images, (8, 8))), atol=1e-6)
    found.backward()
    assert tokenizer.encoder.embed.weight.grad.abs().sum() > 0, "straight through to the encoder"


@torch.no_grad()
def test_codes_start_from_vectors_of_all_levels_and_dead_ones_come_back(images):
    tokenizer, layout = make(), LISTS[0]
    f = tokenizer.features(images)
    tokenizer.init_(f, layout, Noise.of(0))
    table = tokenizer.quantize.embedding.weight
    rows = F.normalize(torch.cat([averaged(f, level).flatten(2).mT for level in layout.levels], 1).flatten(0, 1), dim=1)
    assert ((table[:, None] - rows).norm(dim=-1).amin(1) < 1e-5).all()
    tokens = torch.zeros(3, 5, 1, dtype=torch.int64)
    assert tokenizer.tend_(f, tokens, layout, Noise.of(0), 0, None) == 0
    kept = table[0].clone()
    assert tokenizer.tend_(f, tokens, layout, Noise.of(0), 0, 0.05) == 39
    assert torch.equal(table[0], kept) and set(tokenizer.metrics()) == {"usage", "perplexity"}
