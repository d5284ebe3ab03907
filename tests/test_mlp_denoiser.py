"""The denoiser of single tokens: its formulas, its start, and what it leaves unrounded."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn import mlp_denoiser
from arvis.nn.mlp_denoiser import MLPDenoiser, TimeEmbedding, sinusoids


def lively(width: int = 16, depth: int = 2) -> MLPDenoiser:
    torch.manual_seed(0)
    net = MLPDenoiser(3, 6, 5, width, depth)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def test_times_are_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    out = sinusoids(t, 8)
    rates = [1.0, 0.1, 0.01, 0.001]
    wanted = torch.tensor([[math.cos(x * r) for r in rates] + [math.sin(x * r) for r in rates] for x in t.tolist()])
    assert out.dtype == torch.float32 and torch.allclose(out, wanted, atol=1e-4)
    assert torch.equal(out[0], torch.tensor([1.0] * 4 + [0.0] * 4))


def test_times_need_not_be_whole_and_have_any_shape() -> None:
    embed = TimeEmbedding(6)
    t = torch.tensor([[0, 3], [7, 250]])
    torch.testing.assert_close(embed(t)[1, 0], embed(torch.tensor(7.0)))
    assert not torch.equal(embed(torch.tensor(0.5)), embed(torch.tensor(0)))


def of_the_paper(net: MLPDenoiser, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """One row, from the formulas."""

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()

    angle = t * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    y = net.time.down(F.silu(net.time.up(torch.cat((angle.cos(), angle.sin()))))) + net.embed_condition(z)
    h = net.embed(x)
    for block in net.blocks:
        shift, scale, gate = block.modulation(F.silu(y)).chunk(3)
        inner = (norm(h) * block.norm.weight + block.norm.bias) * (1 + scale) + shift
        h = h + gate * block.down(F.silu(block.up(inner)))
    shift, scale = net.modulation(F.silu(y)).chunk(2)
    return net.linear(norm(h) * (1 + scale) + shift)


@torch.no_grad()
def test_it_follows_the_formulas() -> None:
    net = lively().double()
    x, z, t = torch.randn(4, 3).double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 500, 999])
    wanted = torch.stack([of_the_paper(net, *row) for row in zip(x, t, z, strict=True)])
    torch.testing.assert_close(net(x, t, net.condition(z)), wanted, atol=1e-4, rtol=1e-4)  # angles are float32


@torch.no_grad()
def test_what_is_the_same_for_all_rows_may_be_given_once() -> None:
    net = lively().double()
    x, z = torch.randn(2, 1, 4, 3).double(), torch.randn(2, 3, 4, 5).double()  # [B, 1, n, S], [B, G, n, inner]
    out = net(x, 7, net.condition(z))
    one_by_one = torch.stack([net(x[:, 0], torch.full((2, 4), 7), net.condition(z[:, g])) for g in range(3)], 1)
    torch.testing.assert_close(out, one_by_one, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("together", [1, 30, 10_000])
def test_along_a_solve_it_answers_as_at_every_time(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, a few or all times at once; a time that is asked for again, and one that is none of them."""
    monkeypatch.setattr(mlp_denoiser, "ROWS", together)
    net, times = lively().double(), (900, 511.5, 77, 3, 0)
    x, c = torch.randn(2, 1, 4, 3).double(), net.condition(torch.randn(2, 3, 4, 5).double())
    denoise = net.along(times, c)
    for t in (*times, 511.5, 0.125):
        torch.testing.assert_close(denoise(x, t), net(x, t, c), atol=1e-12, rtol=0)


def test_nothing_comes_out_at_first_and_everything_can_learn() -> None:
    net = MLPDenoiser(3, 6, 5, 16, 2)
    x, c = torch.randn(4, 3), net.condition(torch.randn(4, 5))
    assert torch.equal(net(x, torch.arange(4), c), torch.zeros(4, 6))
    h = net.embed(x)
    assert torch.equal(net.blocks[0](h, net.modulations(c)[0]), h)
    nn.init.normal_(net.linear.weight)
    for block in net.blocks:
        nn.init.normal_(block.modulation.weight)
    net(x, torch.arange(4), net.condition(torch.randn(4, 5))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@torch.no_grad()
def test_the_answer_is_not_rounded_under_autocast() -> None:
    """bfloat16 has 8 bits; the last layer alone, rounded, would already differ in all values from its own float32."""
    net = lively()
    x, z = torch.randn(64, 3), torch.randn(64, 5)
    whole = net(x, 3, net.condition(z))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, 3, net.condition(z))
    assert mixed.dtype == torch.float32
    assert (mixed != mixed.bfloat16().float()).float().mean() > 0.9
    assert (mixed - whole).abs().max() < 0.1 * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_stays_double(dtype: torch.dtype) -> None:
    net = lively().to(dtype)
    x, z = torch.randn(4, 3).double(), torch.randn(4, 5).to(dtype)
    assert net(x, 3, net.condition(z)).dtype == dtype
