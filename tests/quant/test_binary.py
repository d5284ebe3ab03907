"""Lookup-free and spherical quantisation, and the entropies that train them."""

import math

import pytest
import torch

from arvis.quant.entropy import (
    bit_entropies,
    bit_table,
    choice_entropies,
    distance_entropies,
    joint_bit_entropies,
)
from arvis.quant.lookup_free import LFQ, LFQConfig, pack_bits, unpack_bits
from arvis.quant.sphere import BSQ, BSQConfig


def test_bits_pack_in_both_orders():
    bits = torch.tensor([[1, 0, 0], [0, 0, 1]])
    assert pack_bits(bits)[:, 0].tolist() == [4, 1]
    assert pack_bits(bits, little_endian=True)[:, 0].tolist() == [1, 4]
    ids = torch.arange(2**10)[:, None]
    for little in (False, True):
        assert torch.equal(pack_bits(unpack_bits(ids, 10, little), little), ids)
    assert torch.equal(bit_table(3), unpack_bits(torch.arange(8)[:, None], 3))
    with pytest.raises(ValueError, match="keep the bits"):
        pack_bits(torch.zeros(1, 63, dtype=torch.int64))


def test_zero_is_minus():
    assert LFQ(LFQConfig(bits=2)).codes(LFQ(LFQConfig(bits=2)).encode(torch.tensor([[0.0, 1.0]]))).tolist() == [[-1, 1]]
    assert BSQ(BSQConfig(bits=2)).encode(torch.tensor([[0.0, 1.0]])).tolist() == [[0, 1]]


def test_entropies_equal_those_of_the_softmax_over_all_codes():
    """Check 9. Fails for logits without the factor of two, means of bits where sums are meant, and bits for nats."""
    torch.manual_seed(0)
    z, tau, d = torch.randn(200, 8, dtype=torch.float64) * 0.3, 3.0, 8
    codes = bit_table(d).double() * 2 - 1
    p = (2 * tau * z @ codes.T).softmax(1)
    sample, batch = torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()
    whole = joint_bit_entropies(4 * tau * z, d)
    assert torch.allclose(whole.sample, sample, atol=1e-9) and torch.allclose(whole.batch, batch, atol=1e-9)
    halves, bits = joint_bit_entropies(4 * tau * z, 4), bit_entropies(4 * tau * z)
    assert torch.allclose(bits.sample, sample, atol=1e-9)
    assert batch <= halves.batch <= bits.batch  # coarser and coarser upper bounds
    certain = bit_entropies(torch.full((3, 4), 500.0))
    assert certain.sample == 0 and certain.batch == 0


def test_gradients_stay_finite_where_bits_are_certain():
    z = (torch.randn(50, 6) * 9).requires_grad_()
    for quantizer in (LFQ(LFQConfig(bits=6)), BSQ(BSQConfig(bits=6))):
        (grad,) = torch.autograd.grad(quantizer(z).losses["vq"], z)
        assert torch.isfinite(grad).all() and grad.any()


def test_a_floor_lies_under_probabilities_in_logarithms_alone():
    """Fails where the probabilities themselves are raised, or only one of the two entropies has the floor."""
    torch.manual_seed(0)
    z = torch.randn(200, 6, dtype=torch.float64)
    p = (z @ (bit_table(6).double() * 2 - 1).T).softmax(1)
    sample, batch = (-(q * q.clamp_min(0.01).log()).sum(-1).mean() for q in (p, p.mean(0)))
    got = joint_bit_entropies(2 * z, 6, floor=0.01)
    assert torch.allclose(got.sample, sample) and torch.allclose(got.batch, batch)
    exact, tiny = joint_bit_entropies(2 * z, 6), joint_bit_entropies(2 * z, 6, floor=1e-12)
    assert torch.allclose(exact.sample, tiny.sample) and not torch.allclose(exact.sample, got.sample, atol=1e-3)
    losses = LFQ(LFQConfig(bits=6, floor=0.01, group=6, inverse_temperature=0.5))(z).losses
    assert torch.allclose(losses["entropy_sample"], sample) and torch.allclose(losses["entropy_batch"], batch)


def test_eighteen_bits_are_two_groups_of_nine():
    """Fails where the batch entropy of groups is a mean, or groups share the codes of one."""
    torch.manual_seed(0)
    z = torch.randn(300, 18, dtype=torch.float64)
    whole = joint_bit_entropies(z, 9)
    halves = [joint_bit_entropies(part, 9) for part in z.split(9, 1)]
    assert torch.allclose(whole.batch, halves[0].batch + halves[1].batch)
    assert torch.allclose(whole.sample, halves[0].sample + halves[1].sample)
    single = [
        torch.special.entr((part @ (bit_table(9).double() * 2 - 1).T / 2).softmax(1).mean(0)).sum()
        for part in z.split(9, 1)
    ]
    assert torch.allclose(whole.batch, sum(single))
    losses = LFQ(LFQConfig(bits=18, group=9))(z).losses
    logits = 4 * 100 * z
    assert torch.allclose(losses["entropy_batch"], joint_bit_entropies(logits, 9).batch)


def test_the_lookup_free_loss_decides_and_balances_bits():
    """Check 9. Fails for the opposite sign of either term."""
    torch.manual_seed(0)
    data = torch.randn(512, 4) * 0.5 + 0.4
    shift, gain = torch.zeros(4, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    quantizer = LFQ(LFQConfig(bits=4, commit=0.0, inverse_temperature=1.0))
    optimizer = torch.optim.Adam([shift, gain], lr=0.02)
    before = (data > 0).float().mean(0)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer((data + shift) * gain).losses["vq"].backward()
        optimizer.step()
    after = quantizer((data + shift) * gain).stats["bit_mean"]
    assert (before - 0.5).abs().min() > 0.2
    assert (after - 0.5).abs().max() < 0.05
    assert gain > 1  # decided: larger values


def test_lookup_free_terms_add_up():
    quantizer, z = LFQ(LFQConfig(bits=6, entropy=0.2, diversity=0.5, commit=0.3)), torch.randn(30, 6)
    losses = quantizer(z).losses
    total = 0.2 * (losses["entropy_sample"] - 0.5 * losses["entropy_batch"]) + 0.3 * losses["commit"]
    assert torch.allclose(losses["vq"], total)
    assert torch.allclose(losses["commit"], (z.abs() - 1).square().mean())


def test_spherical_codes():
    """Check 10. Fails for codes of another length, signs of something else than the vector, or no normalisation."""
    torch.manual_seed(0)
    d = 16
    quantizer, z = BSQ(BSQConfig(bits=d)), torch.randn(60_000, d)
    u, q = z / z.norm(dim=1, keepdim=True), quantizer(z).values
    assert torch.allclose(q.norm(dim=1), torch.ones(len(q)), atol=1e-6)
    cosine = (u * q).sum(1)
    assert torch.allclose(cosine, u.abs().mean(1) * d**0.5, atol=1e-6)
    wanted = d**0.5 * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert abs(wanted - 0.8104) < 1e-3 and abs(cosine.mean() / wanted - 1) < 0.01
    assert torch.allclose((u - q).square().sum(1).mean(), 2 - 2 * cosine.mean(), atol=1e-5)
    assert (u - q).norm(dim=1).max() < 2
    assert torch.equal(quantizer.encode(z), quantizer.encode(z * 1e-3))


def test_spherical_terms_add_up():
    config = BSQConfig(bits=6, entropy=0.2, decision=0.7, diversity=0.5, commit=0.3)
    losses = BSQ(config)(torch.randn(30, 6)).losses
    entropy = 0.7 * losses["entropy_sample"] - 0.5 * losses["entropy_batch"]
    assert torch.allclose(losses["vq"], 0.2 / 100 * entropy + 0.3 * losses["commit"])


def test_spherical_entropies_are_those_of_the_softmax_over_all_codes():
    """Fails for logits without 1 / sqrt(d), which the length of the codes brings."""
    torch.manual_seed(0)
    z, tau = torch.randn(100, 6, dtype=torch.float64), 3.0
    u, codes = z / z.norm(dim=1, keepdim=True), (bit_table(6).double() * 2 - 1) * 6**-0.5
    p = (2 * tau * u @ codes.T).softmax(1)
    losses = BSQ(BSQConfig(bits=6, inverse_temperature=tau))(z).losses
    assert torch.allclose(losses["entropy_sample"], torch.special.entr(p).sum(1).mean())
    plus = p @ bit_table(6).double()  # the probability of each bit
    each = torch.special.entr(torch.stack((plus.mean(0), 1 - plus.mean(0)))).sum()
    assert torch.allclose(losses["entropy_batch"], each) and each >= torch.special.entr(p.mean(0)).sum()


def test_distance_entropies():
    """Fails for the distance instead of its square, a temperature that multiplies, or base-two logarithms."""
    table = torch.eye(4)
    spread = distance_entropies(torch.eye(4), table)
    assert spread.sample < 1e-3 and abs(spread.batch - math.log(4)) < 1e-3
    same = distance_entropies(torch.eye(4)[:1].expand(9, 4), table)
    assert same.batch.abs() < 1e-3
    torn = distance_entropies(torch.ones(2, 4), table)
    assert abs(torn.sample - math.log(4)) < 1e-4
    z, table = torch.randn(50, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    p = (-torch.cdist(z, table).square() / 0.7).softmax(1)
    got = distance_entropies(z, table, 0.7)
    assert torch.allclose(got.sample, torch.special.entr(p).sum(1).mean())
    assert torch.allclose(got.batch, -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum())
    wide = choice_entropies(torch.cdist(z, table).square(), 0.7, epsilon=0.1)
    assert torch.allclose(wide.batch, -(p.mean(0) * (p.mean(0) + 0.1).log()).sum())
