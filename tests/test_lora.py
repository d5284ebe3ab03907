"""LoRA: nothing changes at first, adapters alone learn, merged weights are the adapted ones, on every system."""

import copy

import pytest
import torch
from torch import nn

import arvis
from arvis.laws import REQUEST
from arvis.nn.lora import Adapted, LoraConfig, adapt, adapters, merge
from arvis.noise import Noise
from arvis.systems import SYSTEMS
from arvis.walk import finish, generate
from arvis.weights import WeightsError, read_adapters, save_adapters
from small import built, small

REGISTERED = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]
CONFIG = LoraConfig(rank=2, alpha=3.0)


def generator(system):
    """The parts that are no tokenizer."""
    return [part for name, part in system.parts().items() if name != "tokenizer"]


def batch(system):
    """Three pictures with conditions."""
    y, x = (side * system.tokenizer.config.downsample for side in system.tokenizer.layout().levels[-1])
    kind = next(p.dtype for p in system.parameters() if p.is_floating_point())
    image = (torch.rand(3, 3, y, x, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(kind)
    return {"image": image, **{k: v for k, v in REQUEST.items() if k in system.conditions}}


def fresh(slug):
    """A tiny system whose weights are its own, and the same with adapters that have learned something."""
    plain = copy.deepcopy(built(slug)[0]).eval()
    adapted = copy.deepcopy(plain)
    adapt(adapted, CONFIG, generator(adapted))
    return plain, adapted


def teach(system, seed=0):
    """Adapters that change the network."""
    torch.manual_seed(seed)
    for layer in adapters(system).values():
        nn.init.normal_(layer.up, std=0.3)


def loss(system):
    return system.loss(batch(system), Noise.of(0, 3))["loss"]


def draw(system):
    sampling = system.Sampling.plain()
    last = finish(generate(system, system.prepare(REQUEST), sampling, Noise.of(0, 3)))
    return last.tokens


@pytest.mark.parametrize("slug", REGISTERED)
def test_a_fresh_adapter_changes_nothing(slug):
    plain, adapted = fresh(slug)
    assert torch.equal(loss(plain), loss(adapted))
    with torch.inference_mode():
        assert torch.equal(draw(plain), draw(adapted))


@pytest.mark.parametrize("slug", REGISTERED)
def test_adapters_alone_learn(slug):
    plain, adapted = fresh(slug)
    halves = {f"{n}.{half}" for n in adapters(adapted) for half in ("down", "up")}
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == halves
    teach(adapted)
    loss(adapted).backward()
    silent = [n for n, p in adapted.named_parameters() if n in halves and not (p.grad is not None and p.grad.any())]
    used = {n for n, p in plain.named_parameters() if _grad(plain, n)}
    assert not [n for n in silent if n.rpartition(".")[0] + ".weight" in used], silent
    wrong = [n for n in adapters(adapted) if n.startswith("tokenizer.")]
    assert adapters(adapted) and not wrong


def _grad(system, name, done={}):  # noqa: B006
    """Whether the plain system's loss moves a parameter."""
    if id(system) not in done:
        for p in system.parameters():
            p.requires_grad_(True)
        loss(system).backward()
        done[id(system)] = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
    return name in done[id(system)]


@pytest.mark.parametrize("slug", REGISTERED)
def test_merged_is_adapted(slug):
    plain, adapted = fresh(slug)
    teach(adapted)
    plain, adapted = plain.double(), adapted.double()
    before, changed_ = loss(plain), loss(adapted)
    assert float((before - changed_).abs().detach()) > 1e-4, "the adapters do something"
    state = {n: layer.weight for n, layer in adapters(adapted).items()}
    merge(adapted)
    assert not adapters(adapted) and {*plain.state_dict()} == {*adapted.state_dict()}
    assert all(torch.equal(adapted.get_submodule(n).weight, weight) for n, weight in state.items())
    assert float(loss(adapted).detach()) == pytest.approx(float(changed_.detach()), abs=1e-9)


@pytest.mark.parametrize("slug", REGISTERED)
def test_a_file_of_adapters_makes_the_merged_model(slug, tmp_path):
    model, adapted = small(slug), fresh(slug)[1]
    teach(adapted)
    config = arvis.config.to_dict(model.config)
    start = model.save_pretrained(tmp_path / "base")
    about = {"system": slug, "config": config, "base": str(start), "scale": CONFIG.scale}
    path = save_adapters(adapted, tmp_path / "lora.safetensors", **about)
    assert {*read_adapters(path).tensors} == {f"{n}.{half}" for n in adapters(adapted) for half in ("down", "up")}
    one, two = model.with_lora(path), arvis.load(path)  # onto a model at hand, and with the model that it names
    merge(adapted)
    expected = adapted.state_dict()
    for other in (one, two):
        assert all(torch.equal(t, expected[n]) for n, t in other.system.state_dict().items())
    assert all(torch.equal(t, built(slug)[0].state_dict()[n]) for n, t in model.system.state_dict().items())
    layer = next(iter(read_adapters(path).layers))
    with torch.no_grad():
        wrong = copy.deepcopy(model.system)
        wrong.get_submodule(layer).weight[0, 0] += 1e-3
    model.system, kept = wrong, model.system
    with pytest.raises(WeightsError, match="was made for the weights"):
        model.with_lora(path)
    model.system = kept


def test_files_that_are_no_adapters(tmp_path):
    folder = small("brush").save_pretrained(tmp_path / "base")
    for path, told in ((tmp_path / "x", "no file"), (folder / "model.safetensors", "holds no LoRA adapters")):
        with pytest.raises(WeightsError, match=told):
            small("brush").with_lora(path)


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4, bias=False))


def test_the_formula():
    layer = Adapted(nn.Linear(5, 7), 2, 1.5)
    nn.init.normal_(layer.up)
    x = torch.randn(3, 5)
    expected = x @ (layer.base.weight + 1.5 * layer.up @ layer.down).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_targets_and_what_is_trained_whole():
    module = toy()
    assert adapt(module, LoraConfig(rank=2, targets=("3",), also=("1.",))) == ["3"]
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {"3.down", "3.up", "1.weight", "1.bias"}
    for wrong, told in ({"targets": ("qkv",)}, "holds one of"), ({"also": ("qkv",)}, "holds 'qkv'"):
        with pytest.raises(ValueError, match=told):
            adapt(toy(), LoraConfig(rank=2, **wrong))
    with pytest.raises(ValueError, match="cannot be negative"):
        LoraConfig(rank=-1)
    assert LoraConfig(rank=4, alpha=8.0).scale == 2.0 and LoraConfig(rank=4).scale == 1.0


def test_bfloat16_is_the_same_at_first_and_learns():
    x = torch.randn(4, 6)
    plain, adapted = toy(), toy()
    adapt(adapted, LoraConfig(rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), adapted(x))
        adapted(x).float().square().mean().backward()
    ups = [layer.up.grad for layer in adapters(adapted).values()]
    assert all(g is not None and g.dtype == torch.float32 and g.any() for g in ups)
    with torch.autocast("cpu", torch.bfloat16):
        weight = adapters(adapted)["0"].weight
    assert weight.dtype == torch.float32, "the sum that fused layers take is not rounded"
