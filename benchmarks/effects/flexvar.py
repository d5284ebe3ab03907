"""FlexVAR: what other numbers of steps and other sizes cost, and how well they work without any training."""

from __future__ import annotations

import torch

from arvis.checks.flexvar import LARGE, LONG, SHORT, Length, drawn, nats, train
from arvis.cost import Cost, count
from arvis.noise import Noise
from arvis.systems import flexvar
from arvis.systems.flexvar import STEPS
from arvis.tokens import pyramid
from benchmarks.effects import Effect

WHOLE = Length()
MODEL = "flexvar-d24"


def costs(*steps: int) -> dict[int, Cost]:
    """Of one guided picture of the largest model by the number of steps, on the meta device."""
    with torch.device("meta"):
        system = flexvar.build(flexvar.PRESETS[MODEL].config()).eval()
    return {k: count(system, flexvar.FlexVARSampling(scales=STEPS[k])) for k in steps}


def counted() -> list[Effect]:
    found = costs(6, 10, 13, 15)
    ten = drawing(found[10])
    lists = [sum(p * p for p in STEPS[k]) for k in (6, 10, 13, 15)]
    most = max(sum(p * p for p in flexvar.ListConfig().draw(STEPS[10], Noise.of(seed))) for seed in range(1000))
    return [
        _count(
            "tokens of a picture of 512 pixels over the most that training has seen",
            lists[-1] / most,
            f"{lists} tokens in 6, 10, 13 steps and at 512; at most {most} in 1,000 random lists",
        ),
        _count(
            "operations of the transformer, 13 steps over 10",
            drawing(found[13]) / ten,
            "for which the paper has FID 2.08 in place of 2.21, without training",
        ),
        _count("operations of the transformer, 6 steps over 10", drawing(found[6]) / ten, "the fewest published steps"),
        _count(
            "operations of the transformer, 512 pixels in 15 steps over 256 in 10",
            drawing(found[15]) / ten,
            "no training at that size",
        ),
        _count(
            "bytes of keys and values, 13 steps over 10",
            found[13].cache / found[10].cache,
            "the last scale takes no slot",
        ),
    ]


def _count(quantity: str, value: float, note: str) -> Effect:
    return Effect(quantity=quantity, value=value, unit="x", how="counted", note=note)


def drawing(cost: Cost) -> float:
    """Operations of all steps, without the decoder."""
    return cost.flops - cost.phases["decode"].flops


def measured(length: Length = WHOLE) -> list[Effect]:
    """A small FlexVAR of digits, trained on random lists of at most six scales that end in 8x8 cells."""
    trained = train(lambda: None, length)
    system, data = trained.system.eval(), trained.digits
    own = system.tokenizer.config.patch_nums
    with torch.inference_mode():
        lists = [pyramid(system.lists.draw(own, Noise.of(seed))) for seed in range(6)]
        seen = sum(float(nats(system, data, layout).mean()) for layout in lists) / len(lists)
        rows = [("4 steps", SHORT), ("5 steps, as in training", pyramid(own)), ("8 steps, more than in training", LONG)]
        shares = {name: drawn(system, data, layout, 20) for name, layout in rows}
        large = drawn(system, data, LARGE, 20)
        longest = float(nats(system, data, LONG).mean())
    told = ", ".join(f"{share:.3f} in {name}" for name, share in shares.items())
    usual = shares["5 steps, as in training"]
    return [
        Effect(
            quantity="nats per token on 8 scales, never seen, over those on lists of training",
            value=longest / seen,
            unit="x",
            how="measured",
            note="digits held out of training",
        ),
        Effect(
            quantity="digits recognised, drawn in 8 steps (never seen) over 5",
            value=shares["8 steps, more than in training"] / usual,
            unit="x",
            how="measured",
            note=told,
        ),
        Effect(
            quantity="digits recognised, drawn half as large again (never seen) over the size of training",
            value=large / usual,
            unit="x",
            how="measured",
            note=f"{large:.3f} of 200 with 12 cells a side",
        ),
    ]
