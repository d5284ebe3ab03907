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
    """Check 3. Fails for distances without |e|^2, and for cosines where distances are meant."""
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


def test_the_table_learns_from_the_codebook_term_alone():
    """Check 4. Fails where the term is taken on the straight-through output: then the table has no gradient at all."""
    quantizer, z = make(VQ), torch.randn(40, 8, requires_grad=True)
    out = quantizer(z)
    out.losses["vq"].backward()
    ids, table = out.tokens[:, 0], quantizer.embedding.weight.detach()
    wanted = torch.zeros_like(table).index_add_(0, ids, 2 / z.numel() * (table[ids] - z.detach()))
    assert wanted.abs().sum() > 0
    assert torch.allclose(quantizer.embedding.weight.grad, wanted, atol=1e-7)
    assert torch.allclose(z.grad, 0.25 * 2 / z.numel() * (z.detach() - table[ids]), atol=1e-7)


def test_a_table_looked_up_by_angle_learns_through_its_normalisation():
    """Check 4 for unit codes. Fails where the stored rows get the gradient of the unit ones."""
    quantizer, z = make(CosineVQ), torch.randn(40, 8)
    out = quantizer(z)
    out.losses["vq"].backward()
    ids, table, u = out.tokens[:, 0], quantizer.embedding.weight.detach(), unit(z)
    e, length = unit(table), table.norm(dim=1, keepdim=True)
    pull = torch.zeros_like(table).index_add_(0, ids, 2 / z.numel() * (e[ids] - u))
    wanted = (pull - (pull * e).sum(1, keepdim=True) * e) / length
    assert wanted.abs().sum() > 0
    assert torch.allclose(quantizer.embedding.weight.grad, wanted, atol=1e-7)
    assert (quantizer.embedding.weight.grad * table).sum(1).abs().max() < 1e-6  # lengths do not change


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


@pytest.mark.parametrize("kind", BOTH)
def test_the_entropy_term_is_part_of_the_loss_by_its_weight(kind):
    """Fails for the opposite sign, a temperature that is not used, and vectors or codes that are not normalised."""
    quantizer, plain, z = make(kind, entropy=0.3, temperature=0.5), make(kind), torch.randn(40, 8)
    out, table = quantizer(z), quantizer.embedding.weight
    x, table = (unit(z), unit(table)) if kind is CosineVQ else (z, table)
    p = (-torch.cdist(x, table).square() / 0.5).softmax(1)
    sample, batch = torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()
    assert torch.allclose(out.losses["entropy_sample"], sample, rtol=1e-4)
    assert torch.allclose(out.losses["entropy_batch"], batch, rtol=1e-3)  # 1e-5 inside its logarithm
    assert torch.allclose(out.losses["vq"], plain(z).losses["vq"] + 0.3 * (sample - batch), atol=1e-3)
    assert "entropy_sample" not in plain(z).losses


def test_the_entropy_term_spreads_the_choices():
    """Without it a fifth of the codes is used, with it four fifths. Fails for the opposite sign, or no gradient."""
    torch.manual_seed(0)
    z, found = torch.randn(512, 4) * 0.5 + torch.tensor([2.0, 0, 0, 0]), {}
    for weight in (0.0, 1.0):
        quantizer = VQ(VQConfig(size=64, width=4, entropy=weight, temperature=0.05))
        torch.nn.init.normal_(quantizer.embedding.weight, std=0.1)
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        for _ in range(100):
            optimizer.zero_grad()
            quantizer(z).losses["vq"].backward()
            optimizer.step()
        found[weight] = quantizer(z).stats["usage"]
    assert found[1.0] >= 0.65 and found[0.0] <= 0.4
