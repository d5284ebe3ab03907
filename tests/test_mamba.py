"""The chunked scan equals the recurrence it stands for at every length and border, the mixer its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.cost import Counting
from arvis.nn.mamba import Mamba2, Mamba2Config, scan

ROWS, HEADS, HEAD, STATE = 2, 4, 3, 5


def inputs(count: int, groups: int = 1) -> list[Tensor]:
    """x, dt, a, b, c and a first state, in float64."""
    torch.manual_seed(count)
    x = torch.randn(ROWS, count, HEADS, HEAD, dtype=torch.float64)
    dt = torch.rand(ROWS, count, HEADS, dtype=torch.float64) * 0.5
    a = -torch.rand(HEADS, dtype=torch.float64) * 3
    b, c = torch.randn(2, ROWS, count, groups, STATE, dtype=torch.float64)
    return [x, dt, a, b, c, torch.randn(ROWS, HEADS, HEAD, STATE, dtype=torch.float64)]


def recurrence(x, dt, a, b, c, state):
    """S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T and y_t = S_t c_t, one row after another."""
    each, out = x.shape[2] // b.shape[2], []
    b, c = b.repeat_interleave(each, 2), c.repeat_interleave(each, 2)
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = (step * a[:, None, None]).exp() * state + step * x[:, t, :, :, None] * b[:, t, :, None, :]
        out.append((state * c[:, t, :, None, :]).sum(-1))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("count", [1, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_scan_is_the_recurrence(count, chunk, groups):
    given = inputs(count, groups)
    for found, wanted in zip(scan(*given, chunk=chunk), recurrence(*given), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_its_gradients_are_those_of_the_recurrence():
    ours, theirs = ([x.clone().requires_grad_() for x in inputs(29, 2)] for _ in range(2))
    weight = torch.randn(ROWS, 29, HEADS, HEAD, dtype=torch.float64)
    for run, given in ((lambda *g: scan(*g, chunk=8), ours), (recurrence, theirs)):
        y, state = run(*given)
        ((y * weight).sum() + state.square().sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("cut", [1, 2, 30, 63, 64, 65, 129])
def test_it_goes_on_from_any_row(cut):
    x, dt, a, b, c, state = inputs(130)
    whole, last = scan(x, dt, a, b, c, state)
    first, state = scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], state)
    second, state = scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=1e-12)


def test_states_that_die_at_once_leave_numbers_and_gradients_finite():
    x, dt, a, b, c, _ = (t.float().requires_grad_() for t in inputs(70))
    y, state = scan(x, dt * 1e4, a, b, c)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and all(t.grad is not None and t.grad.isfinite().all() for t in (x, dt, a, b, c))


def test_its_cost_grows_with_the_rows_alone():
    def flops(count: int) -> float:
        x, dt, a, b, c, state = (t.to("meta") for t in inputs(count))
        with Counting(4) as counting:
            scan(x, dt, a, b, c, state)
        return counting.work.flops

    assert flops(64) > 0 and flops(640) == 10 * flops(64)


# -- the mixer ------------------------------------------------------------------------------------------------------


def mixer(**sizes) -> tuple[Mamba2, Mamba2Config]:
    torch.manual_seed(0)
    config = Mamba2Config(**{"d_state": 5, "headdim": 4, **sizes})
    return Mamba2(8, config).double(), config


def formula(m: Mamba2, config: Mamba2Config, u: Tensor) -> Tensor:
    """out(norm(y silu(z)) w), from the formulas alone."""
    inner, groups, wide = config.expand * u.shape[2], config.ngroups, config.ngroups * config.d_state
    h = u @ m.in_proj.weight.T
    z, xbc, dt = h[..., :inner], h[..., inner : 2 * inner + 2 * wide], h[..., 2 * inner + 2 * wide :]
    taps, blurred = m.conv1d.weight[:, 0], torch.zeros_like(xbc)
    for t in range(u.shape[1]):
        for i in range(config.d_conv):
            if t - i >= 0:
                blurred[:, t] += xbc[:, t - i] * taps[:, config.d_conv - 1 - i]
    xbc = F.silu(blurred + m.get_parameter("conv1d.bias"))
    x, b, c = xbc[..., :inner], xbc[..., inner : inner + wide], xbc[..., inner + wide :]
    x = x.unflatten(-1, (-1, config.headdim))
    dt = (1 + (dt + m.dt_bias).exp()).log()
    zero = x.new_zeros(len(x), x.shape[2], config.headdim, config.d_state)
    b, c = (rows.unflatten(-1, (groups, -1)) for rows in (b, c))
    y = (recurrence(x, dt, -m.A_log.exp(), b, c, zero)[0] + m.D[:, None] * x).flatten(2) * z * z.sigmoid()
    y = y.unflatten(-1, (groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return y.flatten(2) * m.norm.weight @ m.out_proj.weight.T


@pytest.mark.parametrize("sizes", [{}, {"ngroups": 2}, {"d_conv": 1}, {"d_conv": 2, "expand": 3, "headdim": 6}])
@torch.no_grad()
def test_the_mixer_follows_its_formula(sizes):
    m, config = mixer(**sizes)
    for p in (m.D, m.norm.weight, m.dt_bias):
        p.normal_()
    u = torch.randn(2, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(m(u)[0], formula(m, config, u), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_its_memory_is_all_that_it_needs_of_the_rows_before():
    """Pieces shorter than the convolution, too."""
    m, _ = mixer()
    u, memory, out = torch.randn(2, 11, 8, dtype=torch.float64), (), []
    for piece in u.split((1, 1, 2, 5, 2), 1):
        y, memory = m(piece, memory)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(u)[0], atol=1e-12, rtol=1e-12)
    assert [tuple(x.shape[1:]) for x in memory] == [(4, 4, 5), (16 + 2 * 5, 3)]


@torch.no_grad()
def test_a_new_mixer_starts_with_slow_and_fast_heads():
    m, _ = mixer(headdim=1)
    assert 1 <= float(m.A_log.exp().min()) < float(m.A_log.exp().max()) <= 16
    step = F.softplus(m.dt_bias)
    assert float(step.min()) * 1.001 >= 1e-3 and float(step.max()) <= 0.1001 and (m.D == 1).all()


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="2 x width 8 is no multiple of 1 x 3"):
        mixer(headdim=3)
