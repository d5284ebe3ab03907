"""Nearest code, straight-through gradients and losses of the two table quantisers."""

import pytest
import torch
import torch.nn.functional as F

from arvis.quant import VQ, CosineVQ, VQConfig, nearest, nearest_cosine
from arvis.quant.vq import unit

BOTH = (VQ, CosineVQ)


def make(kind, size=64, width=8, **settings):
    torch.manual_seed(0)
    quantizer = kind(VQConfig(size=size, width=width, **settings))
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_nearest_is_the_brute_force_argmin_in_float64():
    g = torch.Generator().manual_seed(1)
    z, table = torch.randn(500, 16, generator=g), torch.randn(300, 16, generator=g)
    squared = torch.cdist(z.double(), table.double()).square()
    best = squared.topk(2, largest=False)
    clear = best.values[:, 1] - best.values[:, 0] > 1e-6
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest(z, table)[clear], best.indices[clear, 0])
    cosine = unit(z.double()) @ unit(table.double()).T
    assert torch.equal(nearest_cosine(z, table), cosine.argmax(1))
    assert not torch.equal(nearest(z, table), nearest_cosine(z, table))


def test_nearest_in_small_chunks_is_the_same():
    z, table = torch.randn(3, 7, 11, 4), torch.randn(50, 4)
    whole = nearest(z, table)
    assert whole.shape == (3, 7, 11)
    assert torch.equal(whole, nearest(z, table, chunk=50))  # one vector at a time
    assert torch.equal(whole, nearest(z, table, chunk=333))


def test_ties_go_to_the_lowest_id():
    table = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.9]]), table).tolist() == [1, 1, 2]


def test_distances_stay_in_float32_under_autocast():
    # In bfloat16 256 and 256.5 are the same number.
    z, table = torch.tensor([[256.5, 0.0]]), torch.tensor([[256.0, 0.0], [256.5, 0.0], [257.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(z, table).item() == 1
        assert VQ(VQConfig(size=4, width=2))(z.bfloat16()).values.dtype == torch.float32


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"width 3 .* width 4"):
        nearest(torch.randn(2, 3), torch.randn(5, 4))


@pytest.mark.parametrize("kind", BOTH)
def test_all_ids_make_the_round_trip_and_quantising_twice_changes_nothing(kind):
    quantizer = make(kind)
    ids = torch.arange(64)[:, None]
    codes = quantizer.codes(ids)
    assert torch.equal(quantizer.encode(codes), ids)
    once = quantizer(torch.randn(5, 9, 8))
    twice = quantizer(once.values)
    assert once.tokens.shape == (5, 9, 1) and once.tokens.dtype == torch.int64
    assert torch.equal(once.tokens, twice.tokens)
    assert torch.allclose(once.values, twice.values, atol=1e-6)
    assert torch.allclose(once.values, quantizer.codes(once.tokens), atol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_the_gradient_goes_straight_through(kind):
    quantizer, z, g = make(kind), torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    (grad,) = torch.autograd.grad((quantizer(z).values * g).sum(), z)
    u = unit(z)
    projected = (g - (g * u).sum(1, keepdim=True) * u) / z.norm(dim=1, keepdim=True)
    assert torch.allclose(grad, projected if kind is CosineVQ else g, atol=1e-5)


def test_the_table_learns_from_the_codebook_term_alone():
    quantizer, z = make(VQ), torch.randn(40, 8, requires_grad=True)
    out = quantizer(z)
    out.losses["vq"].backward()
    ids, table = out.tokens[:, 0], quantizer.embedding.weight.detach()
    wanted = torch.zeros_like(table).index_add_(0, ids, 2 / z.numel() * (table[ids] - z.detach()))
    assert torch.allclose(quantizer.embedding.weight.grad, wanted, atol=1e-7)  # nothing if taken after straight-through
    assert torch.allclose(z.grad, 0.25 * 2 / z.numel() * (z.detach() - table[ids]), atol=1e-7)


def test_losses_are_means_over_elements_and_the_old_switch_swaps_beta():
    z = torch.randn(40, 8)
    new, old = make(VQ, beta=0.25)(z), make(VQ, beta=0.25, legacy_beta=True)(z)
    error = F.mse_loss(z, new.values)
    assert torch.allclose(new.losses["vq"], 1.25 * error) and torch.allclose(old.losses["vq"], 1.25 * error)
    quantizer = make(VQ, beta=0.25, legacy_beta=True)
    z = z.requires_grad_()
    quantizer(z).losses["vq"].backward()
    assert torch.allclose(z.grad, 2 / z.numel() * (z.detach() - new.values), atol=1e-6)


def test_cosine_values_are_unit_and_the_table_is_left_alone():
    quantizer, z = make(CosineVQ), torch.randn(30, 8) * 7
    before = quantizer.embedding.weight.clone()
    out = quantizer(z)
    assert torch.allclose(out.values.norm(dim=1), torch.ones(30), atol=1e-6)
    assert out.losses["codebook"] * 8 <= 4  # a squared distance of unit vectors
    assert torch.equal(before, quantizer.embedding.weight)
    assert torch.equal(out.tokens, quantizer.encode(z * 0.01))  # length does not matter
