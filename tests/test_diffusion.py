"""Tables of the diffusion, its sub-schedules, the posterior by Bayes' rule, and the terms of its loss."""

from __future__ import annotations

import math

import pytest
import torch

from arvis.diffusion import Diffusion, betas, binned_nll, even, sections, strided
from arvis.noise import Noise

COSINE = Diffusion(betas("cosine", 1000))


def test_the_cosine_schedule() -> None:
    t = torch.arange(1001).double() / 1000
    abar = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
    abar = abar / abar[0]
    torch.testing.assert_close(COSINE.abar[:990], abar[1:991], atol=1e-12, rtol=0)
    assert COSINE.betas.dtype == torch.float64 and float(COSINE.betas.max()) == 0.999
    assert COSINE.abar[-1].sqrt() == pytest.approx(4.93e-5, rel=1e-3)  # the trap at the first step of a solve


def test_the_linear_schedule() -> None:
    b = betas("linear", 1000)
    assert b[0] == pytest.approx(1e-4) and b[-1] == pytest.approx(0.02) and b.diff().std() < 1e-12
    assert betas("linear", 100)[-1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="cosine or linear, got 'sigmoid'"):
        betas("sigmoid", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step, got 0"):
        betas("cosine", 0)


def test_steps_that_are_kept() -> None:
    assert even(1000, 10) == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert even(1000, 4) == (0, 333, 666, 999) and even(1000, 1) == (0,)
    hundred = even(1000, 100)
    assert len(set(hundred)) == 100 and hundred[-1] == 999 and set(torch.tensor(hundred).diff().tolist()) == {10, 11}
    assert even(8, 100) == tuple(range(8))
    assert sections(1000, (10,)) == even(1000, 10)
    assert sections(10, (2, 3)) == (0, 4, 5, 7, 9)
    assert sections(11, (1, 5)) == (0, 6, 7, 8, 9, 10)
    assert strided(1000, 8) == tuple(range(0, 1000, 125))
    assert strided(10, 7) == (0, 2, 4, 6, 8) and strided(4, 100) == (0, 1, 2, 3) and strided(9, 1) == (0,)
    with pytest.raises(ValueError, match="at least one step is kept, got 0"):
        strided(10, 0)
    with pytest.raises(ValueError, match="between 1 and 5 can be kept, got 6"):
        sections(10, (6, 2))


def test_a_sub_schedule_has_the_same_noise_at_its_steps() -> None:
    times = (0, 3, 500, 999)
    sub = COSINE.sub(times)
    assert sub.times == times and len(sub) == 4
    torch.testing.assert_close(sub.abar, COSINE.abar[list(times)], atol=1e-15, rtol=1e-12)
    assert sub.sub((1, 2)).times == (3, 500)
    with pytest.raises(ValueError, match="rise"):
        COSINE.sub((3, 3))


@pytest.mark.parametrize("t", [1, 2, 400, 998, 999])
def test_the_posterior_follows_from_bayes_rule(t: int) -> None:
    """x_{t-1} given x_0 is N(sqrt(abar') x_0, 1 - abar'), x_t given x_{t-1} is N(sqrt(1 - beta) x_{t-1}, beta)."""
    d, x0, x = COSINE, torch.tensor([0.7]).double(), torch.tensor([-1.3]).double()
    beta, before = d.betas[t], d.before[t]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x / beta) / precision
    torch.testing.assert_close(d.mean(x, x0, t), mean, atol=1e-10, rtol=1e-10)
    assert float(d.least[t]) == pytest.approx(-math.log(precision), rel=1e-9)


def test_step_zero_takes_the_variance_of_step_one() -> None:
    assert COSINE.least[0] == COSINE.least[1] and torch.isfinite(COSINE.least).all()
    assert torch.equal(COSINE.mean(torch.ones(2), torch.full((2,), 5.0), 0), torch.full((2,), 5.0))


def test_what_is_said_of_the_noise_says_the_rest() -> None:
    n = Noise.of(0, 2)
    x0, noise, t = n.normal("x", 0, (5, 3)), n.normal("e", 0, (5, 3)), torch.tensor([[0, 1, 10, 500, 900]] * 2)
    x = COSINE.noisy(x0, noise, t)
    torch.testing.assert_close(COSINE.clean(x, noise, t), x0)
    torch.testing.assert_close(COSINE.eps(x, x0, t), noise)
    torch.testing.assert_close(COSINE.eps_of_velocity(x, COSINE.velocity(x0, noise, t), t), noise)
    for i, at in enumerate(t[0].tolist()):  # one step for all, or one per row
        torch.testing.assert_close(COSINE.noisy(x0[:, i], noise[:, i], at), x[:, i])


def test_the_share_of_the_variance_lies_between_both_ends() -> None:
    t = torch.tensor([0, 7, 999])
    ends = [COSINE.log_variance(torch.full((3, 2), s).double(), t)[:, 0] for s in (-1.0, 1.0, 0.0)]
    torch.testing.assert_close(ends[0], COSINE.least[t])
    torch.testing.assert_close(ends[1], COSINE.most[t])
    torch.testing.assert_close(ends[2], (COSINE.least[t] + COSINE.most[t]) / 2)


def test_the_right_answer_costs_nothing_after_step_zero() -> None:
    n = Noise.of(0, 3)
    x0, noise, t = n.normal("x", 0, (4,)), n.normal("e", 0, (4,)), torch.tensor([1, 300, 998])
    out = torch.cat((noise, torch.full_like(noise, -1)), -1)
    error, bits = COSINE.terms(out, x0, noise, t)
    assert error.tolist() == [0, 0, 0] and bits.abs().max() < 1e-9


def test_the_second_term_is_the_kl_in_bits_and_teaches_the_variance_alone() -> None:
    n = Noise.of(0, 2)
    x0, noise, t = n.normal("x", 0, (4,)), n.normal("e", 0, (4,)), torch.tensor([5, 700])
    out = n.normal("out", 0, (8,)).requires_grad_()
    error, bits = COSINE.terms(out, x0, noise, t)
    eps, share = out.detach().chunk(2, -1)
    x = COSINE.noisy(x0, noise, t)
    true = torch.distributions.Normal(COSINE.mean(x, x0, t), (COSINE.least[t] / 2).exp()[:, None])
    mean = COSINE.mean(x, COSINE.clean(x, eps, t), t)
    said = torch.distributions.Normal(mean, (COSINE.log_variance(share, t) / 2).exp())
    kl = torch.distributions.kl_divergence(true, said).mean(-1) / math.log(2)
    torch.testing.assert_close(bits.detach(), kl)
    torch.testing.assert_close(error.detach(), (eps - noise).square().mean(-1))
    (gradient,) = torch.autograd.grad(bits.sum(), out)
    assert gradient[:, :4].abs().max() == 0 and gradient[:, 4:].abs().min() > 0


def test_step_zero_is_a_likelihood_of_bins() -> None:
    x0, noise, t = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.1, 0.4]]), torch.tensor([0])
    out = torch.tensor([[0.1, 0.4, 0.5, 0.5]])
    _, bits = COSINE.terms(out, x0, noise, t)
    deviation = COSINE.log_variance(torch.tensor(0.5), 0) / 2
    assert bits[0] == pytest.approx(float(binned_nll(x0, x0, deviation).mean()) / math.log(2), rel=1e-3)


@pytest.mark.parametrize(("mean", "log"), [(0.1, -2.0), (-0.97, -3.0), (0.0, 1.0)])
def test_the_bins_share_all_the_mass(mean: float, log: float) -> None:
    x = torch.linspace(-1, 1, 256).double()
    mass = (-binned_nll(x, torch.tensor(mean).double(), torch.tensor(log).double())).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)


def test_far_off_means_give_finite_gradients() -> None:
    mean = torch.tensor([1e8, -1e8, 0.0], requires_grad=True)
    nll = binned_nll(torch.zeros(3), mean, torch.full((3,), -9.0))
    nll.sum().backward()
    assert nll[:2].detach().tolist() == pytest.approx([-math.log(1e-12)] * 2) and torch.isfinite(mean.grad).all()


def test_the_loss_is_at_least_single_precision() -> None:
    out = torch.randn(2, 8).bfloat16()
    error, bits = COSINE.terms(out, torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 9]))
    assert error.dtype == bits.dtype == torch.float32
