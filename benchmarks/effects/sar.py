"""SAR: what the second pass costs in training, and what it changes about codes of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from arvis.checks.sar import LAST, SHORT, Length, agreement, exposure, train
from arvis.cost import Counting
from arvis.rows import Rows, render, upto
from arvis.systems import sar
from arvis.tokens import Layout, pyramid
from arvis.training.refinement import start_and_own, student
from benchmarks.effects import Effect

WHOLE = Length()
MODEL = "sar-d24"


def counted() -> list[Effect]:
    """Of the forward passes of one training step on the ten published scales; backward passes have the same ratio."""
    with torch.device("meta"):
        system = sar.build(sar.PRESETS[MODEL].config()).eval()
        layout = system.tokenizer.layout()
        tokens, null = torch.zeros(1, layout.n, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    last, every = [layout.K - 1], range(1, layout.K)
    c = system.transformer.conditioner(None, null)
    teacher = _operations(lambda: system.teacher(tokens, None, layout))
    published = _operations(lambda: student(system, tokens, c, layout, last))
    general = _operations(lambda: student(system, tokens, c, layout, every))
    rows = 1 + layout.sizes[-1]
    return [
        _count("tokens of the second pass over those of the first", rows / layout.n, f"{rows} and {layout.n} tokens"),
        _count(
            "pairs of tokens of the second pass over those of the first",
            _pairs(pyramid((1, 16)), True) / _pairs(layout, False),
            f"{_pairs(pyramid((1, 16)), True):,} and {_pairs(layout, False):,} a layer",
        ),
        _count(
            "operations of a training step, refined over teacher forcing", 1 + published / teacher, "the last scale"
        ),
        _count("operations of a training step, refined at all scales", 1 + general / teacher, "the general form"),
    ]


def _count(quantity: str, value: float, note: str) -> Effect:
    return Effect(quantity=quantity, value=value, unit="x", how="counted", note=note)


def _operations(run: object) -> float:
    with torch.inference_mode(), Counting(4) as counting:
        assert callable(run)
        run()
    return counting.work.flops


def _pairs(layout: Layout, second: bool) -> int:
    """Pairs of tokens that see each other in one layer."""
    rows = Rows.of(layout.level_N)
    mask: Tensor | None = render(start_and_own if second else upto, rows, rows)
    return layout.n**2 if mask is None else int(mask.sum())


def measured(length: Length = WHOLE) -> list[Effect]:
    """A small FlexVAR of digits, half-trained; then a copy with more teacher forcing, and a refined one."""
    trained = train(lambda: None, length)
    with torch.inference_mode():
        gaps = {name: exposure(trained, s) for name, s in _copies(trained).items()}
        agreed = {name: agreement(trained, s) for name, s in _copies(trained).items()}
    told = f"{SHORT.levels[LAST][0]} cells a side, held-out digits, both copies on the same batches"
    return [
        Effect(
            quantity="nats per token that own coarser scales cost more than true ones, teacher forcing over refined",
            value=gaps["plain"] / gaps["refined"],
            unit="x",
            how="measured",
            note=f"{gaps['plain']:.4f} and {gaps['refined']:.4f}; {told}",
        ),
        Effect(
            quantity="codes on which both passes agree, refined over teacher forcing",
            value=agreed["refined"] / agreed["plain"],
            unit="x",
            how="measured",
            note=f"{agreed['refined']:.3f} and {agreed['plain']:.3f}, {agreed['begun']:.3f} before; {told}",
        ),
    ]


def _copies(trained: object) -> dict[str, object]:
    return {name: getattr(trained, name) for name in ("begun", "plain", "refined")}
