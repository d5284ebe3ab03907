"""SAR on a small model of digits: half-trained, then one copy goes on with teacher forcing and one is refined.

The claims: with a weight of zero refinement is teacher forcing, bit for bit; the second pass changes no gradient of the
first; it is fed what the sampler feeds, apart from other scales, and aims at the first pass; refined, the two passes
agree more often, own codes surprise the model less than its copy, and true ones no more.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, sizes
from arvis.checks.digits import Digits, digits
from arvis.checks.flexvar import SHORT, learn, nats
from arvis.checks.flexvar import Length as BaseLength
from arvis.checks.flexvar import train as train_base
from arvis.noise import Noise
from arvis.state import Lesson
from arvis.systems.sar import PRESETS, build
from arvis.tokens import at
from arvis.training.refinement import RefinementConfig, predict, refine, student, student_inputs

PARAMETERS = {"sar-d16": 315_561_936, "sar-d20": 607_513_952, "sar-d24": 1_041_314_576}
"""Of the official transformers."""

SIGMA = 0.1
LAST = SHORT.K - 1


@dataclass
class Trained:
    """What is examined: the half-trained model, its copy after more teacher forcing, and its refined copy."""

    begun: Any
    plain: Any
    refined: Any
    digits: Digits
    config: RefinementConfig
    nothing: RefinementConfig


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer and the transformer before, and of each copy after they part."""

    tokenizer: int = 400
    transformer: int = 150
    apart: int = 100


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """The base, then both copies on the same batches."""
    data = digits() if data is None else data
    base = BaseLength(tokenizer=length.tokenizer, transformer=length.transformer)
    begun = train_base(on_step, base, data).system
    plain, refined = copy.deepcopy(begun), copy.deepcopy(begun)
    config = RefinementConfig(sigma=SIGMA)
    refined.objective = partial(refine, config=config)
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        for name, system in (("plain", plain), ("refined", refined)):
            learn(system, data, length.apart, Path(folder) / name, on_step, first=length.transformer)
    nothing = RefinementConfig(sigma=0.0)
    return Trained(begun, plain.eval(), refined.eval(), data, config, nothing)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's four conditions, in its order."""
    return [
        identical(trained),
        separate(trained),
        fed(trained),
        apart(trained),
        aimed(trained),
        *improved(trained),
        *parameters(),
    ]


def identical(trained: Trained) -> Claim:
    """Weights after a few updates with a weight of zero, against plain teacher forcing."""
    ends = []
    with torch.enable_grad(), tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        for name, objective in (("plain", None), ("refined", partial(refine, config=trained.nothing))):
            system = copy.deepcopy(trained.begun)
            system.objective = objective or system.objective
            learn(system, trained.digits, 2, Path(folder) / name, lambda: None)
            ends.append(system.transformer.state_dict())
    moved = max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0])
    return exactly("change of weights by refinement of weight zero", moved, 0.0)


def separate(trained: Trained) -> Claim:
    """What the second pass adds to the gradient of the first one's logits."""
    found = []
    for config in (trained.nothing, trained.config):
        system, seen = copy.deepcopy(trained.refined), []
        lesson = system.lesson

        def kept(batch: dict[str, Any], noise: Noise, lesson: Any = lesson, seen: list[Tensor] = seen) -> Lesson:
            out = lesson(batch, noise)
            out.predicted.logits.retain_grad()
            seen.append(out.predicted.logits)
            return out

        system.lesson = kept
        system.transformer.requires_grad_(True)
        with torch.enable_grad():
            refine(system, some(trained), Noise.of(0, 8), config)["loss"].backward()
        found.append(seen[0].grad)
    return exactly(
        "what the second pass adds to the gradient of the first", float((found[0] - found[1]).abs().max()), 0.0
    )


def some(trained: Trained) -> dict[str, Any]:
    """A few digits that nobody has learned."""
    return {"image": trained.digits.test_images[:8], "class_labels": trained.digits.test_labels[:8]}


def said(trained: Trained, system: Any) -> tuple[Tensor, Tensor, Any]:
    """(true codes, codes that a teacher-forced pass predicts, condition) of the test digits on four scales."""
    data = trained.digits
    tokens = system.tokenizer.encode(data.test_images, SHORT)
    cond = system.prepare({"class_labels": data.test_labels})
    d = system.teacher(tokens, cond, SHORT)
    return (
        tokens,
        predict(system, Lesson(tokens, SHORT, cond, d, {}), Noise.of(0, len(tokens)), RefinementConfig()),
        cond,
    )


def fed(trained: Trained) -> Claim:
    """The input of the last scale in the second pass, against what the sampler makes of the same codes."""
    system = trained.refined
    _, predicted, cond = said(trained, system)
    s = system.start(cond, system.Sampling.plain(), Noise.of(0, len(predicted)), SHORT)
    for _ in range(LAST):
        d = system.predict(s)
        system.commit(s, d, at(predicted, d.where))
    wanted = system.tokenizer.next_input(s.more["f"], LAST, SHORT)
    gap = (student_inputs(system, predicted, SHORT, [LAST]) - wanted).abs().max()
    return exactly("difference of the inputs of the second pass and of sampling", float(gap), 0.0)


def apart(trained: Trained) -> Claim:
    """What other codes of a coarse scale change at the last one in the second pass."""
    system = trained.refined
    _, predicted, cond = said(trained, system)
    c = system.transformer.conditioner(cond, torch.zeros(len(predicted), dtype=torch.bool))
    other, coarse = predicted.clone(), SHORT.span(LAST - 2)
    other[:, coarse] = (predicted[:, coarse] + 1) % system.space.sizes[0]
    both = [student(system, x, c, SHORT, [LAST - 1, LAST]).logits[:, -SHORT.sizes[LAST] :] for x in (predicted, other)]
    change = float((both[0] - both[1]).abs().max())
    return exactly("change of the last scale by other codes two scales before", change, 0.0)


def aimed(trained: Trained) -> Claim:
    """The loss of the second pass against its cross-entropy with the codes of the first, on the list of a lesson."""
    system, batch, noise = trained.refined, some(trained), Noise.of(5, 8)
    losses, lesson = refine(system, batch, noise, trained.config), system.lesson(batch, noise)
    last = lesson.layout.K - 1
    predicted = lesson.predicted.logits.argmax(-1)
    null = noise.uniform("drop again", 0, ()) < system.label_drop
    d = student(system, predicted, system.transformer.conditioner(lesson.cond, null), lesson.layout, [last])
    wanted = -d.log_prob(predicted[:, lesson.layout.span(last)]).mean()
    return at_most(
        "error of the second loss against the codes of the first pass", abs(float(losses["student"] - wanted)), 1e-5
    )


def improved(trained: Trained) -> list[Claim]:
    """On unseen digits: agreement of both passes, surprise at true codes after its own ones, and after true ones."""
    begun, plain, refined = (agreement(trained, s) for s in (trained.begun, trained.plain, trained.refined))
    after = [exposure(trained, s) for s in (trained.plain, trained.refined)]
    true = [float(nats(s, trained.digits, SHORT).mean()) for s in (trained.plain, trained.refined)]
    return [
        at_least("rise of the agreement of both passes by refinement", refined - begun, 0.03),
        at_least("rise of the agreement beyond that of more teacher forcing", refined - plain, 0.01),
        at_most("surprise by own codes, refined, as a part of that of the copy", after[1] / after[0], 0.98),
        at_most(
            "nats per token under teacher forcing, refined, as a part of those of the copy", true[1] / true[0], 1.02
        ),
    ]


def agreement(trained: Trained, system: Any) -> float:
    """How often the second pass names the codes of the first at the last of four scales."""
    _, predicted, cond = said(trained, system)
    c = system.transformer.conditioner(cond, torch.zeros(len(predicted), dtype=torch.bool))
    d = student(system, predicted, c, SHORT, [LAST])
    return float((d.logits.argmax(-1) == predicted[:, SHORT.span(LAST)]).double().mean())


def exposure(trained: Trained, system: Any) -> float:
    """Nats per token that the true last scale costs more after predicted coarser scales than after true ones."""
    tokens, predicted, cond = said(trained, system)
    last = SHORT.span(LAST)
    own = torch.cat((predicted[:, : SHORT.offsets[LAST]], tokens[:, last]), 1)
    true, after = (-system.teacher(x, cond, SHORT).log_prob(x)[:, last].mean() for x in (tokens, own))
    return float(after - true)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def forget_refinement(trained: Trained) -> None:
    """The refined copy is the half-trained model."""
    trained.refined = trained.begun


def keep_forcing(trained: Trained) -> None:
    """The refined copy is the other one."""
    trained.refined = trained.plain


def never_nothing(trained: Trained) -> None:
    """A weight of zero is a small one."""
    trained.nothing = RefinementConfig(sigma=0.01)


def aim_at_data(trained: Trained) -> None:
    """The second pass learns the true codes."""
    trained.config = RefinementConfig(sigma=SIGMA, target="data")


def enlarge_otherwise(trained: Trained) -> None:
    """The second pass gets the scale before without interpolation."""
    tokenizer = trained.refined.tokenizer
    plain = tokenizer.inputs
    tokenizer.inputs = lambda tokens, layout, first=0, last=None: plain(tokens, layout, first, last).round(decimals=1)


def see_everything(trained: Trained) -> None:
    """In the second pass scales see each other."""
    system: Any = trained.refined
    one_pass: Callable[..., Any] = system.one_pass
    system.one_pass = lambda x, c, layout, scales, see: one_pass(x, c, layout, scales, system.see)


MUTANTS = {
    "forgotten refinement": forget_refinement,
    "teacher forcing kept": keep_forcing,
    "never nothing": never_nothing,
    "aimed at data": aim_at_data,
    "enlarged otherwise": enlarge_otherwise,
    "scales see each other": see_everything,
}
