"""MVAR: what it saves that a scale sees itself alone, a large one by windows, and that segments are learned apart."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arvis.cost import Counting
from arvis.nn.neighbourhood import near
from arvis.noise import Noise
from arvis.rows import Rows, See, render, upto
from arvis.systems import mvar, var
from arvis.systems.mvar import MVARSampling
from arvis.systems.var import PATCH_NUMS_256
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import pyramid
from benchmarks.effects import Effect, fastest

BATCH = 64
"""Pictures that are drawn together."""
PER_DEVICE = 56
"""Pictures on each of eight devices, as published."""
LAYOUT = pyramid(PATCH_NUMS_256)


def pairs(see: See) -> int:
    """Rows that see each other in one layer at 256 pixels."""
    rows = Rows.of(LAYOUT.level_N, LAYOUT.place_N)
    mask = render(see, rows, rows)
    return LAYOUT.n**2 if mask is None else int(mask.sum())


@torch.inference_mode()
def drawing(system: Any) -> tuple[int, int, int]:
    """Of one guided picture on the meta device, in float16 and without its decoding: bytes of weights, bytes that live
    at once beside them, and bytes of keys and values at the end."""
    with Counting(2) as counting:
        s = system.start(None, system.Sampling(), Noise.of(0, 1, "meta"))
        while not bool(s.done.all()):
            d = system.predict(s)
            system.commit(s, d, d.sample(s.noise))
    kept = sum(counting.bytes(x) for c in s.cache.values() for x in (*c.k.values(), *c.v.values()))
    return 2 * sum(p.numel() for p in system.transformer.parameters()), counting.most, kept


def learning(system: Any, first: int, last: int) -> int:
    """Bytes that one more picture needs until the backward pass of scales first..last-1, on the meta device in
    float16."""
    transformer, n, most = system.transformer, sum(LAYOUT.sizes[max(first, 1) : last]), []
    for batch in (1, 2):
        c = transformer.conditioner(None, torch.zeros(batch, dtype=torch.bool, device="meta"))
        x = torch.zeros(batch, n, system.tokenizer.channels, device="meta")
        with Counting(2) as counting:
            logits = transformer.head(transformer(c, x, first, last, system.see), c.vector)
            logits.log_softmax(-1).sum()
        most.append(counting.most)
    return most[1] - most[0]


def counted() -> list[Effect]:
    rule = near(LAYOUT, 7, 8)
    with torch.device("meta"):
        base, system = (
            m.build(m.preset(*given)) for m, given in ((var, (24, PATCH_NUMS_256, False, 1e-4)), (mvar, (24,)))
        )
    theirs, ours = drawing(base.eval()), drawing(system.eval())
    whole = learning(base, 0, LAYOUT.K)
    turns = [learning(system, *system.turn(step)) for step in range(10)]
    fixed = 16 * sum(p.numel() for p in base.transformer.parameters())
    mean = sum(turns) / len(turns)
    note = "float16, guided, d24, on the meta device, pictures not yet decoded"
    return [
        Effect(
            quantity="pairs that attention sees at 256 pixels, VAR over MVAR",
            value=pairs(upto) / pairs(rule),
            unit="x",
            how="counted",
            published="O(N k) instead of O(N^2)",
            note=f"{pairs(upto):,} over {pairs(rule):,} per layer, from the rules",
        ),
        Effect(
            quantity="keys and values of a picture at the end of drawing it, VAR and MVAR",
            value=ours[2] / 2**20,
            unit="MiB",
            how="counted",
            published="no cache",
            note=f"VAR {theirs[2] / 2**20:.0f} MiB; {note}",
        ),
        Effect(
            quantity=f"memory of drawing {BATCH} pictures with weights, VAR over MVAR",
            value=(theirs[0] + BATCH * theirs[1]) / (ours[0] + BATCH * ours[1]),
            unit="x",
            how="counted",
            published="3.0x less memory on average",
            note=f"a picture adds {theirs[1] / 2**20:.0f} MiB over {ours[1] / 2**20:.0f} MiB; {note}",
        ),
        Effect(
            quantity=f"memory of learning {PER_DEVICE} pictures, mean of the rotation, VAR over MVAR",
            value=(fixed + PER_DEVICE * whole) / (fixed + PER_DEVICE * mean),
            unit="x",
            how="counted",
            published="3.0x less memory on average",
            note=f"16 bytes a parameter; a picture adds {whole / 2**20:.0f} MiB over {mean / 2**20:.0f} MiB, at most "
            f"{max(turns) / 2**20:.0f} MiB; attention written out as products, d24",
        ),
    ]


def small() -> tuple[Any, Any]:
    """A VAR and an MVAR of four layers of 256 channels, random weights, over the scales of 256 pixels."""
    patch = PatchConfig(grid=(16, 16), z_channels=32, width=32, heads=2, encoder_depth=1, decoder_depth=1)
    tokenizer = replace(var.tokenizer_config(), patch=patch, cnn=None)
    config = replace(var.preset(4, PATCH_NUMS_256, False, 1e-3), tokenizer=tokenizer, num_classes=10)
    return var.build(config), mvar.build(mvar.MVARConfig(scale=config))


def measured(seconds: float = 12.0, batch: int = 4) -> list[Effect]:
    """Small models; the shortest of several runs."""
    base, system = small()
    tokens = (Noise.of(0, batch).uniform("tokens", 0, (LAYOUT.n, 1)) * 4096).long()
    note = f"4 layers of 256 channels, 4 heads, float32, {batch} pictures, random weights"

    def update(learner: Any, *steps: int) -> None:
        for step in steps:
            request = {"tokens": tokens, "class_labels": [0] * batch, "step": step}
            learner.loss(request, Noise.of(0, batch))["loss"].backward()

    @torch.inference_mode()
    def draw(painter: Any) -> None:
        s = painter.start(painter.prepare({"class_labels": [0] * batch}), MVARSampling(), Noise.of(0, batch))
        while not bool(s.done.all()):
            d = painter.predict(s)
            painter.commit(s, d, d.sample(s.noise))

    every, turn = fastest(partial(update, base, 0), seconds), fastest(partial(update, system, *range(10)), seconds) / 10
    base, system = base.eval(), system.eval()
    theirs, ours = (fastest(partial(draw, painter), seconds) for painter in (base, system))
    return [
        Effect(
            quantity="time of an update, mean of the rotation, VAR over MVAR",
            value=every / turn,
            unit="x",
            how="measured",
            note=f"{every * 1e3:.0f} ms over {turn * 1e3:.0f} ms; an update of MVAR learns one segment; {note}",
        ),
        Effect(
            quantity="time of drawing tokens, VAR over MVAR",
            value=theirs / ours,
            unit="x",
            how="measured",
            note=f"{theirs * 1e3:.0f} ms over {ours * 1e3:.0f} ms, guided; {note}",
        ),
    ]
