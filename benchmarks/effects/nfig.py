"""NFIG: the pictures of VAR-d20 by a transformer of half its size."""

from __future__ import annotations

import time
from typing import Any

import torch

from arvis.cost import Cost, count
from arvis.noise import Noise
from arvis.systems import nfig, var
from arvis.walk import walk
from benchmarks.effects import Effect

OURS, THEIRS = "nfig-310m", "var-d20"


def official(name: str) -> Any:
    """A published system, with random weights where tensors are made."""
    module: Any = nfig if name in nfig.PRESETS else var
    return module.build(module.PRESETS[name].config()).eval()


def sampling(name: str) -> Any:
    module: Any = nfig if name in nfig.PRESETS else var
    return var.VARSampling(**module.PRESETS[name].sampling)


def costs() -> dict[str, Cost]:
    """Of one guided picture of 256 pixels, on the meta device."""
    with torch.device("meta"):
        systems = {name: official(name) for name in (OURS, THEIRS)}
    return {name: count(system, sampling(name)) for name, system in systems.items()}


def counted() -> list[Effect]:
    found = costs()
    ours, theirs = found[OURS], found[THEIRS]
    drawing = [cost.flops - cost.phases["decode"].flops for cost in (theirs, ours)]
    note = f"both in {ours.steps} steps; the published number is time"
    return [
        Effect(
            quantity="operations of a picture, VAR-d20 over NFIG-310M",
            value=theirs.flops / ours.flops,
            unit="x",
            how="counted",
            published="1.25x faster",
            note=f"{note}, decoder included",
        ),
        Effect(
            quantity="operations of the transformer, VAR-d20 over NFIG-310M",
            value=drawing[0] / drawing[1],
            unit="x",
            how="counted",
            published="1.25x faster",
            note=note,
        ),
    ]


def measured() -> list[Effect]:
    """Tokens and picture, one at a time, the better of two."""
    seconds = {name: drawn(name) for name in (OURS, THEIRS)}
    return [
        Effect(
            quantity="seconds of a picture, VAR-d20 over NFIG-310M",
            value=seconds[THEIRS] / seconds[OURS],
            unit="x",
            how="measured",
            published="1.25x faster",
            note="official sizes, float32, random weights",
        )
    ]


@torch.inference_mode()
def drawn(name: str) -> float:
    system, best = official(name), float("inf")
    for _ in range(2):
        start = time.perf_counter()
        s = system.start(None, sampling(name), Noise.of(0))
        for _ in walk(system, s):
            pass
        system.tokenizer.decode(s.tokens)
        best = min(best, time.perf_counter() - start)
    return best
