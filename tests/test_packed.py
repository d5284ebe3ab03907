"""Packed weights give what the plain ones give; the plain path is the specification."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import arvis
from arvis.laws import Case, case_of
from arvis.nn.adaln import FeedForward
from arvis.nn.lora import LoraConfig, adapt
from arvis.nn.packed import Packed, offload, pack
from arvis.nn.packed import gelu as gelu_of
from arvis.noise import Noise
from arvis.state import State, System
from arvis.systems import SYSTEMS
from arvis.walk import finish, walk

REGISTERED = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]


def packed(system: System) -> System:
    out = copy.deepcopy(system)
    assert isinstance(out, nn.Module) and pack(out) > 0
    return out


def painted(case: Case, system: System) -> tuple[State, torch.Tensor]:
    with torch.inference_mode():
        s = finish(walk(system, system.start(case.cond, system.Sampling(), case.noise)))
        return s, system.tokenizer.decode(s.tokens, s.layout)


@pytest.mark.parametrize("name", REGISTERED)
def test_float32_paints_the_same_tokens(name: str) -> None:
    case = case_of(name, torch.float32)
    (plain, picture), (quick, other) = painted(case, case.system), painted(case, packed(case.system))
    if case.system.space.sizes:
        assert torch.equal(plain.tokens, quick.tokens)
    else:
        torch.testing.assert_close(quick.tokens, plain.tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other, picture, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", REGISTERED)
def test_bfloat16_is_as_near_as_autocast(name: str) -> None:
    """The first prediction differs from float32's by at most twice what autocast on plain weights differs."""
    case = case_of(name, torch.float32)
    if not case.system.space.sizes:
        pytest.skip("its distributions are not read as numbers of one size")

    def read(system: System) -> torch.Tensor:
        return case.read(system.predict(system.start(case.cond, system.Sampling.plain(), case.noise))).float()

    with torch.inference_mode():
        exact = read(case.system)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, quick = read(case.system), read(packed(case.system))
    allowed = 2 * (rounded - exact).abs().max() + 1e-3 * exact.abs().max()
    assert (quick - exact).abs().max() <= allowed


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 1, 24), (3, 24), (7, 24), (2, 3, 24), (0, 24)])
def test_a_product_of_any_rows(shape: tuple[int, ...], bias: bool) -> None:
    plain, quick = layer(bias), layer(bias)
    pack(quick)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))


def test_rows_that_do_not_lie_side_by_side() -> None:
    plain, quick, x = layer(), layer(), torch.randn(24, 5).T
    pack(quick)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))


def test_convolutions() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2), nn.Conv2d(4, 2, 1, bias=False))
    quick, x = copy.deepcopy(plain), torch.randn(2, 3, 9, 11)
    assert pack(quick) == 3
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))


def test_gelu_is_that_of_the_layer() -> None:
    torch.manual_seed(0)
    plain, x = FeedForward(24, 40), torch.randn(5, 24)
    quick = copy.deepcopy(plain)
    pack(quick)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))
        torch.testing.assert_close(gelu_of(quick.up, x), F.gelu(plain.up(x), approximate="tanh"))


def test_one_format_is_kept_and_takes_half_the_bytes() -> None:
    quick = layer()
    pack(quick)
    weight = quick.weight.data
    assert isinstance(weight, Packed) and weight.store.bytes == 4 * 24 * 40
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert quick(torch.randn(2, 24)).dtype == torch.bfloat16
    assert quick.weight.store.bytes == 2 * 24 * 40
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"first used in torch.bfloat16 (and )?cannot serve"):
        quick(torch.randn(2, 24))


def test_values_are_there_for_everything_else() -> None:
    plain, quick = layer(), layer()
    pack(quick)
    with torch.inference_mode():
        quick(torch.randn(2, 24))
        assert torch.equal(quick.weight + 0, plain.weight)
        assert torch.equal(quick.weight[3:5], plain.weight[3:5])
    assert quick.weight.shape == plain.weight.shape and quick.weight.dtype == torch.float32
    assert [name for name, _ in quick.named_parameters()] == ["weight", "bias"]


def test_gradients_of_inputs_pass() -> None:
    plain, quick, x = layer(), layer(), torch.randn(3, 24, requires_grad=True)
    pack(quick)
    (ours,) = torch.autograd.grad(quick(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_shared_weights_stay_and_adapters_work() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    assert pack(tied) == 0
    plain = nn.ModuleDict({"a": layer()})
    adapt(plain, LoraConfig(rank=2))
    nn.init.normal_(plain["a"].up)
    quick, x = copy.deepcopy(plain), torch.randn(3, 24)
    pack(quick)
    with torch.inference_mode():
        torch.testing.assert_close(quick["a"](x), plain["a"](x))
        torch.testing.assert_close(F.linear(x, quick["a"].weight), F.linear(x, plain["a"].weight))


def test_a_fast_model_paints_the_same_and_is_not_saved(tmp_path) -> None:
    plain, fast = arvis.load("brush"), arvis.load("brush", fast=True)
    assert plain.generate("red apple")[0].tobytes() == fast.generate("red apple")[0].tobytes()
    with pytest.raises(ValueError, match="load it with fast=False"):
        fast.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="load it with fast=False"):
        fast.with_lora(tmp_path / "adapters.safetensors")


def test_decoding_in_bfloat16_keeps_the_picture() -> None:
    """At least 45 dB against float32, in every picture of the model in the box."""
    model = arvis.load("brush")
    tokens = list(model.stream(["red apple", "blue whale", "happy dog"], n=4))[-1].tokens()
    quick = packed(model.system)
    with torch.inference_mode():
        exact = model.system.tokenizer.decode(tokens, model.layout)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = quick.tokenizer.decode(tokens, model.layout)
    psnr = 10 * torch.log10(4 / (rounded.float() - exact).square().mean((1, 2, 3)))  # the range is 2
    assert 45 <= psnr.min() < 90, "float32 would be exact"


# -- weights that stay on the host ------------------------------------------------------------------------------------


def test_offloaded_weights_lie_on_the_host_and_everything_else_on_the_device() -> None:
    """The meta device stands for a GPU: what comes there has lost its values, so nothing of the host may."""
    case = case_of("var", torch.float32)
    system, before = copy.deepcopy(case.system), case.system.state_dict()
    count = offload(system, torch.device("meta"))
    held = {name: x for name, x in system.named_parameters() if isinstance(x, Packed)}
    assert 0 < len(held) == count
    assert {str(x.device) for x in system.state_dict().values()} == {"meta"}
    for name, x in held.items():
        assert torch.equal(x.store.dense(), before[name]), "the values are still there"
    s = system.start(None, system.Sampling(), Noise.of(0, 2, "meta"))
    assert system.predict(s).logits.device.type == "meta"


@pytest.mark.parametrize("name", ["var", "llamagen", "mar"])
def test_offloaded_weights_paint_the_same(name: str) -> None:
    case = case_of(name, torch.float32)
    system = copy.deepcopy(case.system)
    assert offload(system, torch.device("cpu")) > 0
    (plain, picture), (other, same) = painted(case, case.system), painted(case, system)
    torch.testing.assert_close(other.tokens, plain.tokens)
    torch.testing.assert_close(same, picture)


def test_offloading_is_for_a_gpu_and_not_with_fewer_bits() -> None:
    with pytest.raises(ValueError, match="the device is the host's cpu"):
        arvis.load("brush", offload=True)
    with pytest.raises(ValueError, match="give one of them"):
        arvis.load("brush", device="meta", offload=True, quantize="int8")
    assert arvis.load("brush", device="meta", offload=True).device.type == "meta"
