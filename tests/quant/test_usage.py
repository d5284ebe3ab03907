"""Usage statistics of codebooks, and what revives dead codes."""

import math

import pytest
import torch

from arvis.noise import Noise
from arvis.quant import VQ, VQConfig
from arvis.quant.revive import pick, pick_from_all, pull_, restart_, scarce_positions
from arvis.quant.usage import (
    UsageRing,
    bits,
    bits_per_pixel,
    count,
    dead,
    dead_positions,
    hit_decay,
    joint_bits,
    mutual_information,
    normalised_perplexity,
    perplexity,
    token_stats,
    update_hits_,
    used,
    used_by_average,
)
from arvis.quant.vq import nearest

NOISE = Noise.of(3)


def test_perplexity_of_uniform_constant_and_skewed_streams():
    """Check 12. Fails for entropies in bits, or a window that is not normalised."""
    assert torch.isclose(perplexity(count(torch.arange(640) % 64, 64)), torch.tensor(64.0))
    assert perplexity(count(torch.full((9, 9), 5), 64)).item() == 1
    assert torch.isclose(perplexity(torch.tensor([2.0, 1, 1, 0])), torch.tensor(2**1.5))
    assert torch.isclose(bits(torch.tensor([2.0, 1, 1, 0])), torch.tensor(1.5))
    assert used(torch.tensor([[2.0, 1, 1, 0], [0, 0, 1, 0]])).tolist() == [0.75, 0.25]
    assert torch.isclose(normalised_perplexity(torch.tensor([2.0, 1, 1, 0])), torch.tensor(2**1.5 / 4))
    assert bits_per_pixel(torch.tensor(12.0), 256, 256 * 256) == 12 / 256


def test_perplexity_is_that_of_a_window():
    """The mean of per-batch perplexities is another, smaller number. Fails where the two are the same."""
    batches = torch.arange(512).view(8, 64)
    window = perplexity(sum(count(batch, 512) for batch in batches))
    assert torch.isclose(window, torch.tensor(512.0))
    assert torch.isclose(torch.stack([perplexity(count(batch, 512)) for batch in batches]).mean(), torch.tensor(64.0))


@pytest.mark.parametrize("sizes", [(7,), (7, 3), (2,) * 9, (2**40,), (2**21, 5)])
def test_stats_of_ids(sizes):
    """Fails for sub-tokens that share a table, and for alphabets too large for one."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(min(size, 4), (5, 60), generator=g) * (size // 4 or 1) for size in sizes], -1)
    tokens = tokens.clamp_max(torch.tensor(sizes) - 1)
    stats = token_stats(tokens, sizes)
    assert stats["usage"].shape == stats["perplexity"].shape == ((len(sizes),) if len(sizes) > 1 else ())
    for s, size in enumerate(sizes):
        n = tokens[..., s].unique(return_counts=True)[1].double()
        assert torch.isclose(stats["usage"].reshape(-1)[s].double(), torch.tensor(len(n) / size).double())
        entropy = -(n / n.sum() * (n / n.sum()).log()).sum()
        assert torch.isclose(stats["perplexity"].reshape(-1)[s].double(), entropy.exp(), rtol=1e-5)


def test_what_sub_tokens_say_about_each_other():
    """Fails for joint entropies of pooled sub-tokens, and for information in nats."""
    a = torch.arange(4096) % 8
    b = torch.arange(4096) // 8 % 4
    assert torch.isclose(joint_bits(torch.stack((a, b), -1)), torch.tensor(5.0))
    assert torch.isclose(mutual_information(a, b), torch.tensor(0.0), atol=1e-5)
    assert torch.isclose(mutual_information(a, a // 2), torch.tensor(2.0))
    assert torch.isclose(mutual_information(a.view(64, 64), a.view(64, 64)), torch.tensor(3.0))
    noisy = torch.where(torch.arange(4096) % 16 < 8, a, torch.randint(8, (4096,)))
    assert 0.5 < mutual_information(a, noisy) < 2
    g = torch.Generator().manual_seed(0)
    apart = mutual_information(*(torch.randint(16, (4000,), generator=g) for _ in range(2)))
    assert 0.3 < apart / (16 * 16 / (2 * math.log(2) * 4000)) < 1.7  # the bias that the docstring states
    deep = torch.stack([a, b, a // 4, torch.full_like(a, 2**40)], -1).view(2, 2048, 4)
    assert torch.isclose(joint_bits(deep), torch.tensor(5.0))


def test_positions_that_never_vary_are_dead():
    """Fails for a deviation over positions where that over the batch is meant."""
    tokens = torch.arange(40).view(4, 10)
    tokens[:, [2, 5, 9]] = 7
    assert dead_positions(tokens).item() == pytest.approx(0.3)
    assert dead_positions(tokens[..., None]).item() == pytest.approx(0.3)
    assert dead_positions(torch.arange(10).expand(3, 10)) == 1
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        dead_positions(tokens[:1])


def test_the_ring_forgets_after_exactly_its_length():
    """Check 12. Fails for a ring one place too long or too short."""
    ring = UsageRing()
    assert ring.hits(8)[0] == 65536  # empty places count as id 0
    ring.add_(torch.full((3, 5), 7))
    ring.add_(torch.ones(65536 - 16, dtype=torch.int64))
    assert ring.hits(8).tolist() == [1, 65520, 0, 0, 0, 0, 0, 15]
    ring.add_(torch.tensor([2]))
    ring.add_(torch.tensor([2]))  # takes the place of the first 7
    assert ring.hits(8).tolist() == [0, 65520, 2, 0, 0, 0, 0, 14]
    ring.add_(torch.arange(70000) % 8)
    assert ring.hits(8).sum() == 65536 and ring.hits(8).min() == 65536 // 8
    assert used(ring.hits(16)) == 0.5
    again = UsageRing()
    again.load_state_dict(ring.state_dict())
    assert torch.equal(again.ring, ring.ring)


def test_the_average_of_hits():
    average, hits = torch.zeros(2, 3), torch.tensor([[4.0, 0, 0], [0, 2, 2]])
    update_hits_(average, hits, 0)
    assert torch.equal(average, hits)
    update_hits_(average, torch.zeros(2, 3), 1)
    assert torch.allclose(average, 0.9 * hits)
    update_hits_(average, torch.zeros(2, 3), 100)
    assert torch.allclose(average, 0.9 * 0.99 * hits)
    assert [hit_decay(n) for n in (0, 1, 99, 100)] == [0.0, 0.9, 0.9, 0.99]
    assert torch.allclose(used_by_average(torch.tensor([[8.0, 8, 8, 0.4], [1, 1, 1, 0.1]])), torch.tensor([0.75, 1.0]))
    assert dead(torch.tensor([1.0, 1, 0.01, 0]), 0.05).tolist() == [False, False, True, True]


def test_pick_draws_without_replacement_and_obeys_weights():
    vectors = torch.arange(50.0)[:, None]
    drawn = pick(vectors, 50, NOISE, 0)[:, 0]
    assert torch.equal(drawn.sort().values, torch.arange(50.0)) and not torch.equal(drawn, torch.arange(50.0))
    assert torch.equal(drawn, pick(vectors, 50, NOISE, 0)[:, 0])
    assert not torch.equal(drawn, pick(vectors, 50, NOISE, 1)[:, 0])
    assert len(pick(vectors, 70, NOISE, 0)) == 70
    weight = torch.where(torch.arange(50) < 10, 1.0, 0.0)
    assert pick(vectors, 10, NOISE, 0, weight).max() < 10
    assert torch.equal(pick_from_all(vectors, 20, NOISE, 0), drawn[:20, None])  # one process: its own vectors are all
    ones = sum(int(pick(torch.arange(2.0)[:, None], 1, NOISE, at, torch.tensor([1.0, 3.0]))) for at in range(400))
    assert 270 <= ones <= 330  # three quarters, within three and a half standard deviations


def fresh(seed, n=4096):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def half_dead(size=128):
    table = fresh(0, size) * 0.8
    table[size // 2 :] += 100
    return table


def share_used(table):
    return used(count(nearest(fresh(999, 40000), table), len(table))).item()


@pytest.mark.parametrize("restarts", [True, False])
def test_restarts_revive_a_half_dead_table(restarts):
    """Check 13, while the table is trained. Fails for restarts of codes in use, or to places far from any vector."""
    torch.manual_seed(0)
    quantizer, average = VQ(VQConfig(size=128, width=8)), torch.zeros(128)
    quantizer.embedding.weight.data.copy_(half_dead())
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    for step in range(20):
        z = fresh(step + 1)
        out = quantizer(z)
        optimizer.zero_grad()
        out.losses["vq"].backward()
        optimizer.step()
        update_hits_(average, count(out.tokens, 128), step)
        gone = dead(average)
        if restarts:
            assert restart_(quantizer.embedding.weight, gone, z, NOISE, step) == gone.sum()
            average[gone] = average.mean()
    share = share_used(quantizer.embedding.weight.detach())
    assert share >= 0.95 if restarts else share <= 0.55


def test_scarce_positions_get_new_codes():
    """Check 15d. Fails for the perplexity where its inverse is meant: then rich positions would get richer."""
    hits = torch.zeros(4, 64)
    hits[0, :1], hits[1, :4], hits[2, :16], hits[3, :64] = 64.0, 16.0, 4.0, 1.0
    weight = scarce_positions(hits)
    wanted = (10 * torch.tensor([1, 1 / 4, 1 / 16, 1 / 64])).softmax(0)
    assert torch.allclose(weight, wanted)
    vectors = torch.arange(4.0)[:, None].repeat(25, 1)  # 25 pictures of four positions
    drawn = pick(vectors, 10, NOISE, 0, weight.repeat(25))
    assert (drawn == 0).sum() >= 9


def test_pulling_codes_to_data_revives_them_too():
    table, frequency = half_dead(), torch.zeros(128)
    alive = table[0].clone()
    for step in range(20):
        z = fresh(step + 1)
        frequency.lerp_(count(nearest(z, table), 128) / len(z), 0.01)
        pull_(table, frequency, z)
    # Codes in one place far away go to the same nearest vectors, so not all find a cell of their own.
    assert share_used(table) >= 0.65 and table.abs().max() < 10
    assert (table[0] - alive).norm() < 3  # codes in use stay in their region
