"""Solvers reach the data of known fields, keep pinned positions on their path, show estimates and can be stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis.denoise import euler
from arvis.noise import Noise
from arvis.tokens import Pin
from chance import kolmogorov_smirnov

GRID = tuple(i / 8 for i in range(9))


def towards(data: Tensor):
    """The exact velocity when all data lie at one point: every straight path ends there."""
    return lambda x, t: (data - x) / (1 - t)


def test_a_straight_field_is_solved_exactly_by_any_grid() -> None:
    data = Noise.of(1, 3).normal("data", 0, (2, 4))
    for times in ((0, 1), (0, 0.9, 1), GRID):
        x = euler(times)(towards(data), Noise.of(2, 3), 0, (2, 4), None, None)
        assert x.dtype == torch.float64 and torch.allclose(x, data, atol=1e-12)


def test_a_gaussian_comes_out_with_its_mean_and_deviation() -> None:
    """Data N(3, 0.5^2): the exact marginal velocity, on a fine grid."""

    def field(x: Tensor, t: float) -> Tensor:
        variance = (1 - t) ** 2 + (0.5 * t) ** 2
        gain = (0.25 * t - (1 - t)) / variance
        return 3 + gain * (x - 3 * t)

    times = tuple(i / 200 for i in range(201))
    x = euler(times)(field, Noise.of(3, 40), 0, (10, 5), None, None).flatten()
    assert kolmogorov_smirnov(x, torch.special.ndtr((x - 3) / 0.5)) > 0.001


def test_first_order_convergence() -> None:
    def error(n: int) -> float:
        out = euler(tuple(i / n for i in range(n + 1)))(lambda x, t: -x, Noise.of(4, 5), 0, (3, 2), None, None)
        start = Noise.of(4, 5).normal("solver", 0, (3, 2))
        return float((out - start * torch.e**-1).abs().max())

    assert 1.8 < error(50) / error(100) < 2.2


def test_pinned_positions_walk_their_own_path_and_end_as_given() -> None:
    """The field must see the others as they would be at that time, or in-painting ignores what is given."""
    value = Noise.of(5, 2).normal("value", 0, (3, 2))
    mask = torch.tensor([[True, False, False], [False, False, True]])
    start, seen = Noise.of(6, 2).normal("solver", 7, (3, 2)), []

    def field(x: Tensor, t: float) -> Tensor:
        seen.append((x.clone(), t))
        return x.mean(1, keepdim=True) - x  # positions pull at each other

    x = euler(GRID)(field, Noise.of(6, 2), 7, (3, 2), Pin(mask, value), None)
    assert torch.equal(x[mask], value[mask])
    for inner, t in seen:
        assert torch.allclose(inner[mask], ((1 - t) * start + t * value)[mask], atol=1e-12)
    free = euler(GRID)(field, Noise.of(6, 2), 7, (3, 2), None, None)
    assert not torch.allclose(x[~mask], free[~mask])


def test_watching_and_cancelling() -> None:
    data, shown = Noise.of(1, 3).normal("data", 0, (2, 4)), []

    def watch(x: Tensor, i: int, n: int) -> None:
        shown.append((i, n))
        assert torch.allclose(x, data, atol=1e-12)  # the estimate of the clean sample, at every step
        if i == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        euler(GRID)(towards(data), Noise.of(2, 3), 0, (2, 4), None, watch)
    assert shown == [(i, 8) for i in range(6)]


def test_networks_of_other_precision() -> None:
    """The state of a solve stays float64 when the field answers in bfloat16."""
    data = torch.ones(3, 2, 4)
    x = euler(GRID)(lambda x, t: towards(data)(x, t).bfloat16(), Noise.of(2, 3), 0, (2, 4), None, None)
    assert x.dtype == torch.float64 and torch.allclose(x, data.double(), atol=0.02)


@pytest.mark.parametrize("times", [(), (0,), (0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1)])
def test_times_rise_from_zero_to_one(times: tuple) -> None:
    with pytest.raises(ValueError, match="times rising from 0 to 1"):
        euler(times)
