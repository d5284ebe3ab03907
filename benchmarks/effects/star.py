"""STAR: what drawing the large scales in causal steps costs at 1024 pixels, and what it is good for."""

from __future__ import annotations

import torch

from arvis.checks.star import Length, alike, learn_patterns
from arvis.cost import Cost, count
from arvis.systems.star import PRESETS, Inside, STARSampling, build
from benchmarks.effects import Effect

STEPS = Length().patterns
"""Updates of the model of patterns."""


def cost(inside: Inside) -> Cost:
    """Of one guided picture of 1024 pixels, on the meta device."""
    preset = PRESETS["star-1024-d30-sampler"]
    with torch.device("meta"):
        system = build(preset.config()).eval()
    return count(system, STARSampling(**{**preset.sampling, "inside": inside}), 1, torch.float16)


def counted() -> list[Effect]:
    alone, steps = cost("independent"), cost("mixed")
    return [
        Effect(
            quantity="operations of a picture of 1024 pixels",
            value=steps.flops / 1e12,
            unit="TFLOP",
            how="counted",
            published="2.21 s on an A100",
            note=f"guidance, {steps.steps} scales, the large ones in causal steps as released; decoder included",
        ),
        Effect(
            quantity="operations of a picture of 1024 pixels, in causal steps over all at once",
            value=steps.flops / alone.flops,
            unit="x",
            how="counted",
            note="4 of 14 scales are drawn in 8 steps, the last in 15; the transformer runs once for each scale",
        ),
    ]


def measured() -> list[Effect]:
    """Pictures whose last scale has one code everywhere, any of 16: the check's patterns."""
    system = learn_patterns(STEPS, lambda: None)
    out = []
    kinds: tuple[tuple[Inside, str], ...] = (("independent", "at once"), ("stable", "in 8 steps"))
    for inside, told in kinds:
        with torch.inference_mode():
            share = alike(system, inside, 500)
        out.append(
            Effect(
                quantity=f"last scales of one code everywhere, drawn {told}",
                value=100 * share,
                unit="%",
                how="measured",
                note="16 tokens of 16 codes that the coarser scales say nothing of; 100 % in training",
            )
        )
    return out
