"""Finite scalar quantisation and the bins chosen after training."""

from itertools import pairwise

import pytest
import torch

from arvis.quant.bins import Bins, gaussian_bins, lloyd_bins, lloyd_max, uniform_bins
from arvis.quant.scalar import FSQ, FSQConfig


def test_values_and_ids_of_odd_and_even_levels():
    fsq = FSQ(FSQConfig(levels=(5, 4, 2)))
    extreme = fsq(torch.tensor([[9.0, 9, 9], [-9, -9, -9], [0, 0, 0]]))
    assert extreme.values.tolist() == [[1, 0.5, 0], [-1, -1, -1], [0, 0, 0]]
    assert extreme.tokens[:, 0].tolist() == [4 + 5 * 3 + 20 * 1, 0, 2 + 5 * 2 + 20 * 1]
    assert fsq.sizes == (40,) and extreme.losses == {}


def test_the_gradient_is_that_of_the_bounded_value():
    fsq, z = FSQ(FSQConfig(levels=(8, 5))), torch.randn(30, 2, requires_grad=True, dtype=torch.float64)
    g = torch.randn(30, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad((fsq(z).values * g).sum(), z)
    (wanted,) = torch.autograd.grad((fsq.bound(z) / torch.tensor([4, 2]) * g).sum(), z)
    assert torch.allclose(grad, wanted) and grad.abs().min() > 0


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (2, 2, 2, 2), (7, 5, 5, 5, 5)])
def test_all_codes_of_published_levels(levels):
    fsq = FSQ(FSQConfig(levels=levels))
    tokens = torch.arange(fsq.sizes[0])[:, None]
    assert torch.equal(fsq.encode(fsq.preimage(tokens)), tokens)
    assert len(fsq.codes(tokens).unique(dim=0)) == fsq.sizes[0]


def test_more_levels_than_rounding_allows_are_refused():
    """Fails silently otherwise: the outermost value of 1002 levels would round to one more."""
    with pytest.raises(ValueError, match="1002 levels round to one more"):
        FSQConfig(levels=(5, 1002))
    fsq = FSQ(FSQConfig(levels=(5, 1002), epsilon=1e-5))
    assert fsq(torch.tensor([[99.0, 99.0]])).tokens.item() == 5 * 1002 - 1


def test_uniform_bins_follow_their_formula():
    """Check 11. Fails for rounding to the nearest border, and for bins that are open on the wrong side."""
    bins, x = uniform_bins(64, -5, 5, 4), torch.randn(2000, 4) * 3
    step = 10 / 64
    ids = ((x.double() + 5) / step).floor().clamp(0, 63).long()
    assert torch.equal(bins.encode(x), ids)
    assert torch.equal(bins.encode(torch.zeros(1, 4)), torch.full((1, 4), 32))  # a border belongs to the bin above
    inside = (x.abs() < 5).all(1)
    assert (bins(x).values - x)[inside].abs().max() <= step / 2 + 1e-6
    assert torch.allclose(bins.codes(ids), (-5 + (ids + 0.5) * step).float())


def test_gaussian_bins_have_equal_mass_but_not_the_least_error():
    """Check 11. Fails for centres in the middle of a bin, or values that go by the edges of bins."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(200_000, generator=g).clamp(-3, 3)
    bins = gaussian_bins(64, -3, 3, 1)
    ids = bins.encode(u[:, None])[:, 0]
    mass = torch.bincount(ids, minlength=64) / len(u)
    assert (mass * 64 - 1).abs().max() < 0.2
    error = (bins.codes(ids[:, None])[:, 0] - u).square().mean().item()
    assert abs(error / 0.0027 - 1) < 0.05
    brute = (u[:1000, None] - bins.centres).abs().argmin(1)
    assert torch.equal(ids[:1000], brute)
    centres, errors = lloyd_max(u[:50_000], 64, iterations=60)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert abs(errors[-1] / 0.00053 - 1) < 0.05 and error > 4.5 * errors[-1]
    least = lloyd_bins(u[:50_000], 64, 1, iterations=60)
    assert torch.equal(least.centres, centres.float())
    assert abs((least(u[:50_000, None]).values[:, 0] - u[:50_000]).square().mean() / errors[-1] - 1) < 1e-3


def test_bins_of_least_error_find_separate_clusters_and_far_values():
    """Fails for centres that start where there is no data: they never move."""
    g = torch.Generator().manual_seed(0)
    near, far = torch.randn(2, 20_000, generator=g) * 0.1
    x = torch.cat((near - 3, far + 3, torch.tensor([50.0])))
    centres, errors = lloyd_max(x, 32, iterations=50)
    assert errors[-1] < 0.1**2 / 50 and (centres.diff() > 0).all() and centres[-1] == 50
    assert ((centres > -1) & (centres < 1)).sum() <= 1


def test_gaussian_bins_stretch_to_their_range():
    wide, plain, x = gaussian_bins(64, -5, 5, 1), gaussian_bins(64, -3, 3, 1), torch.randn(500, 1)
    assert torch.allclose(wide.centres, plain.centres * 5 / 3, atol=1e-6)
    assert torch.equal(wide.encode(x * 5 / 3), plain.encode(x))


def test_centres_must_ascend():
    with pytest.raises(ValueError, match="ascend"):
        Bins(torch.tensor([0.0, 2.0, 1.0]), 1)
