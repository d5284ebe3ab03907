"""Activation checkpointing: the same gradients bit for bit, from less memory, in every system that has blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from arvis import systems
from arvis.loading import picture_size
from arvis.noise import Noise
from arvis.training.fit import FitConfig, fit
from arvis.training.recompute import listed, recomputed
from small import built
from training import worker

TRAINED = [slug for slug, row in systems.SYSTEMS.items() if row.kind == "system"]


class Held(TorchDispatchMode):
    """Bytes of what was computed and is still held, by the graph or by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def _trained(slug: str) -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    """A system with dropout everywhere, its parts with blocks, and a batch of two pictures."""
    system = copy.deepcopy(built(slug)[0]).train()
    system.tokenizer.requires_grad_(False).eval()
    for module in system.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(1)
    batch = {"image": torch.rand(2, 3, *picture_size(system)) * 2 - 1, "step": 0, "steps": 10}
    parts = [part for name, part in system.parts().items() if name != "tokenizer"]
    return system, parts, {**batch, "prompt": ["red apple", "a blue bus"], "class_labels": [0, 1]}


def _update(system: Any, batch: dict[str, Any], around: Callable[[], Any]) -> tuple[dict[str, Tensor], int]:
    """Gradients, and what is held between the passes."""
    system.zero_grad()
    torch.manual_seed(7)
    with around(), Held() as held:
        loss = system.loss(batch, Noise.of(3, 2))["loss"]
        kept = held.bytes
        loss.backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("slug", TRAINED)
def test_gradients_are_the_same_bits_from_less_memory(slug: str) -> None:
    system, parts, batch = _trained(slug)
    plain, much = _update(system, batch, nullcontext)
    again, little = _update(system, batch, lambda: recomputed(parts))
    assert plain.keys() == again.keys() and any(bool(g.any()) for g in plain.values())
    assert all(torch.equal(plain[n], again[n]) for n in plain), [
        n for n in plain if not torch.equal(plain[n], again[n])
    ]
    assert little < 0.8 * much, f"{little} of {much} bytes are still held"
    assert not any("forward" in vars(m) for m in system.modules()), "the blocks are as they were"


def test_dropout_is_drawn_once() -> None:
    """Without the generator put back, the second run would drop others: the test above would not notice at p = 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Tanh())]))
    block, x, grads = net[0][0], torch.randn(64, 5), []
    for around in (nullcontext(), recomputed([net])):
        net.zero_grad()
        torch.manual_seed(1)
        with around:
            block(x).sum().backward()
        grads.append(block[0].weight.grad.clone())
    torch.manual_seed(2)
    net.zero_grad()
    block(x).sum().backward()
    assert torch.equal(*grads) and not torch.equal(grads[0], block[0].weight.grad)


def test_which_blocks() -> None:
    """The outermost members of lists, nested lists among them; what has no parameters is not worth it."""
    inner = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    net = nn.ModuleDict({"a": nn.ModuleList([inner, nn.Identity()]), "b": nn.Linear(1, 1)})
    assert list(listed(net)) == [inner]
    assert list(listed(nn.ModuleList([nn.ModuleList([inner])]))) == [inner]
    with pytest.raises(ValueError, match="activation_checkpointing"):
        recomputed([net["b"]])


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.GELU()) for _ in range(3))

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        x = batch["image"]
        for block in self.blocks:
            x = block(x)
        return {"loss": (x - batch["image"].flip(1)).square().mean()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_the_flag_is_the_run_without(tmp_path: Path, compiled: bool) -> None:
    weights = []
    for flag in (False, True):
        net = _Net()
        config = FitConfig(
            steps=3, batch=8, accumulate=2, precision="float32", activation_checkpointing=flag, compile=compiled
        )
        fit(net, net.loss, worker.data, config, tmp_path / str(flag), blocks=lambda module: [module])
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(*weights, atol=1e-6) if compiled else torch.equal(*weights)
    with pytest.raises(ValueError, match="names none"):
        fit(_Net(), net.loss, worker.data, config, tmp_path / "none")
    assert not (tmp_path / "none").exists()
