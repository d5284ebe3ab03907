"""Schedules against values worked out by hand, and the update rules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from arvis.training import ema, schedule
from arvis.training.optimizers import Part, build


def test_lin0_is_vars_schedule() -> None:
    lr = [schedule.lin0(t, 1001, 100, final=0.1) for t in range(1001)]
    assert lr[0] == 0.005 and lr[50] == pytest.approx(0.5025)
    assert lr[100] == lr[144] == 1.0
    assert lr[145] == pytest.approx(0.1 + 0.9 * (1 - 45 / 900) / 0.95) == pytest.approx(1.0)
    assert lr[550] == pytest.approx(0.1 + 0.9 * 0.5 / 0.95)
    assert lr[1000] == pytest.approx(0.1)
    assert lr[100:] == sorted(lr[100:], reverse=True)


def test_cosine_constant_and_decay() -> None:
    assert schedule.cosine(60, 111, 10) == pytest.approx(0.5)
    assert schedule.cosine(110, 111, 10, final=0.2) == pytest.approx(0.2)
    assert schedule.factor("constant", 5, 100, 10, 0.0) == pytest.approx(0.5025)
    assert schedule.factor("constant", 99, 100, 10, 0.0) == 1.0
    assert schedule.decay(50, 101, 0.04, 0.08) == pytest.approx(0.06)
    assert schedule.decay(50, 101, 0.04, None) == 0.04
    with pytest.raises(ValueError, match="lin0, cosine or constant"):
        schedule.factor("sine", 0, 1, 0, 0.0)  # type: ignore[arg-type]


def test_what_is_not_decayed() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
    groups = schedule.groups(module.named_parameters(), ("2.weight",))
    decayed = next(group["params"] for group in groups if group["decay"])
    assert [p.shape for p in decayed] == [torch.Size((3, 2))]


def test_weight_decay_reaches_only_its_group() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    (optimizer,) = build(module, Part(names=(), loss="loss", lr=0.1), (), ())
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5, 0.2)
    for name, p in module.named_parameters():
        factor = 1 - 0.1 * 0.5 * 0.2 if name == "0.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_every_parameter_has_one_owner() -> None:
    module = nn.ModuleDict({"main": nn.Linear(2, 2), "disc": nn.Linear(2, 1)})
    main, part = Part(names=(), loss="loss"), Part(names=("disc.",), loss="loss_disc")
    first, second = build(module, main, (part,), ())
    assert set(first.named) == {"main.weight", "main.bias"} and set(second.named) == {"disc.weight", "disc.bias"}
    with pytest.raises(ValueError, match="other"):
        build(module, main, (Part(names=("other.",), loss="x"),), ())


def test_average_follows_its_recursion_and_swaps_back() -> None:
    module = nn.Linear(3, 2)
    named = dict(module.named_parameters())
    average = ema.start(named)
    expected = {name: p.detach().double() for name, p in named.items()}
    for n in range(30):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * math.sin(n))
        d = min(0.9, (1 + n) / (10 + n))
        ema.update(average, named, ema.warmed(0.9, n))
        expected = {name: d * e + (1 - d) * named[name].detach().double() for name, e in expected.items()}
    for name in named:
        torch.testing.assert_close(average[name].double(), expected[name], atol=1e-6, rtol=0)
    own = module.weight.detach().clone()
    with ema.swapped(module, average):
        assert torch.equal(module.weight, average["weight"]) and not torch.equal(module.weight, own)
    assert torch.equal(module.weight, own)
