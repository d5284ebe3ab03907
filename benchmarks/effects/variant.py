"""VARiant: what fewer layers in late scales save, at the official size, and in seconds here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from arvis.cost import Cost, count
from arvis.noise import Noise
from arvis.systems import var
from arvis.systems.variant import PRESETS, Variant, build
from benchmarks.effects import Effect, fastest

DEPTHS = (16, 8, 4, 2)
MEMORY = {16: "40%", 8: "65%", 2: "80%"}
FULL = 6
"""Scales that pass all layers: the one number of them that gives the published savings of memory."""


def painting(cost: Cost) -> float:
    """Operations of the transformer; the tokenizer's decoder is the same at every depth."""
    return cost.flops - cost.phases["decode"].flops


@torch.inference_mode()
def held(system: Variant, sampling: Any, last: bool) -> int:
    """Bytes of keys and values after the last scale in float16, with its own rows or without."""
    s = system.start(None, sampling, Noise.of(0, 1, "meta"))
    if last:
        s.cache["trunk"].reserve(s.layout.n)
    while not bool(s.done.all()):
        d = system.predict(s)
        system.commit(s, d, d.sample(s.noise))
    cache = s.cache["trunk"]
    return 2 * sum(x.numel() for store in (cache.k, cache.v) for x in store.values())


def counted() -> list[Effect]:
    with torch.device("meta"):
        system = build(PRESETS["variant-d16"].config()).eval()
    whole = system.Sampling(depth=0, full_scales=FULL)
    all_rows, kept_rows = held(system, whole, True), held(system, whole, False)
    most, out = painting(count(system, whole)), []
    for depth in DEPTHS:
        few = replace(whole, depth=depth)
        name = f"{depth} of 30 layers after scale {FULL}, against VAR-d30"
        saved = 100 * (1 - held(system, few, True) / all_rows)
        out += [
            Effect(
                quantity=f"keys and values that are saved, {name}",
                value=saved,
                unit="%",
                how="counted",
                published=MEMORY.get(depth, ""),
                note="all 680 rows, nothing given up, as published",
            ),
            Effect(
                quantity=f"the same, with what is given up after scale {FULL}",
                value=100 * (1 - held(system, replace(few, free=True), False) / kept_rows),
                unit="%",
                how="counted",
                note="without the rows of the last scale, which nobody reads, on both sides",
            ),
            Effect(
                quantity=f"operations of the transformer, VAR-d30 over {depth} layers after scale {FULL}",
                value=most / painting(count(system, few)),
                unit="x",
                how="counted",
                published="3.5x faster" if depth == 2 else "",
                note="with guidance, on the meta device; the published number is time on one GPU",
            ),
        ]
    return out


# -- in seconds ---------------------------------------------------------------------------------------------------


def small(depth: int = 30, width: int = 192, patch_nums: tuple[int, ...] = var.PATCH_NUMS_256) -> Variant:
    """The published depth and scales at a small width, random weights."""
    cnn = var.CNNConfig(ch=32, ch_mult=(1,), num_res_blocks=1)
    tokenizer = var.PyramidVQConfig(patch_nums=patch_nums, vocab_size=512, z_channels=32, cnn=cnn)
    torch.manual_seed(0)
    base = var.build(var.VARConfig(tokenizer=tokenizer, depth=depth, width=width, heads=width // 32))
    return Variant(base, FULL, 0).eval()


@torch.inference_mode()
def painted(system: Any, sampling: Any) -> None:
    """The tokens of one picture with guidance, without its decoding."""
    s = system.start(None, sampling, Noise.of(0, 1))
    while not bool(s.done.all()):
        d = system.predict(s)
        system.commit(s, d, d.sample(s.noise))


def measured(net: Any = None, limit: float = 20.0) -> list[Effect]:
    """`limit` seconds are given to each depth."""
    net = small() if net is None else net
    taken = {d: fastest(lambda d=d: painted(net, net.Sampling(depth=d)), limit) for d in (0, *DEPTHS)}
    return [
        Effect(
            quantity=f"seconds of a picture's tokens, all layers over {depth} after scale {FULL}",
            value=taken[0] / taken[depth],
            unit="x",
            how="measured",
            published="3.5x" if depth == 2 else "",
            note=f"width 192, 680 tokens, one picture with guidance, float32; all layers take {taken[0]:.2f} s",
        )
        for depth in DEPTHS
    ]
