"""The multi-scale residual recursion: exactness, assignment of the convolutions, gradients, revival."""

import pytest
import torch
import torch.nn.functional as F

from arvis.noise import Noise
from arvis.quant import MultiScaleVQ, MultiScaleVQConfig
from arvis.quant.multiscale import area, phi_index, residual_encode, spread, to_map, to_rows
from arvis.quant.usage import used
from arvis.tokens import Layout, pyramid

SQUARE = pyramid((1, 2, 3, 4, 6))
OBLONG = Layout(((1, 1), (2, 3), (3, 5), (4, 8)))
NOISE = Noise.of(5)


def make(layout=SQUARE, **settings):
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(MultiScaleVQConfig(**{"size": 50, "width": 6, "levels": layout.K, **settings}))
    torch.nn.init.normal_(quantizer.embedding.weight, std=0.5)
    return quantizer


def features(layout, batch=3, seed=1):
    return torch.randn(batch, 6, *layout.levels[-1], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("levels", "table"),
    [
        (6, [0, 0, 1, 2, 3, 3]),
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_which_convolution_a_level_uses(levels, table):
    assert [phi_index(k, levels, 4) for k in range(levels)] == table


@pytest.mark.parametrize("levels", range(1, 16))
def test_as_many_convolutions_as_levels_are_taken_in_order(levels):
    assert [phi_index(k, levels, levels) for k in range(levels)] == list(range(levels))


@pytest.mark.parametrize("shares", [0, 1, 2, 4, 5])
def test_names_of_the_convolutions(shares):
    quantizer = make(shares=shares)
    names = {n for n, _ in quantizer.quant_resi.named_parameters() if n.endswith("weight")}
    wanted = {
        0: {f"{k}.weight" for k in range(5)},
        1: {"qresi.weight"},
    }.get(shares, {f"qresi_ls.{s}.weight" for s in range(shares)})
    assert names == wanted
    assert quantizer(features(SQUARE), SQUARE).tokens.shape == (3, SQUARE.n, 1)


def test_a_ratio_of_zero_has_no_convolution():
    quantizer = make(ratio=0.0)
    assert list(quantizer.quant_resi.parameters()) == []
    h = torch.randn(2, 4, 6)
    up = F.interpolate(to_map(h, (2, 2)), size=(6, 6), mode="bicubic")
    assert torch.equal(quantizer.spread(h, 1, SQUARE), up)


@pytest.mark.parametrize("ratio", [0.3, -0.3, 1.0])
def test_the_ratio_is_the_share_of_the_convolution(ratio):
    """Fails for shares that are swapped, or do not add up to one; a half hides both."""
    quantizer, h = make(ratio=ratio, shares=1), torch.randn(2, 36, 6)
    phi, x = quantizer.quant_resi.qresi, to_map(h, (6, 6))
    share = abs(ratio)
    wanted = (1 - share) * x + share * F.conv2d(x, phi.weight, phi.bias, padding=1)
    assert torch.allclose(quantizer.spread(h, 4, SQUARE), wanted, atol=1e-6)  # the last level: not resized


@pytest.mark.parametrize("layout", [SQUARE, OBLONG, pyramid((1, 4, 4)), pyramid((5,))])
def test_decoding_ids_repeats_the_encoder_bit_for_bit(layout):
    """Check 8. Fails for any other order of sums, or a last level that is resized."""
    quantizer, f = make(layout), features(layout)
    out = quantizer(f, layout)
    fhat = torch.zeros_like(f)
    for k in range(layout.K):
        fhat = fhat + quantizer.spread(quantizer.embedding(out.tokens[:, layout.span(k), 0]), k, layout)
        assert torch.allclose(out.stats["mse"][k], F.mse_loss(fhat, f), rtol=1e-5)
    assert torch.equal(quantizer.encode(f, layout), out.tokens)
    assert torch.equal(out.values, f + (fhat - f))


def test_each_level_codes_the_area_mean_of_what_is_left():
    quantizer, f = make(OBLONG), features(OBLONG)
    out, vectors = quantizer(f, OBLONG), quantizer.targets(f, OBLONG)
    rest = f
    for k in range(OBLONG.K):
        size, last = OBLONG.levels[k], k == OBLONG.K - 1
        z = rest if last else F.adaptive_avg_pool2d(rest, size)
        assert torch.allclose(vectors[:, OBLONG.span(k)], to_rows(z), atol=1e-6)
        ids = out.tokens[:, OBLONG.span(k), 0]
        h = quantizer.embedding(ids).transpose(1, 2).unflatten(2, size)
        up = h if last else F.interpolate(h, size=OBLONG.levels[-1], mode="bicubic", align_corners=False)
        phi = quantizer.quant_resi.qresi_ls[phi_index(k, OBLONG.K, 4)]
        rest = rest - (0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1))
        distance = torch.cdist(vectors[:, OBLONG.span(k)], quantizer.embedding.weight)
        assert torch.equal(distance.argmin(2), ids)


def test_lookup_by_angle_adds_unnormalised_codes():
    quantizer, f = make(cosine=True), features(SQUARE)
    tokens = quantizer.encode(f, SQUARE)
    assert torch.equal(tokens, quantizer.encode(f * 100, SQUARE)) is False  # later levels see another residual
    assert torch.equal(tokens[:, :1], quantizer.encode(f * 100, SQUARE)[:, :1])
    h = quantizer.embedding(tokens[:, SQUARE.span(4), 0])
    assert not torch.allclose(h.norm(dim=-1), torch.ones(3, 36))


def test_another_target_plugs_in():
    f = features(SQUARE)
    perfect = list(residual_encode(f, lambda z, k: z, lambda h, k, layout: spread(h, k, layout, lambda x: x), SQUARE))
    total = sum(h for _, h in perfect)
    assert torch.allclose(total, f, atol=1e-5)  # unquantised, the last level codes all that is left

    def whole(rest, f, k, layout):
        return area(f, layout.levels[k])

    alone = list(residual_encode(f, lambda z, k: z, lambda h, k, layout: 0 * f, SQUARE, whole))
    assert torch.allclose(alone[2][0], to_rows(F.adaptive_avg_pool2d(f, 3)))


def test_loss_and_gradients():
    quantizer, f, g = make(beta=0.3), features(SQUARE).requires_grad_(), features(SQUARE, seed=9)
    out = quantizer(f, SQUARE)
    assert torch.allclose(out.losses["vq"], 1.3 * out.stats["mse"].mean())
    (through,) = torch.autograd.grad((out.values * g).sum(), f, retain_graph=True)
    assert torch.allclose(through, g)
    assert torch.autograd.grad(out.values.sum(), quantizer.embedding.weight, retain_graph=True, allow_unused=True) == (
        None,
    )
    out.losses["vq"].backward()
    fhats, fhat = [], torch.zeros_like(f)
    for k in range(SQUARE.K):
        fhat = fhat + quantizer.spread(quantizer.embedding(out.tokens[:, SQUARE.span(k), 0]), k, SQUARE)
        fhats.append(fhat.detach())
    commit = sum(0.3 * 2 * (f.detach() - fhat) / f.numel() for fhat in fhats) / SQUARE.K
    assert torch.allclose(f.grad, commit, atol=1e-7)
    used_ids = out.tokens.unique()
    moved = quantizer.embedding.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert torch.equal(used_ids, moved)
    assert all(p.grad.abs().sum() > 0 for p in quantizer.quant_resi.parameters())


def test_a_float64_module_computes_in_float64():
    quantizer, f = make().double(), features(SQUARE).double()
    assert quantizer(f, SQUARE).values.dtype == torch.float64


def test_half_precision_weights_quantise_in_float32():
    quantizer, f = make().bfloat16(), features(SQUARE)
    out = quantizer(f.bfloat16(), SQUARE)
    assert out.values.dtype == torch.float32


def test_a_map_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\) cells"):
        make()(torch.randn(1, 6, 5, 5), SQUARE)


def test_hits_are_recorded_per_level():
    quantizer, f = make(), features(SQUARE)
    out = quantizer(f, SQUARE)
    assert quantizer.ema_vocab_hit_SV.sum() == 0  # the forward pass itself records nothing
    quantizer.record_(out.tokens, SQUARE, 0)
    assert torch.equal(quantizer.ema_vocab_hit_SV.sum(1), 3.0 * torch.tensor(SQUARE.sizes))
    assert torch.equal(used(quantizer.hits(out.tokens, SQUARE)), out.stats["usage"])
    quantizer.record_(out.tokens[:, :5], pyramid((1, 2)), 0)  # another list: first and last level
    assert quantizer.ema_vocab_hit_SV.sum(1).tolist() == [3, 0, 0, 0, 12]


def test_starting_and_reviving_the_table_makes_it_used():
    f = features(SQUARE, batch=64)
    quantizer = make(size=256)
    with torch.no_grad():
        quantizer.embedding.weight[128:] += 50
    before = quantizer.embedding.weight.clone()

    def share():
        return used(quantizer.hits(quantizer.encode(features(SQUARE, 64, seed=2), SQUARE), SQUARE).sum(0)).item()

    assert share() <= 0.55
    for step in range(20):
        quantizer.record_(quantizer.encode(f, SQUARE), SQUARE, step)
        quantizer.revive_(f, SQUARE, NOISE, step)
    assert share() >= 0.95
    kept = (quantizer.embedding.weight[:128] == before[:128]).all(1).float().mean()
    assert kept > 0.5  # codes in use stay
    quantizer.embedding.weight.data.zero_()
    quantizer.init_(f, SQUARE, NOISE)
    assert share() >= 0.75


def test_a_start_gives_coarse_levels_their_share_of_codes():
    quantizer, f = make(size=100), features(SQUARE, batch=200) + 3 * torch.randn(200, 6, 1, 1)
    quantizer.init_(f, SQUARE, NOISE)
    first = quantizer.targets(f, SQUARE)[:, 0]
    same = (torch.cdist(quantizer.embedding.weight, first) < 1e-5).any(1).sum()
    assert same >= 12  # 20 expected; a draw from all vectors alike would take 1 or 2
