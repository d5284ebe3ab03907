"""Solvers reach the data of known fields, keep pinned positions on their path, show estimates and can be stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis.denoise import ddpm, euler
from arvis.diffusion import Diffusion, betas, even
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


# -- ancestral sampling ---------------------------------------------------------------------------------------------

DIFFUSION = Diffusion(betas("cosine", 1000))


def said_of_gaussian(diffusion: Diffusion, mean: float, deviation: float, share: float = -1.0):
    """The exact field where data are N(mean, deviation^2): the expected noise of x_t."""
    index = {time: i for i, time in enumerate(diffusion.times)}

    def field(x: Tensor, t: float) -> Tensor:
        abar = diffusion.abar[index[int(t)]]
        variance = abar * deviation**2 + 1 - abar
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance
        return torch.cat((eps, torch.full_like(eps, share)), -1)

    return field


def test_ancestral_samples_have_the_mean_and_deviation_of_the_data() -> None:
    sub = DIFFUSION.sub(even(1000, 200))
    for share in (-1.0, 1.0):  # both ends of the variance are right in the limit of many steps
        x = ddpm(sub)(said_of_gaussian(sub, 3.0, 0.5, share), Noise.of(3, 40), 0, (10, 5), None, None).flatten()
        assert kolmogorov_smirnov(x, torch.special.ndtr((x - 3) / 0.5)) > 0.001


def test_all_data_at_one_point_is_reached_in_any_number_of_steps() -> None:
    for steps in (1, 3, 100):
        sub = DIFFUSION.sub(even(1000, steps))
        x = ddpm(sub)(said_of_gaussian(sub, -1.5, 0.0), Noise.of(3, 4), 0, (2, 3), None, None)
        assert torch.allclose(x, torch.full_like(x, -1.5), atol=1e-6) and x.dtype == torch.float64


def test_the_network_is_told_its_own_times_from_the_last_to_the_first() -> None:
    sub, told = DIFFUSION.sub(even(1000, 4)), []

    def field(x: Tensor, t: float) -> Tensor:
        told.append(t)
        return torch.zeros(*x.shape[:2], 2 * x.shape[2])

    ddpm(sub)(field, Noise.of(3, 4), 0, (2, 3), None, None)
    assert told == [999, 666, 333, 0]


def test_temperature_scales_the_noise_of_the_steps_and_not_the_first_one() -> None:
    sub = DIFFUSION.sub(even(1000, 5)[:-1])

    def run(temperature: float | Tensor) -> Tensor:
        return ddpm(sub, temperature)(lambda x, t: torch.cat((x, x), -1) * 0.1, Noise.of(3, 4), 7, (2, 3), None, None)

    cold, warm, hot = run(0.0), run(0.5), run(1.0)
    torch.testing.assert_close(warm.sub(cold).abs() > 1e-3, torch.ones(4, 2, 3, dtype=torch.bool))
    assert (cold[0] - cold[1]).abs().max() > 0.1  # different starts
    own = run(torch.tensor([0.0, 0.5, 1.0, 0.5]))
    for item, same in enumerate((cold, warm, hot, warm)):
        assert torch.equal(own[item], same[item])


def test_a_linear_field_is_linear_in_the_temperature() -> None:
    """With a fixed variance everything is linear in the noise, so half the temperature is half the deviation."""
    sub = DIFFUSION.sub(even(1000, 5)[:-1])

    def run(temperature: float) -> Tensor:
        field = lambda x, t: torch.cat((x * 0.1, torch.zeros_like(x)), -1)  # noqa: E731
        return ddpm(sub, temperature)(field, Noise.of(3, 4), 7, (2, 3), None, None)

    torch.testing.assert_close(run(0.5), (run(0.0) + run(1.0)) / 2)


def test_pinned_positions_are_noisy_data_on_the_way_and_the_data_at_the_end() -> None:
    sub = DIFFUSION.sub(even(1000, 6))
    value = Noise.of(5, 2).normal("value", 0, (3, 2))
    mask = torch.tensor([[True, False, False], [False, False, True]])
    start, seen = Noise.of(6, 2).normal("solver", 7, (3, 2)), []

    def field(x: Tensor, t: float) -> Tensor:
        seen.append(x.clone())
        pulled = x.mean(1, keepdim=True) - x  # positions pull at each other
        return torch.cat((pulled, pulled), -1)

    x = ddpm(sub)(field, Noise.of(6, 2), 7, (3, 2), Pin(mask, value), None)
    assert torch.equal(x[mask], value[mask])
    for inner, t in zip(seen, reversed(range(6)), strict=True):
        assert torch.allclose(inner[mask], sub.noisy(value, start, t)[mask], atol=1e-12)
    free = ddpm(sub)(field, Noise.of(6, 2), 7, (3, 2), None, None)
    assert not torch.allclose(x[~mask], free[~mask])


def test_ancestral_sampling_can_be_watched_and_cancelled() -> None:
    sub, shown = DIFFUSION.sub(even(1000, 8)), []

    def watch(x: Tensor, i: int, n: int) -> None:
        shown.append((i, n))
        assert torch.allclose(x, torch.full_like(x, -1.5), atol=1e-6)
        if i == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ddpm(sub)(said_of_gaussian(sub, -1.5, 0.0), Noise.of(3, 4), 0, (2, 3), None, watch)
    assert shown == [(i, 8) for i in range(6)]
