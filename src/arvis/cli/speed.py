"""What a generation takes: counted (`arvis info NAME --cost`) and measured (`arvis bench NAME`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from arvis import systems
from arvis.cli.settings import Set
from arvis.cli.terminal import progress


def print_cost(
    name: str, system: Any, sampling: Any, batch: int, precision: str, device: str, changes: Sequence[str]
) -> None:
    """The counted work of a system on the meta device, by phase, beside what the machine does."""
    import torch

    from arvis import cost
    from arvis.config import override
    from arvis.loading import resolve_device

    if batch < 1:
        raise ValueError(f"batch is the number of pictures at once, at least 1, got {batch}")
    number, sampling = getattr(torch, precision), override(sampling, list(changes))
    counted = cost.count(system.eval(), sampling, batch, number)
    machine = cost.measure(number, resolve_device(device))
    print(f"{name}, batch {batch}, {precision}: {counted.steps} steps")
    print(f"  {'phase':<12} {'GFLOP':>10} {'GB moved':>10} {'at least':>10}")
    for phase, work in counted.phases.items():
        if work:
            print(f"  {phase:<12} {work.flops / 1e9:10,.1f} {work.bytes / 1e9:10.2f} {work.floor(machine):8.3f} s")
    print(f"  {'all':<12} {counted.flops / 1e9:10,.1f} {'':10} {counted.floor(machine):8.3f} s")
    for what in ("weights", "cache", "working", "peak"):
        print(f"  {what:<12} {getattr(counted, what) / 2**20:10,.1f} MiB")
    speed = f"{machine.flops / 1e9:,.0f} GFLOP/s in {precision}, {machine.bandwidth / 1e9:,.1f} GB/s"
    print(f"  this machine ({machine.device}): {speed}")


def bench(
    name: Positional[str],
    /,
    batch: Annotated[tuple[int, ...], arg(aliases=["-b"])] = (1,),
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    repeats: int = 3,
    plain: bool = False,
    compile: bool = False,
    device: str = "auto",
    set: Set = (),
) -> None:
    """Measure a model's speed on this machine: until the first step, until the pictures; the share of the least time.

    Weights are random and nothing is downloaded, as speed does not depend on them. The median of the repeats counts,
    after one run that is not timed.

    Args:
        name: A preset, such as var-d16.
        batch: Pictures at once; several numbers are measured one after another.
        precision: The number format; auto takes bfloat16 where that pays on this machine.
        repeats: How many timed runs.
        plain: Leave the weights as they are, instead of laying them out for this machine.
        compile: Run the steps as one compiled graph, for systems of one code per step.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Sampling settings, such as cfg_scale=1.
    """
    import torch

    from arvis import cost
    from arvis.config import override
    from arvis.loading import compile_steps, empty, resolve_device
    from arvis.nn.packed import pack
    from arvis.training.precision import pick

    if repeats < 1 or any(b < 1 for b in batch):
        raise ValueError(f"batch and repeats are at least 1, got {batch} and {repeats}")
    slug, full, preset = systems.preset(name)
    place = resolve_device(device)
    chosen = pick(place, precision)
    system = systems.system(slug).build(preset.config()).eval().to(place)
    known = {field.name for field in fields(system.Sampling)}
    settings = {key: value for key, value in preset.sampling.items() if key in known}
    sampling = override(replace(system.Sampling(), **settings), list(set))
    shape, machine = empty(slug, preset.config()).eval(), cost.measure(chosen.dtype, place)
    if not plain:
        pack(system)
    if compile:
        compile_steps(system, full)
    print(f"{full} on {place}: {chosen.reason}")
    for count in batch:
        runs = []
        with progress(repeats + 1, "run") as bar:
            for _ in range(repeats + 1):
                with chosen.around(), torch.inference_mode():
                    runs.append(_timed(system, sampling, count, place.type == "cuda"))
                bar.update()
        first, total = (statistics.median(times) for times in zip(*runs[1:], strict=True))
        floor = cost.count(shape, sampling, count, chosen.dtype).floor(machine)
        print(
            f"  batch {count:<4} first step {first:8.3f} s, all {total:8.3f} s, {count / total:8.2f} pictures/s; "
            f"counted floor {floor:.3f} s, {floor / total:.0%} of it reached"
        )


def _timed(system: Any, sampling: Any, batch: int, cuda: bool) -> tuple[float, float]:
    """Seconds until the first step, and until the pictures are there."""
    import torch

    from arvis.noise import Noise
    from arvis.walk import generate

    request = {"prompt": ["a red apple"] * batch, "class_labels": [0] * batch}
    cond = system.prepare({key: value for key, value in request.items() if key in system.conditions})
    steps = generate(system, cond, sampling, Noise.of(0, batch, next(system.parameters()).device))
    start = time.perf_counter()
    s = next(steps).state
    first = time.perf_counter() - start
    for step in steps:
        s = step.state
    system.tokenizer.decode(s.tokens, s.layout)
    if cuda:
        torch.cuda.synchronize()
    return first, time.perf_counter() - start
