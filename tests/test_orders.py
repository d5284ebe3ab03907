"""Orders are partitions of the positions into steps."""

from __future__ import annotations

import math

import pytest
import torch

from arvis.noise import Noise
from arvis.orders import blocks, by_level, cosine_counts, frames, fronts, members, random_sets, raster
from arvis.tokens import NEVER, Layout, pyramid
from chance import chi_square


def test_plain_orders() -> None:
    assert raster(Layout(((2, 3),))).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert by_level(pyramid((1, 2))).tolist() == [[0, 1, 1, 1, 1]]
    assert fronts(Layout(((2, 3),))).view(2, 3).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert int(fronts(Layout(((4, 16, 16),))).max()) + 1 == 34  # evaluations of the published video layout
    assert int(fronts(Layout(((16, 16),))).max()) + 1 == 31
    assert frames(Layout(((4, 1, 2),)), 2).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert blocks(Layout(((4, 4),)), (2, 2)).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert blocks(Layout(((6,),)), (2,)).tolist() == [[0, 0, 1, 1, 2, 2]]
    for order in (raster, by_level, fronts):
        assert order(pyramid((1, 2))).dtype == torch.int32


@pytest.mark.parametrize(
    ("layout", "shape"), [(Layout(((4, 4),)), (3, 2)), (Layout(((4, 4),)), (4,)), (pyramid((1, 2)), (1, 1))]
)
def test_blocks_must_tile(layout: Layout, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not tile"):
        blocks(layout, shape)


def test_random_sets_partition_every_item() -> None:
    counts = (1, 3, 2)
    sets = random_sets(counts, Noise.of(1, 3000))
    assert sets.shape == (3000, 6) and sets.dtype == torch.int32
    for k, count in enumerate(counts):
        hit = sets == k
        assert bool((hit.sum(1) == count).all())
        assert chi_square(hit.sum(0), torch.ones(6)) > 0.001  # every position is as likely
    one = random_sets(counts, Noise.of(1, 3000).take(torch.tensor([7])))
    assert torch.equal(one[0], sets[7])


@pytest.mark.parametrize(("n", "steps"), [(256, 64), (256, 8), (64, 64), (5, 3), (1, 1), (16, 15), (256, 256)])
def test_cosine_counts_follow_the_formula(n: int, steps: int) -> None:
    """The published loop: a mask length of floor(n cos(pi/2 (s+1)/steps)), at least 1, at most one less than before."""
    counts, hidden = cosine_counts(n, steps), n
    assert sum(counts) == n and len(counts) == steps and min(counts) >= 1
    for step, count in enumerate(counts):
        if step == steps - 1:
            assert count == hidden
            break
        length = max(1, min(hidden - 1, math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps))))
        assert count == hidden - length
        hidden = length
    assert list(cosine_counts(256, 8))[:3] == [5, 15, 24]


def test_a_schedule_needs_a_position_per_step() -> None:
    for steps in (0, 6):
        with pytest.raises(ValueError, match="1 <= steps <= 5"):
            cosine_counts(5, steps)


def test_members_of_a_step() -> None:
    group = torch.tensor([[0, 1, NEVER, 1], [1, 0, 1, NEVER]])
    assert members(group, 1).tolist() == [[1, 3], [0, 2]]
    assert members(group, torch.tensor([0, 0])).tolist() == [[0], [1]]
    assert members(group[:1], 1).tolist() == [[1, 3]]
    with pytest.raises(ValueError, match=r"unequal numbers of positions at this step: \[1, 2\]"):
        members(group, torch.tensor([0, 1]))
