"""The two backbones of the pyramid tokenizer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arvis.cost import Counting
from arvis.tokenizers import CNNConfig, CNNDecoder, CNNEncoder, PatchConfig, PatchDecoder, PatchEncoder
from arvis.tokenizers.cnn import Downsample, PixelAttention

CNN = CNNConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=6)
PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)


@pytest.mark.parametrize(
    ("encoder", "decoder", "config"), [(CNNEncoder, CNNDecoder, CNN), (PatchEncoder, PatchDecoder, PATCH)]
)
def test_shapes_for_several_sizes_and_gradients_everywhere(encoder, decoder, config):
    encode, decode = encoder(config), decoder(config)
    for shape in ((16, 16), (24, 8)):
        x = torch.randn(2, 3, *shape)
        z = encode(x)
        assert z.shape == (2, 6, shape[0] // config.downsample, shape[1] // config.downsample)
        assert decode(z).shape == x.shape
    (decode(encode(torch.randn(2, 3, 16, 16))) - x.mean()).square().mean().backward()
    flat = [n for m in (encode, decode) for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert flat == []


@pytest.mark.parametrize("make", [CNNEncoder, CNNDecoder])
def test_at_most_three_maps_of_a_picture_live_at_once(make):
    """What goes in, what is read and what is made, of the full resolution; one picture after the other."""
    with torch.device("meta"):
        net = make(replace(CNN, ch_mult=(1, 1, 1), using_sa=False, using_mid_sa=False)).eval()
        x = torch.empty(4, *((3, 64, 64) if make is CNNEncoder else (6, 16, 16)))
    with torch.inference_mode(), Counting(4) as counting:
        net(x)
    assert counting.most < 3.5 * 32 * 64 * 64 * 4, "the half are the pictures, of three channels"


@pytest.mark.parametrize("make", [CNNEncoder, CNNDecoder])
def test_without_gradients_it_computes_the_same_and_leaves_its_input(make):
    net = make(CNN).eval()
    x = torch.randn(2, 3 if make is CNNEncoder else 6, 16, 16)
    before, with_gradients = x.clone(), net(x)
    with torch.no_grad():
        assert torch.allclose(net(x), with_gradients, atol=1e-5)
    assert torch.equal(x, before)


def test_padding_of_the_stride_is_on_the_right_and_below():
    down = Downsample(1)
    torch.nn.init.zeros_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    down.conv.weight.data[0, 0, 0, 0] = 1  # reads the upper left pixel of each window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).flatten().tolist() == [0, 2, 8, 10]


def test_attention_is_single_headed_over_all_cells():
    layer, x = PixelAttention(32), torch.randn(2, 32, 3, 5)
    q, k, v = (F.conv2d(layer.norm(x), layer.qkv.weight, layer.qkv.bias)).chunk(3, 1)
    weight = torch.einsum("bcq,bck->bqk", q.flatten(2), k.flatten(2)).mul(32**-0.5).softmax(2)
    mixed = torch.einsum("bqk,bck->bcq", weight, v.flatten(2)).view(2, 32, 3, 5)
    assert torch.allclose(layer(x), x + layer.proj_out(mixed), atol=1e-5)


def test_attention_sits_at_the_lowest_resolution_and_in_the_middle():
    names = {n.split(".norm")[0] for n, _ in CNNEncoder(CNN).named_parameters() if "attn" in n and ".norm" in n}
    assert names == {"down.2.attn.0", "mid.attn_1"}
    names = {n.split(".norm")[0] for n, _ in CNNDecoder(CNN).named_parameters() if "attn" in n and ".norm" in n}
    assert names == {"up.2.attn.0", "up.2.attn.1", "mid.attn_1"}
    names = {n for n, _ in CNNDecoder(replace(CNN, decoder_sa=False)).named_parameters() if "attn" in n}
    assert {n.split(".norm")[0] for n in names if ".norm" in n} == {"mid.attn_1"}


def test_a_variational_encoder_gives_twice_the_channels():
    assert CNNEncoder(replace(CNN, double_z=True))(torch.randn(1, 3, 8, 8)).shape == (1, 12, 2, 2)


def test_patches_see_each_other_and_know_their_place():
    torch.manual_seed(0)
    encode, x = PatchEncoder(PATCH), torch.randn(1, 3, 16, 16)
    moved = x.clone()
    moved[..., :4, :4] += 1
    assert (encode(moved) - encode(x))[..., 3, 3].abs().max() > 1e-5
    same = encode(torch.ones(1, 3, 16, 16))
    assert (same[..., 0, 0] - same[..., 3, 3]).abs().max() > 1e-4


def test_refinement_crosses_the_borders_of_patches():
    torch.manual_seed(0)
    decode = PatchDecoder(PATCH)
    for block in decode.grid.blocks:  # no attention: only the convolutions can reach the neighbour
        torch.nn.init.zeros_(block.proj.weight)
    z = torch.randn(1, 6, 4, 4)
    moved = z.clone()
    moved[..., 0, 0] += 1
    change = (decode(moved) - decode(z)).abs().sum(1)[0]
    assert change[:4, 4:8].max() > 1e-6 and change[:4, 12:].max() == 0


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        PatchEncoder(PATCH)(torch.randn(1, 3, 18, 16))
    with pytest.raises(ValueError, match="32 or 24 groups"):
        CNNConfig(ch=40)
    with pytest.raises(ValueError, match="even"):
        PatchConfig(patch=5)


def test_the_default_patch_backbone_has_its_size():
    count = sum(p.numel() for m in (PatchEncoder(PatchConfig()), PatchDecoder(PatchConfig())) for p in m.parameters())
    assert 2.5e6 < count < 3.5e6
