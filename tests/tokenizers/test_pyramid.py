"""The pyramid tokenizer: paths that must agree, previews, other sizes, gradients, training."""

import pytest
import torch
import torch.nn.functional as F

from arvis.tokenizers import CNNConfig, PatchConfig, PyramidVQ, PyramidVQConfig
from arvis.tokens import Layout, Space, pyramid

PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)
SIDES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    out = PyramidVQ(PyramidVQConfig(patch_nums=SIDES, vocab_size=40, z_channels=6, patch=PATCH)).eval()
    torch.nn.init.normal_(out.quantize.embedding.weight)
    return out


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_space_and_layouts(tokenizer):
    assert tokenizer.space == Space(sizes=(40,))
    assert tokenizer.layout() == tokenizer.layout((16, 16)) == pyramid(SIDES)
    assert tokenizer.layout((32, 16)).levels == ((2, 1), (4, 2), (6, 3), (8, 4))
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.layout((30, 16))


@torch.no_grad()
def test_encoding_and_decoding_meet_bit_for_bit(tokenizer, images):
    layout, tokens = tokenizer.layout(), tokenizer.encode(images)
    features = tokenizer.features(images)
    quantized = tokenizer.quantize(features, layout)
    fhats = tokenizer.fhats(tokens, layout)
    assert tokens.shape == (3, layout.n, 1) and torch.equal(tokens, quantized.tokens)
    assert torch.equal(quantized.values, features + (fhats[-1] - features))
    mse = torch.stack([F.mse_loss(fhat, features) for fhat in fhats])
    assert torch.allclose(mse, quantized.stats["mse"], rtol=1e-5)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode_features(fhats[-1]))
    f = tokenizer.start(3, layout)
    for k in range(layout.K):
        f = tokenizer.accumulate(f, tokens[:, layout.span(k)], k, layout)
        assert torch.equal(f, fhats[k])


@torch.no_grad()
def test_teacher_forcing_inputs_are_area_means_of_partial_sums(tokenizer, images):
    layout, tokens = tokenizer.layout(), tokenizer.encode(images)
    fhats, inputs = tokenizer.fhats(tokens, layout), tokenizer.inputs(tokens, layout)
    assert inputs.shape == (3, layout.n - 1, 6) and inputs.dtype == torch.float32
    for k in range(1, layout.K):
        mean = F.adaptive_avg_pool2d(fhats[k - 1], layout.levels[k]).flatten(2).transpose(1, 2)
        part = inputs[:, layout.offsets[k] - 1 : layout.offsets[k + 1] - 1]
        assert torch.allclose(part, mean, atol=1e-6)
        assert torch.equal(part, tokenizer.next_input(fhats[k - 1], k, layout))
        assert torch.equal(part, tokenizer.inputs(tokens, layout, k, k + 1))
    assert torch.equal(inputs[:, 4:], tokenizer.inputs(tokens, layout, 2, 4))
    blind = tokens.clone()
    blind[:, layout.span(3)] = 0  # the last level is never an input
    assert torch.equal(inputs, tokenizer.inputs(blind, layout))
    assert tokenizer.inputs(tokens, layout, 0, 1).shape == (3, 0, 6)


@torch.no_grad()
def test_previews_add_the_levels_that_are_wholly_known_in_each_row(tokenizer, images):
    layout, tokens = tokenizer.layout(), tokenizer.encode(images)
    fhats = tokenizer.fhats(tokens, layout)
    known = torch.zeros(3, layout.n, dtype=torch.bool)
    known[0] = True
    known[1, : layout.offsets[2] + 4] = True  # half of level 2
    garbled = tokens.where(known[..., None], 2**30)  # undecided positions hold anything
    seen = tokenizer.decode(garbled, known=known)
    zero = tokenizer.start(3, layout)
    for row, f in enumerate((fhats[3], fhats[1], zero)):
        assert torch.allclose(seen[row], tokenizer.decode_features(f)[row], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (20, 12)])
def test_other_layouts_and_sizes(tokenizer, shape):
    x = torch.rand(2, 3, *shape) * 2 - 1
    last = tuple(side // 4 for side in shape)
    for layout in (tokenizer.layout(shape), Layout(((1, 1), (1, 2), last)), Layout((last,))):
        tokens = tokenizer.encode(x, layout)
        assert tokens.shape == (2, layout.n, 1)
        image = tokenizer.decode(tokens, layout)
        assert image.shape == x.shape and image.abs().max() <= 1
    assert tokenizer(x)[0].shape == x.shape


@torch.no_grad()
def test_given_code_vectors_accumulate_like_their_tokens(tokenizer, images):
    layout, tokens = tokenizer.layout(), tokenizer.encode(images)
    part = tokens[:, layout.span(2)]
    f, h = torch.randn(3, 6, 4, 4), tokenizer.embed(part)
    assert torch.equal(h, tokenizer.quantize.embedding.weight[part[..., 0]])
    assert torch.equal(tokenizer.accumulate_soft(f, h, 2, layout), tokenizer.accumulate(f, part, 2, layout))
    assert not torch.equal(tokenizer.accumulate_soft(f, h * 0.5, 2, layout), tokenizer.accumulate(f, part, 2, layout))


@torch.no_grad()
def test_autocast_leaves_the_recursion_alone(tokenizer, images):
    layout, tokens = tokenizer.layout(), tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        fhat, f = tokenizer.fhats(tokens, layout)[-1], tokenizer.features(images)
        codes = tokenizer.quantize(f, layout)
        image = tokenizer.decode_features(fhat)
    assert torch.equal(fhat, tokenizer.fhats(tokens, layout)[-1])
    assert f.dtype == image.dtype == codes.values.dtype == torch.float32
    assert torch.equal(codes.tokens, tokenizer.quantize(f, layout).tokens)


@pytest.mark.parametrize("cnn", [False, True])
def test_a_short_training_lowers_every_term_and_moves_every_parameter(cnn):
    torch.manual_seed(0)
    backbone = {"cnn": CNNConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=6)} if cnn else {"patch": PATCH}
    tokenizer = PyramidVQ(PyramidVQConfig(patch_nums=SIDES, vocab_size=40, z_channels=6, **backbone))
    start = {n: p.detach().clone() for n, p in tokenizer.named_parameters()}
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    x = F.interpolate(torch.rand(8, 3, 2, 2), size=(16, 16), mode="bilinear") * 2 - 1
    errors = []
    for _ in range(30):
        image, quantized = tokenizer(x)
        error = F.mse_loss(image, x)
        optimizer.zero_grad()
        (error + quantized.losses["vq"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    same = [n for n, p in tokenizer.named_parameters() if torch.equal(p, start[n])]
    assert same == []


def test_configurations_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        PyramidVQConfig()
    with pytest.raises(ValueError, match="z_channels 6 must equal 32"):
        PyramidVQConfig(patch=PATCH)
