"""Weights in 8 and 4 bits: the stated rounding and nothing else, whichever way a product takes."""

import pytest
import torch
from torch import Tensor, nn

import arvis
from arvis.nn.packed import Packed, pack
from arvis.nn.rounded import FEW, STORES, Int4, Int8

ROWS = [1, FEW, FEW + 1]


def weight(rows: int = 64, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_int8_is_within_half_a_step_of_its_channel() -> None:
    w = weight()
    step = w.abs().amax(1, keepdim=True) / 127
    off = (Int8(w).dense() - w).abs() / step
    assert off.max() <= 0.5 + 1e-4 and off.max() > 0.45


@pytest.mark.parametrize("rows", [64, 40])  # with a kernel's layout where there is one, and without
def test_int4_is_within_half_a_step_of_its_group(rows: int) -> None:
    w = weight(rows)
    groups = w.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / 15
    off = (Int4(w).dense() - w).unflatten(1, (-1, 32)).abs() / step[..., None]
    # the step and the middle are bfloat16 numbers: eight of 15 steps off by 2^-9, and the middle by as much
    assert off.max() <= 0.5 + 0.1 and off.max() > 0.45


def test_bytes() -> None:
    w = weight()
    assert Int8(w).bytes == 64 * 96 + 4 * 64
    assert Int4(w).bytes == 64 * 96 // 2 + 4 * 64 * 96 // 32


def test_a_channel_of_zeros() -> None:
    for store in STORES.values():
        assert torch.equal(store(torch.zeros(32, 32)).dense(), torch.zeros(32, 32))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", STORES)
def test_every_way_is_the_product_with_the_rounded_weight(bits: str, dtype: torch.dtype, rows: int) -> None:
    store, x, bias = STORES[bits](weight()), torch.randn(2, rows, 96), torch.randn(64)
    exact = x.to(dtype).float() @ store.dense().T + bias
    with torch.inference_mode():
        out, curved = (store.linear(x.to(dtype), bias, gelu=gelu) for gelu in (False, True))
    allowed = {torch.float32: 1e-4, torch.bfloat16: 2**-7 * float(exact.abs().max())}[dtype]
    assert out.dtype == dtype and (out.float() - exact).abs().max() < allowed
    assert (curved.float() - nn.functional.gelu(exact, approximate="tanh")).abs().max() < allowed


def test_only_wide_enough_linear_layers_are_rounded() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(24, 8), nn.Conv2d(32, 4, 1))
    assert pack(net, Int8) == 3
    kinds = [type(layer.weight.data.store).__name__ for layer in net if isinstance(layer.weight.data, Packed)]
    assert kinds == ["Int8", "Forms", "Forms"]


@pytest.mark.parametrize(("bits", "least"), [("int8", 0.97), ("int4", 0.5)])
def test_the_model_in_the_box_still_paints_its_apple(bits: str, least: float) -> None:
    """Likelihood of what it paints in float32: rounding costs it few nats."""
    exact, rounded = arvis.load("brush"), arvis.load("brush", quantize=bits)
    picture = exact.generate("red apple")
    a, b = (model.log_prob(picture, "red apple") for model in (exact, rounded))
    assert float(b) > float(a) / least and rounded.fast
    other = float(exact.log_prob(picture, "black cat"))
    assert float(b) > other, f"{float(b)} nats, under another prompt {other}"
