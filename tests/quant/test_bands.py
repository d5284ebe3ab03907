"""Frequency bands as targets: they cut the plane of frequencies, sum to the map, are orthogonal, and the levels that
code them telescope."""

import pytest
import torch
import torch.nn.functional as F

from arvis.quant import MultiScaleVQ, MultiScaleVQConfig
from arvis.quant.bands import BandTarget, band, edges, low_pass, rings, squares
from arvis.quant.multiscale import area_target, residual_encode, to_map, to_rows
from arvis.tokens import Layout, pyramid

OFFICIAL = pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LAYOUTS = [OFFICIAL, pyramid((1, 2, 4, 7)), Layout(((1, 1), (2, 3), (3, 5), (4, 9))), pyramid((3,))]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.levels[-1]}")


def maps(layout, batch=3, channels=6, dtype=torch.float32):
    return torch.randn(batch, channels, *layout.levels[-1], generator=torch.Generator().manual_seed(1)).to(dtype)


def quantizer(layout, target, **settings):
    torch.manual_seed(0)
    out = MultiScaleVQ(MultiScaleVQConfig(size=50, width=6, levels=layout.K, **settings), target)
    torch.nn.init.normal_(out.embedding.weight, std=0.5)
    return out


def everything_first(layout):
    return torch.zeros_like(rings(layout))


# -- the bands ------------------------------------------------------------------------------------------------------


@layouts
def test_edges_grow_by_the_share_of_the_positions(layout):
    sigma = edges(layout)
    widths = sigma.diff(prepend=sigma.new_zeros(1))
    torch.testing.assert_close(widths / sigma[-1], torch.tensor(layout.sizes, dtype=torch.float64) / layout.n)
    h, w = layout.levels[-1]
    assert float(sigma[-1]) == pytest.approx(((h // 2) ** 2 + (w // 2) ** 2) ** 0.5)


@layouts
def test_rings_cut_the_plane_by_the_distance_from_zero_whatever_the_sign(layout):
    h, w = layout.levels[-1]
    found, sigma = rings(layout), edges(layout)
    assert found[0, 0] == 0 and found.max() <= layout.K - 1 and found.dtype == torch.int64
    order = squares(layout).flatten().argsort()
    assert (found.flatten()[order].diff() >= 0).all()
    for y in range(h):
        for x in range(w // 2 + 1):
            r = (min(y, h - y) ** 2 + x**2) ** 0.5
            below = [k for k in range(layout.K) if r < float(sigma[k]) - 1e-12]
            assert found[y, x] == (below[0] if below else layout.K - 1)


def test_the_official_grid_has_bands_without_any_frequency():
    counts = rings(OFFICIAL).flatten().bincount(minlength=OFFICIAL.K)
    assert counts[0] == 1 and counts[1:5].sum() == 0 and (counts[5:] > 0).all()


@layouts
def test_bands_are_those_of_the_whole_complex_plane_and_real(layout):
    h, w = layout.levels[-1]
    f = maps(layout, dtype=torch.float64)
    y, x = torch.fft.fftfreq(h, 1 / h).double(), torch.fft.fftfreq(w, 1 / w).double()
    r = (y[:, None].square() + x.square()).sqrt()
    sigma = edges(layout)
    index = torch.searchsorted((sigma[:-1] - 1e-9).contiguous(), r, right=True)
    for k in range(layout.K):
        part = torch.fft.ifft2(torch.fft.fft2(f) * (index == k))
        assert part.imag.abs().max() <= 1e-12
        torch.testing.assert_close(band(f, k, layout), part.real, atol=1e-12, rtol=0)


@layouts
def test_bands_sum_to_the_map_and_are_orthogonal(layout):
    f = maps(layout)
    parts = [band(f, k, layout) for k in range(layout.K)]
    torch.testing.assert_close(torch.stack(parts).sum(0), f, atol=1e-5, rtol=0)
    energy = torch.stack([p.double().square().sum() for p in parts])
    assert energy.sum().item() == pytest.approx(f.double().square().sum().item(), rel=1e-5)
    for i in range(layout.K):
        for j in range(i):
            assert abs(float((parts[i].double() * parts[j].double()).sum())) < 1e-4 * float(energy.sum())
    assert low_pass(f, layout.K - 1, layout) is f


def test_low_passes_of_autocast_are_whole():
    f = maps(OFFICIAL)
    with torch.autocast("cpu", torch.bfloat16):
        inside = low_pass(f.bfloat16(), 6, OFFICIAL)
    assert inside.dtype == torch.float32 and torch.equal(inside, low_pass(f.bfloat16().float(), 6, OFFICIAL))


# -- the recursion --------------------------------------------------------------------------------------------------


@layouts
def test_the_target_is_the_recursion_of_the_paper(layout):
    f, own = maps(layout, dtype=torch.float64), quantizer(layout, BandTarget(), ratio=0.5).double()
    tokens, rest = own.encode(f, layout), torch.zeros_like(f)
    for k in range(layout.K):  # R_0 = 0; g = R + band; q = nearest(down(g)); R = g - up(q)
        g = rest + band(f, k, layout)
        v = to_rows(F.interpolate(g, size=layout.levels[k], mode="area"))
        ids = torch.cdist(v, own.embedding.weight.expand(len(v), -1, -1)).argmin(-1)
        assert torch.equal(ids, tokens[:, layout.span(k), 0])
        rest = g - own.spread(own.embedding(ids), k, layout)
    parts = [own.spread(own.embedding(tokens[:, layout.span(k), 0]), k, layout) for k in range(layout.K)]
    torch.testing.assert_close(torch.stack(parts).sum(0) + rest, f, atol=1e-12, rtol=0)


@layouts
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_the_codes_the_sum_and_the_rest_are_the_map(layout, seed):
    f, own = maps(layout), quantizer(layout, BandTarget())
    noise = torch.Generator().manual_seed(seed)
    seen = []

    def code(z, k):
        seen.append(torch.randn(z.shape, generator=noise))
        return seen[-1]

    total, rest = torch.zeros_like(f), f
    for k, (z, h) in enumerate(residual_encode(f, code, own.spread, layout, BandTarget())):
        goal = to_rows(area_target(low_pass(f, k, layout) - total, f, k, layout))
        torch.testing.assert_close(z, goal, atol=2e-5, rtol=0)
        total, rest = total + h, rest - h
    torch.testing.assert_close(total + rest, f, atol=1e-5, rtol=0)


def test_codes_of_nothing_leave_each_level_its_low_pass():
    f = maps(OFFICIAL)
    for k, (z, _) in enumerate(
        residual_encode(
            f, lambda z, k: torch.zeros_like(z), quantizer(OFFICIAL, BandTarget()).spread, OFFICIAL, BandTarget()
        )
    ):
        bias = to_map(z, OFFICIAL.levels[k])
        assert bias.isfinite().all()


def test_a_constant_map_is_coded_by_the_first_level():
    layout = OFFICIAL
    own = quantizer(layout, BandTarget(), ratio=0.0)
    own.embedding.weight.data[7], own.embedding.weight.data[3] = torch.arange(6).float(), 0.0
    f = torch.arange(6).float()[None, :, None, None].expand(2, -1, 16, 16)
    tokens = own.encode(f, layout)[..., 0]
    assert tokens[:, 0].eq(7).all() and tokens[:, 1:].eq(3).all()
    assert own.targets(f, layout)[:, 1:].abs().max() < 1e-5


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_with_all_frequencies_in_the_first_band_it_is_the_quantiser_over_areas(ratio):
    f = maps(OFFICIAL)
    whole = quantizer(OFFICIAL, BandTarget(everything_first), ratio=ratio).encode(f, OFFICIAL)
    areas = quantizer(OFFICIAL, area_target, ratio=ratio).encode(f, OFFICIAL)
    cut = quantizer(OFFICIAL, BandTarget(), ratio=ratio).encode(f, OFFICIAL)
    assert torch.equal(whole, areas) and not torch.equal(cut, areas)


def test_high_frequencies_are_unknown_to_the_coarse_levels():
    """A target that ignores the masks fails here: its coarse levels alias what they cannot show."""
    f = maps(OFFICIAL)
    k = 6
    high = f - low_pass(f, k, OFFICIAL)
    own, areas = (quantizer(OFFICIAL, target) for target in (BandTarget(), area_target))
    coarse = slice(0, OFFICIAL.offsets[k + 1])
    assert torch.equal(own.encode(f, OFFICIAL)[:, coarse], own.encode(f - 0.9 * high, OFFICIAL)[:, coarse])
    assert not torch.equal(areas.encode(f, OFFICIAL)[:, coarse], areas.encode(f - 0.9 * high, OFFICIAL)[:, coarse])
