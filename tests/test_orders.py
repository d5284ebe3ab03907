"""Orders are partitions of the positions into steps."""

from __future__ import annotations

import math

import pytest
import torch

from arvis.noise import Noise
from arvis.orders import (
    blocks,
    by_level,
    cosine_counts,
    frames,
    fronts,
    hidden_counts,
    members,
    random_sets,
    raster,
    schedule,
    sets_around,
)
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
    uneven = members(group, torch.tensor([0, 1]))  # the first item draws one, and is filled up
    assert uneven[:, 0].tolist() == [0, 0] and uneven[1, 1] == 2 and group[0, uneven[0, 1]] != 0


# -- schedules over what is unknown -----------------------------------------------------------------------------------


def test_schedules_are_the_published_ones() -> None:
    r, unknown = torch.tensor([0.25, 0.5, 1.0]).double(), torch.tensor([64.0]).double()
    wanted = {
        "cosine": [math.cos(math.pi / 8), math.cos(math.pi / 4), 0],
        "uniform": [0.75, 0.5, 0],
        "pow2": [15 / 16, 0.75, 0],
        "pow0.5": [0.5, 1 - 0.5**0.5, 0],
        "log": [2 / 6, 1 / 6, 0],
        "exp": [1 - 2**-4.5, 1 - 2**-3, 0],
    }
    for name, shares in wanted.items():
        assert schedule(name)(r, unknown).tolist() == pytest.approx(shares, abs=1e-12), name
    with pytest.raises(ValueError, match="a schedule is cosine, uniform, log, exp or pow<number>, got 'sine'"):
        schedule("sine")


@pytest.mark.parametrize("name", ["cosine", "uniform", "pow3", "log", "exp"])
def test_hidden_counts_follow_the_published_loop(name: str) -> None:
    """m = max(1, min(unknown now - 1, floor(U share))), for items with other numbers of unknown positions."""
    unknown, steps = torch.tensor([36, 1, 7, 0, 20]), 6
    counts = hidden_counts(unknown, steps, schedule(name))
    assert counts.shape == (5, 6) and counts.dtype == torch.int64
    for item, start in enumerate(unknown.tolist()):
        now = start
        for k in range(steps):
            r, among = (torch.tensor(x, dtype=torch.float64) for x in ((k + 1) / steps, float(start)))
            share = schedule(name)(r, among)
            now = max(1, min(now - 1, math.floor(round(start * min(1, max(1e-6, float(share))), 9)))) if start else 0
            assert int(counts[item, k]) == now, (name, start, k)


def test_hidden_counts_reveal_and_hide_at_least_so_many() -> None:
    assert hidden_counts(torch.tensor([36]), 6).tolist() == [[34, 31, 25, 18, 9, 1]]
    assert hidden_counts(torch.tensor([36]), 6, least_drawn=4).tolist() == [[32, 28, 24, 18, 9, 1]]
    assert hidden_counts(torch.tensor([36]), 6, least_hidden=3).tolist() == [[34, 31, 25, 18, 9, 3]]


def test_sets_around_nothing_are_random_sets() -> None:
    noise = Noise.of(2, 3)
    for n, steps in ((16, 4), (16, 16), (5, 1), (36, 6)):
        nothing = torch.zeros(3, n, dtype=torch.bool)
        assert torch.equal(sets_around(nothing, steps, noise), random_sets(cosine_counts(n, steps), noise))


def test_sets_around_what_is_known_partition_the_rest_of_every_item() -> None:
    known = torch.zeros(4, 16, dtype=torch.bool)
    known[0, :8], known[1, 3:], known[2] = True, True, True
    sets = sets_around(known, 8, Noise.of(3, 4))
    assert bool((sets[known] == -1).all()) and bool((sets[~known] >= 0).all())
    for item, unknown in enumerate((8, 3, 0, 16)):
        drawn = sets[item][~known[item]]
        counts = torch.bincount(drawn.long(), minlength=8)
        wanted = cosine_counts(unknown, min(8, unknown)) if unknown else ()
        assert counts.tolist() == [*wanted, *(0,) * (8 - len(wanted))]
    alone = sets_around(known[:1], 8, Noise.of(3, 4).take(torch.tensor([0])))
    assert torch.equal(alone[0], sets[0]), "an item does not depend on the others"
