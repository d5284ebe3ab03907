"""Usage statistics of codebooks, and what revives dead codes."""

import torch

from arvis.noise import Noise
from arvis.quant.revive import pick, pull_, restart_
from arvis.quant.usage import (
    UsageRing,
    bits,
    count,
    dead,
    hit_decay,
    perplexity,
    update_hits_,
    used,
    used_by_average,
)
from arvis.quant.vq import nearest

NOISE = Noise.of(3)


def test_perplexity_of_uniform_constant_and_skewed_streams():
    assert torch.isclose(perplexity(count(torch.arange(640) % 64, 64)), torch.tensor(64.0))
    assert perplexity(count(torch.full((9, 9), 5), 64)).item() == 1
    assert torch.isclose(perplexity(torch.tensor([2.0, 1, 1, 0])), torch.tensor(2**1.5))
    assert torch.isclose(bits(torch.tensor([2.0, 1, 1, 0])), torch.tensor(1.5))
    assert used(torch.tensor([[2.0, 1, 1, 0], [0, 0, 1, 0]])).tolist() == [0.75, 0.25]


def test_the_ring_forgets_after_exactly_its_length():
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


def test_restart_revives_a_half_dead_table():
    table, average = half_dead(), torch.zeros(128)
    assert share_used(table) <= 0.55
    for step in range(20):
        z = fresh(step + 1)
        update_hits_(average, count(nearest(z, table), 128), step)
        gone = dead(average)
        n = restart_(table, gone, z, NOISE, step)
        assert n == gone.sum()
        average[gone] = average.mean()
    assert share_used(table) >= 0.95


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
