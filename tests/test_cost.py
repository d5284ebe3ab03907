"""Costs are counted as the code runs: against torch's own counter, formulas, and a machine made of two numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arvis import cost
from arvis.noise import Noise
from arvis.systems import SYSTEMS
from arvis.systems import system as module_of

REGISTERED = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]


def counted(slug: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> cost.Cost:
    with torch.device("meta"):
        system = module_of(slug).tiny().eval()
    return cost.count(system, system.Sampling(), batch, dtype)


@pytest.mark.parametrize("slug", REGISTERED)
def test_operations_are_those_of_a_real_run(slug: str) -> None:
    """A count that forgets a guidance row, a step, the decoder or a kind of call differs from torch's counter."""
    torch.manual_seed(0)
    system = module_of(slug).tiny().eval()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        s = system.start(None, system.Sampling(), Noise.of(0, 2))
        while not bool(s.done.all()):
            d = system.predict(s)
            system.commit(s, d, d.sample(s.noise))
        system.tokenizer.decode(s.tokens, s.layout)
    assert counted(slug).flops == theirs.get_total_flops()


@pytest.mark.parametrize("slug", REGISTERED)
def test_work_grows_with_the_batch_and_bytes_with_the_number_format(slug: str) -> None:
    one, four, half = counted(slug, 1), counted(slug, 4), counted(slug, 1, torch.bfloat16)
    assert one.flops < four.flops <= 4 * one.flops and one.weights == four.weights
    assert half.flops == one.flops and one.weights / 2 <= half.weights < one.weights
    assert one.steps == four.steps >= 1 and one.working < four.working


def test_the_work_of_a_call_is_that_of_its_phase() -> None:
    with torch.device("meta"):
        system = module_of("var").tiny().eval()
    s = system.start(None, system.Sampling(), Noise.of(0, 2, "meta"))
    assert cost.work(lambda: system.tokenizer.decode(s.tokens, s.layout)) == counted("var").phases["decode"] != []


def test_the_floor_waits_for_arithmetic_or_for_memory() -> None:
    work = cost.Work([(100.0, 1.0), (1.0, 100.0)])
    machine = cost.Machine(device="cpu", dtype=torch.float32, flops=10.0, bandwidth=10.0)
    assert work.floor(machine) == 10.0 + 10.0 and (work.flops, work.bytes) == (101.0, 101.0)


def test_the_machine_is_measured() -> None:
    machine = cost.measure(torch.float32, seconds=0.05)
    assert 1e8 < machine.flops < 1e15 and 1e8 < machine.bandwidth < 1e13
