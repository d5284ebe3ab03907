"""The noise is uniform, independent between uses, steps, items and places, and depends on nothing but its key."""

from __future__ import annotations

import itertools

import pytest
import torch

from arvis.noise import Noise, Recorded, truncated
from chance import chi_square, kolmogorov_smirnov

MANY = 40_000


def test_the_numbers_are_these_for_ever() -> None:
    """A change of the hash would silently change every picture of every seed."""
    noise = Noise.of(2024, 2)
    assert noise.seed_B.tolist() == [-7971537822717583433, 3658484137493642868]
    assert noise.uniform("draw", 3, (2,)).tolist() == [
        [0.3895062576699463, 0.8138393174791211],
        [0.8366158972088723, 0.11943545007785816],
    ]
    normal = noise.normal("solver", torch.tensor([0, 7]), (1,)).flatten().tolist()
    assert normal == pytest.approx([-0.16633018293117607, -0.7492235162824347], rel=1e-14)
    assert Noise(torch.tensor([0])).bits("", 0, (1,)).tolist() == [[9010439938664417252]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: Noise.of(1).uniform("draw", 0, (MANY,))[0],
        lambda: Noise.of(1, MANY).uniform("draw", 0, ()),
        lambda: Noise(torch.arange(MANY)).uniform("draw", 0, (1,))[:, 0],
        lambda: Noise(torch.arange(MANY) << 32).uniform("draw", 0, (1,))[:, 0],
        lambda: Noise(torch.zeros(MANY, dtype=torch.int64)).uniform("draw", torch.arange(MANY), (1,))[:, 0],
        lambda: torch.cat([Noise.of(s).uniform("draw", 0, (4,))[0] for s in range(MANY // 16)]),
        lambda: torch.cat([Noise.of(0).uniform(f"use {s}", 0, (4,))[0] for s in range(MANY // 16)]),
        lambda: Noise.of(5).take(torch.zeros(MANY // 10, dtype=torch.int64)).uniform("draw", 0, ()),
    ],
    ids=["index", "item", "seed", "high seed bits", "step", "seeds of seeds", "use", "copies"],
)
def test_uniform_along_every_coordinate(draw) -> None:
    u = draw()
    assert u.dtype == torch.float64 and bool((u > 0).all()) and bool((u < 1).all())
    assert kolmogorov_smirnov(u, u) > 0.01
    assert chi_square(torch.bincount((u * 64).long(), minlength=64), torch.ones(64)) > 0.01
    low = (u * 2**52).long() & 63  # the low bits are as good as the high ones
    assert chi_square(torch.bincount(low, minlength=64), torch.ones(64)) > 0.01
    pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()  # neighbours are independent
    assert chi_square(torch.bincount(pairs[::2], minlength=64), torch.ones(64)) > 0.01


def test_normal() -> None:
    x = Noise.of(3, 50).normal("solver", 2, (20, 40)).flatten()
    assert kolmogorov_smirnov(x, torch.special.ndtr(x)) > 0.01
    assert bool(x.isfinite().all())


def test_uses_steps_items_and_places_are_independent() -> None:
    noise = Noise.of(9, 2)
    base = noise.uniform("draw", 0, (2, MANY // 2))
    others = {
        "use": noise.uniform("accept", 0, (2, MANY // 2)),
        "step": noise.uniform("draw", 1, (2, MANY // 2)),
        "item": base.flip(0),
        "place": base.flip(1),
        "normal": torch.special.ndtr(noise.normal("draw", 0, (2, MANY // 2))),
    }
    for (name, a), (other, b) in itertools.combinations({"base": base, **others}.items(), 2):
        cells = (a * 8).long() * 8 + (b * 8).long()
        p = chi_square(torch.bincount(cells[0].flatten(), minlength=64), torch.ones(64))
        assert p > 1e-3, (name, other, p)


def test_an_item_is_the_same_in_any_batch() -> None:
    noise, rows = Noise.of(4, 5), torch.tensor([3, 1, 4])
    steps = torch.tensor([7, 0, 2, 5, 1])
    whole = noise.uniform("draw", steps, (3, 2))
    assert torch.equal(noise.take(rows).uniform("draw", steps[rows], (3, 2)), whole[rows])
    assert torch.equal(Noise(noise.seed_B[2:3]).uniform("draw", 2, (3, 2)), whole[2:3])
    assert torch.equal(Noise.of(4, 9).uniform("draw", 2, (3, 2))[2], whole[2])
    assert torch.equal(noise.uniform("draw", 2, (6,))[2], whole[2].flatten())
    assert torch.equal(noise.uniform("draw", 2, (9,))[2, :6], whole[2].flatten())  # longer draws begin with shorter


def test_copies_are_rekeyed_and_first_copies_are_not() -> None:
    noise = Noise.of(4, 3)
    taken = noise.take(torch.tensor([1, 1, 0, 1]))
    assert taken.seed_B[0] == noise.seed_B[1] and taken.seed_B[2] == noise.seed_B[0]
    assert len(set(taken.seed_B.tolist())) == 4
    again = taken.take(torch.tensor([0, 0, 1, 3, 2]))  # items 1 and 3 are earlier copies of item 0
    assert len(set(again.seed_B.tolist())) == 5
    same = noise.take(torch.arange(3))
    assert torch.equal(same.seed_B, noise.seed_B) and torch.equal(same.copies_B, noise.copies_B)
    assert torch.equal(Noise.stack([taken, noise]).seed_B, torch.cat((taken.seed_B, noise.seed_B)))


def test_any_int_is_a_seed() -> None:
    seeds = [0, 1, -1, 2**63 - 1, 2**63, 2**64 + 5, -(2**70) - 3]
    drawn = {seed: float(Noise.of(seed).uniform("draw", 0, ())) for seed in seeds}
    assert len(set(drawn.values())) == len(seeds)
    assert drawn[-1] == float(Noise.of(2**64 - 1).uniform("draw", 0, ()))
    with pytest.raises(ValueError, match=r"one int64 seed per item, got torch\.float32"):
        Noise(torch.zeros(2))


def test_recorded_numbers_are_read_back() -> None:
    values = torch.arange(12.0).view(2, 2, 3)
    noise = Recorded({"draw": [values[0], values[1]]}, {}, items=2)
    assert torch.equal(noise.uniform("draw", 1, (3,)), values[1].double())
    assert torch.equal(noise.take(torch.tensor([1])).uniform("draw", torch.tensor([0]), (3,)), values[0, 1:].double())
    assert len(noise) == 2 and len(noise.take(torch.tensor([1]))) == 1
    with pytest.raises(KeyError, match="no recorded noise for 'accept'"):
        noise.uniform("accept", 0, (3,))
    with pytest.raises(ValueError, match=r"has shape \(3,\), asked for \(4,\)"):
        noise.uniform("draw", 0, (4,))


def test_truncated_gaussians_have_their_law() -> None:
    """The distribution function of the cut Gaussian makes them uniform again."""
    x = truncated(Noise.of(5, 2).uniform("share", 0, (MANY,))[0], 0.55, 0.25, 0.5, 1.0)
    assert bool(((x >= 0.5) & (x <= 1)).all())
    edges = torch.special.ndtr((torch.tensor([0.5, 1.0], dtype=torch.float64) - 0.55) / 0.25)
    u = (torch.special.ndtr((x - 0.55) / 0.25) - edges[0]) / (edges[1] - edges[0])
    assert kolmogorov_smirnov(x, u) > 0.001
