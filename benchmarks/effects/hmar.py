"""HMAR: what it saves that a scale sees itself alone, and what the passes of its schedule cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arvis.cost import Counting
from arvis.nn.adaln import Look, masked
from arvis.nn.neighbourhood import InsideScales
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.rows import Rows, See, render, same, upto
from arvis.systems import hmar, var
from arvis.systems.hmar import REFINED, HMARSampling, Schedule
from arvis.systems.var import PATCH_NUMS_256, PATCH_NUMS_512
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import pyramid
from benchmarks.effects import Effect, fastest

LISTS = {256: PATCH_NUMS_256, 512: PATCH_NUMS_512}
BATCH = 64
"""Pictures whose memory is told."""


def pairs(sides: tuple[int, ...], see: See) -> int:
    """Rows that see each other in one layer."""
    layout = pyramid(sides)
    rows = Rows.of(layout.level_N)
    mask = render(see, rows, rows)
    return layout.n**2 if mask is None else int(mask.sum())


@torch.inference_mode()
def drawing(system: Any, sampling: Any) -> tuple[float, float, int, int]:
    """Of one picture on the meta device, in float16 and without its decoding: bytes of weights, bytes that live at once
    beside them, rows that pass through the head, and passes."""
    rows, passes = [], []

    def seen(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        rows.append(given[0].shape[1])
        passes.append(1)

    heads = [part for name, part in system.transformer.named_modules() if name.split(".")[-1] == "head"]
    hooks = [head.register_forward_pre_hook(seen) for head in heads]
    with Counting(2) as counting:
        s = system.start(None, sampling, Noise.of(0, 1, "meta"))
        while not bool(s.done.all()):
            d = system.predict(s)
            system.commit(s, d, d.sample(s.noise))
    for hook in hooks:
        hook.remove()
    weights = 2 * sum(p.numel() for p in system.transformer.parameters())
    return weights, counting.most, sum(rows), len(passes)


def counted() -> list[Effect]:
    out = [
        Effect(
            quantity=f"pairs that attention sees in a training pass at {size} pixels, VAR over HMAR",
            value=pairs(sides, upto) / pairs(sides, same),
            unit="x",
            how="counted",
            note=f"{pairs(sides, upto):,} over {pairs(sides, same):,} per layer, from the rules",
        )
        for size, sides in LISTS.items()
    ]
    with torch.device("meta"):
        base = var.build(var.PRESETS["var-d24"].config()).eval()
        system = hmar.build(hmar.PRESETS["hmar-d24"].config()).eval()
    settings = HMARSampling(**hmar.PRESETS["hmar-d24"].sampling)
    theirs = drawing(base, base.Sampling())
    ours = {
        "three scales in passes": drawing(system, settings),
        "at once": drawing(system, replace(settings, schedule=())),
    }
    mine = ours["three scales in passes"]
    note = "float16, guided, d24, on the meta device, pictures not yet decoded"
    return [
        *out,
        Effect(
            quantity="memory that a picture adds while its tokens are drawn, VAR over HMAR",
            value=theirs[1] / mine[1],
            unit="x",
            how="counted",
            published="> 3x less memory of sampling",
            note=f"{theirs[1] / 2**20:.0f} MiB over {mine[1] / 2**20:.0f} MiB; {note}",
        ),
        Effect(
            quantity=f"memory of drawing {BATCH} pictures with weights, VAR over HMAR",
            value=(theirs[0] + BATCH * theirs[1]) / (mine[0] + BATCH * mine[1]),
            unit="x",
            how="counted",
            published="> 3x less memory of sampling",
            note=f"the branch adds {(mine[0] - theirs[0]) / 2**20:,.0f} MiB of weights; {note}",
        ),
        Effect(
            quantity=f"memory of drawing {BATCH} pictures with weights, VAR over HMAR without its branch",
            value=(theirs[0] + BATCH * theirs[1]) / (theirs[0] + BATCH * ours["at once"][1]),
            unit="x",
            how="counted",
            published="> 3x less memory of sampling",
            note=f"every scale drawn at once; {note}",
        ),
        *(
            Effect(
                quantity=f"tokens that pass through the network for a picture, {told}",
                value=found[2],
                unit="tokens",
                how="counted",
                note=f"{found[3]} passes; VAR {theirs[2]} in {theirs[3]}",
            )
            for told, found in ours.items()
        ),
    ]


def small(sides: tuple[int, ...]) -> tuple[Any, Any]:
    """A VAR and an HMAR of four layers of 256 channels, random weights, over scales of real sizes."""
    patch = PatchConfig(grid=(sides[-1], sides[-1]), z_channels=32, width=32, heads=2, encoder_depth=1, decoder_depth=1)
    tokenizer = replace(var.tokenizer_config(sides), patch=patch, cnn=None)
    config = replace(var.preset(4, sides, False, 1e-3), tokenizer=tokenizer, num_classes=10)
    return var.build(config), hmar.build(hmar.HMARConfig(scale=config, mask_layers=2, learns="mask"))


NOTE = "4 layers of 256 channels, 4 heads, float32, random weights"


def learning(size: int, seconds: float) -> Effect:
    """Forward and backward of the first stage."""
    base, system = small(LISTS[size])
    layout, batch = pyramid(LISTS[size]), 1024 // size
    tokens = (Noise.of(0, batch).uniform("tokens", 0, (layout.n, 1)) * 4096).long()
    system.learns = "scales"
    system.begin_()

    def update(learner: Any) -> None:
        learner.loss({"tokens": tokens, "class_labels": [0] * batch}, Noise.of(0, batch))["loss"].backward()

    theirs, ours = (fastest(partial(update, learner), seconds) for learner in (base, system))
    return Effect(
        quantity=f"time of forward and backward at {size} pixels ({layout.n} tokens), VAR over HMAR",
        value=theirs / ours,
        unit="x",
        how="measured",
        published="> 2.5x faster training",
        note=f"{theirs * 1e3:.0f} ms over {ours * 1e3:.0f} ms for {batch} pictures; {NOTE}",
    )


def attending(size: int, seconds: float) -> Effect:
    """Forward and backward of the attention of one layer of the largest size, under a mask and scale by scale."""
    layout, heads = pyramid(LISTS[size]), 24
    rows = Rows.of(layout.level_N)
    q, k, v = (Noise.of(i, 1).normal("x", 0, (heads, layout.n, 64)).float().requires_grad_() for i in range(3))
    calls = [(masked, Call(mask=render(upto, rows, rows), rows=rows)), (InsideScales(layout), Call(rows=rows))]

    def run(look: Look, call: Call) -> None:
        look(q, k, v, call, 0.125).sum().backward()

    theirs, ours = (fastest(partial(run, *one), seconds) for one in calls)
    return Effect(
        quantity=f"time of forward and backward of one attention at {size} pixels ({layout.n} tokens), VAR over HMAR",
        value=theirs / ours,
        unit="x",
        how="measured",
        note=f"{theirs * 1e3:.0f} ms over {ours * 1e3:.0f} ms; 24 heads of 64, one picture, float32",
    )


def painting(size: int, seconds: float) -> list[Effect]:
    """Drawing tokens, at once and in the passes of the official schedule."""
    base, system = (part.eval() for part in small(LISTS[size]))
    batch = 1024 // size

    @torch.inference_mode()
    def draw(painter: Any, schedule: Schedule) -> None:
        settings = HMARSampling(top_k=900, top_p=0.96, schedule=schedule)
        s = painter.start(painter.prepare({"class_labels": [0] * batch}), settings, Noise.of(0, batch))
        while not bool(s.done.all()):
            d = painter.predict(s)
            painter.commit(s, d, d.sample(s.noise))

    theirs = fastest(partial(draw, base, ()), seconds)
    out = []
    for told, schedule in (("at once", ()), ("three scales in passes", REFINED)):
        ours = fastest(partial(draw, system, schedule), seconds)
        out.append(
            Effect(
                quantity=f"time of drawing tokens at {size} pixels, {told}, VAR over HMAR",
                value=theirs / ours,
                unit="x",
                how="measured",
                published="> 1.75x faster sampling",
                note=f"{theirs * 1e3:.0f} ms over {ours * 1e3:.0f} ms for {batch} pictures, guided; {NOTE}",
            )
        )
    return out


def measured(seconds: float = 8.0, sizes: tuple[int, ...] = (256, 512)) -> list[Effect]:
    """Small models, and one attention of a large one; the shortest of several runs."""
    return [
        effect
        for size in sizes
        for effect in (attending(size, seconds), learning(size, seconds), *painting(size, seconds))
    ]
