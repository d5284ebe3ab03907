"""M-VAR: what a state space from scale to scale costs beside VAR's attention, at the official sizes, and here."""

from __future__ import annotations

from typing import Any

import torch

from arvis.cost import Cost, Counting, count
from arvis.nn.mamba import Mamba2, Mamba2Config
from arvis.noise import Noise
from arvis.rows import Rows, render, same, upto
from arvis.systems import m_var, var
from arvis.tokens import Layout, pyramid
from benchmarks.effects import Effect, fastest

SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
"""A list for pictures of 1024 pixels, to see how costs grow."""


def painting(cost: Cost) -> float:
    """Operations of the transformer; the tokenizer's decoder is the same for both."""
    return cost.flops - cost.phases["decode"].flops


def pairs(layout: Layout, see: Any) -> int:
    """Query-key pairs of one layer over all scales."""
    rows = Rows.of(layout.level_N)
    mask = render(see, rows, rows)
    return layout.n**2 if mask is None else int(mask.sum())


def across(layout: Layout, width: int) -> tuple[float, float]:
    """Operations of one layer that carry something from scale to scale: products of VAR's attention with the keys and
    values of coarser scales, and the scan without its projections."""
    attention = 4.0 * width * (pairs(layout, upto) - pairs(layout, same))
    with torch.device("meta"):
        mixer, x = Mamba2(width, Mamba2Config()), torch.empty(1, layout.n, width)
    with Counting(4) as counting:
        mixer(x)
    projections = 2.0 * layout.n * sum(p.numel() for p in (mixer.in_proj.weight, mixer.out_proj.weight))
    return attention, counting.work.flops - projections


def meta(module: Any, config: Any) -> Any:
    with torch.device("meta"):
        return module.build(config).eval()


def counted() -> list[Effect]:
    costs, sizes = {}, {}
    for name in ("var-d24", "var-d30", "m-var-d24", "m-var-d30"):
        module = m_var if name.startswith("m-var") else var
        system = meta(module, module.PRESETS[name].config())
        sizes[name] = sum(p.numel() for p in system.transformer.parameters())
        costs[name] = count(system, system.Sampling(), 1, torch.float16)
    few, many = pyramid(var.PATCH_NUMS_256), pyramid(SCALES_1024)
    rows, grown = across(few, 1536), across(many, 1536)
    return [
        Effect(
            quantity="parameters, M-VAR-d24 over VAR-d30",
            value=sizes["m-var-d24"] / sizes["var-d30"],
            unit="x",
            how="counted",
            published="1.5B / 2B",
            note="the pair that the abstract compares",
        ),
        Effect(
            quantity="operations of the transformer, VAR-d30 over M-VAR-d24",
            value=painting(costs["var-d30"]) / painting(costs["m-var-d24"]),
            unit="x",
            how="counted",
            published="faster",
            note="one picture with guidance, state kept from scale to scale",
        ),
        Effect(
            quantity="operations of the transformer at equal depth, VAR-d24 over M-VAR-d24",
            value=painting(costs["var-d24"]) / painting(costs["m-var-d24"]),
            unit="x",
            how="counted",
            note="at 256 pixels the mixer's projections outweigh what attention saves",
        ),
        Effect(
            quantity="bytes kept of the past, VAR-d30 over M-VAR-d30",
            value=costs["var-d30"].cache / costs["m-var-d30"].cache,
            unit="x",
            how="counted",
            note="424 rows of keys and values against two states of each block (the last step can be repeated)",
        ),
        Effect(
            quantity="query-key pairs of a layer, VAR over M-VAR",
            value=pairs(few, upto) / pairs(few, same),
            unit="x",
            how="counted",
            note=f"{pairs(few, upto):,} and {pairs(few, same):,} at 256 pixels",
        ),
        Effect(
            quantity="operations from scale to scale in a layer of width 1536, attention over scan, 256 pixels",
            value=rows[0] / rows[1],
            unit="x",
            how="counted",
            note="products with keys and values of coarser scales; the scan without its projections, in chunks of 64",
        ),
        Effect(
            quantity="the same at 1024 pixels",
            value=grown[0] / grown[1],
            unit="x",
            how="counted",
            note=f"{many.n:,} tokens in {many.K} scales: attention grows with the square, the scan with the tokens "
            f"({grown[0] / rows[0]:.0f}x and {grown[1] / rows[1]:.1f}x for {many.n / few.n:.1f}x the tokens)",
        ),
    ]


# -- in seconds ---------------------------------------------------------------------------------------------------


def small(module: Any, patch_nums: tuple[int, ...], depth: int = 4, width: int = 256) -> Any:
    """Random weights at a small width."""
    cnn = var.CNNConfig(ch=32, ch_mult=(1,), num_res_blocks=1)
    tokenizer = var.PyramidVQConfig(patch_nums=patch_nums, vocab_size=64, z_channels=32, cnn=cnn)
    scale = var.VARConfig(tokenizer=tokenizer, depth=depth, width=width, heads=width // 64)
    torch.manual_seed(0)
    return module.build(m_var.MVarConfig(scale=scale) if module is m_var else scale).eval()


@torch.inference_mode()
def last_seconds(system: Any, limit: float) -> float:
    """Of the last scale's prediction with guidance."""
    s = system.start(None, system.Sampling(), Noise.of(0, 1))
    while s.at() < s.K - 1:
        d = system.predict(s)
        system.commit(s, d, d.sample(s.noise))
    return fastest(lambda: system.predict(s), limit)


def measured(
    side: int = 32, coarser: tuple[int, ...] = (1, 8, 16, 24, 28, 30, 31), limit: float = 15.0
) -> list[Effect]:
    """How much longer the last scale takes when many rows came before it instead of one."""
    out = []
    for name, module in (("VAR", var), ("M-VAR", m_var)):
        alone, after = (last_seconds(small(module, (*scales, side)), limit) for scales in ((1,), coarser))
        out.append(
            Effect(
                quantity=f"seconds of a scale of {side}x{side} after {sum(n * n for n in coarser):,} coarser rows over "
                f"after one, {name}",
                value=after / alone,
                unit="x",
                how="measured",
                note=f"4 layers of width 256, batch 1 with guidance, float32; {1000 * alone:.0f} ms after one",
            )
        )
    return out
