"""CoDe: what is saved when a small model draws the fine scales, at the official sizes and in seconds here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from arvis.cost import Cost, count
from arvis.noise import Noise
from arvis.systems.code import CodeSampling, build, official
from arvis.walk import walk
from benchmarks.effects import Effect

BATCH = 64
"""Pictures at once, as in the published measurements of memory and speed."""

SIZES = ("depth", "width", "heads")

PUBLISHED = {8: "1.7x", 6: "2.9x"}


def costs(handover: int) -> tuple[Cost, Cost, float]:
    """Of the pair and of VAR-d30 alone, a batch in bfloat16 with guidance, on the meta device; and what of the keys and
    values at the peak is left."""
    with torch.device("meta"):
        pair, drafter = build(official(handover)).eval(), official(handover).drafter
        large = drafter.module.build(drafter.config).eval()
    settings = {pair: CodeSampling(), large: large.Sampling(cfg_scale=1.5)}
    few, many = (walked(system, sampling, 1, "meta")[1] for system, sampling in settings.items())
    ours, theirs = (count(system, sampling, BATCH, torch.bfloat16) for system, sampling in settings.items())
    return ours, theirs, few / many


def painting(cost: Cost) -> float:
    """Operations of the transformers; the tokenizer's decoder is the same for both."""
    return cost.flops - cost.phases["decode"].flops


def held(cost: Cost) -> int:
    """Bytes beside the weights at the fullest moment: caches and what is worked on."""
    return cost.cache + cost.working


def counted() -> list[Effect]:
    out = []
    for handover, published in PUBLISHED.items():
        pair, large, rows = costs(handover)
        name = f"VAR-d30 over d30 + d16, N = {handover}, batch {BATCH}"
        out += [
            Effect(
                quantity=f"operations of the transformers, {name}",
                value=painting(large) / painting(pair),
                unit="x",
                how="counted",
                published=f"{published} faster",
                note="calls on the meta device; the published number is time on one GPU",
            ),
            Effect(
                quantity=f"keys and values at the peak, {name}",
                value=1 / rows,
                unit="x",
                how="counted",
                published="about half the memory",
                note="the drafter's are dropped at the hand-over",
            ),
            Effect(
                quantity=f"bytes beside the weights at the peak, {name}",
                value=held(large) / held(pair),
                unit="x",
                how="counted",
                published="about half the memory",
                note="bfloat16, guidance on, most that lives at once; both models' weights stay",
            ),
            Effect(
                quantity=f"bytes at the peak with all weights, {name}",
                value=large.peak / pair.peak,
                unit="x",
                how="counted",
                published="about half the memory",
                note="bfloat16",
            ),
        ]
    return out


@torch.inference_mode()
def walked(system: Any, sampling: Any, items: int, device: str = "cpu") -> tuple[float, int]:
    """Seconds of a batch, and the most bytes of keys and values that were held."""
    most, began = 0, time.perf_counter()
    s = system.start(None, sampling, Noise.of(0, items, device))
    for _ in walk(system, s):
        most = max(most, sum(x.nbytes for c in s.cache.values() for x in (*c.k.values(), *c.v.values())))
    return time.perf_counter() - began, most


def measured(items: int = 2, shrink: int = 2) -> list[Effect]:
    """The official scales with both models at half of their width and depth, random weights, float32."""
    whole = official(8)
    drafter, refiner = (
        replace(part, changes=tuple(f"{name}={getattr(part.config, name) // shrink}" for name in SIZES))
        for part in (whole.drafter, whole.refiner)
    )
    large = drafter.module.build(drafter.config).eval()
    plain = large.Sampling(cfg_scale=1.5)
    alone, room = min(walked(large, plain, items) for _ in range(3))
    out, (deep, shallow) = [], (part.config.depth for part in (drafter, refiner))
    for handover, published in PUBLISHED.items():
        pair = build(replace(whole, drafter=drafter, refiner=refiner, handover=handover)).eval()
        spent, kept = min(walked(pair, CodeSampling(), items) for _ in range(3))
        name = f"VAR-d{deep} over d{deep} + d{shallow}, N = {handover}, batch {items}"
        note = f"scales of 256 pixels, float32, {torch.get_num_threads()} threads, without the decoder"
        out += [
            Effect(
                quantity=f"seconds of a batch, {name}",
                value=alone / spent,
                unit="x",
                how="measured",
                published=f"{published} faster",
                note=note,
            ),
            Effect(
                quantity=f"peak of keys and values, {name}",
                value=room / kept,
                unit="x",
                how="measured",
                published="about half the memory",
                note=note,
            ),
        ]
    return out
