"""Learning from one's own predictions: a short post-training of any model over scales (SAR, arXiv 2512.06421).

Teacher forcing shows a scale the true coarser ones only, sampling its own. So each step has a second pass.
Stagger-scale rollout: what the first, teacher-forced pass predicts for a scale is the input of the next. Contrastive
student forcing: there the model is to predict what it predicted in the first pass. Any `Staged` system can learn so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from arvis.dist import Categorical
from arvis.nn.scales import Condition
from arvis.noise import Source
from arvis.rows import Rows
from arvis.sampling import mix, top_k, top_p
from arvis.state import Lesson, Staged
from arvis.tokens import Layout


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """`sigma` weighs the second pass, which learns the "last" transition from scale to scale (as published), "all" of
    them or a "random" one; its targets are those the "teacher" pass predicts, or the "data".

    Predictions are the likeliest codes or, with `draw`, drawn: under guidance (1 + t) c - t u with t = cfg_scale (1 +
    k / (K - 1)) / 2 where cfg_scale is above 1, and filtered by `top_k` and `top_p`.
    """

    sigma: float = 0.01
    transitions: Literal["last", "all", "random"] = "last"
    target: Literal["teacher", "data"] = "teacher"
    draw: bool = False
    cfg_scale: float = 1.2
    top_k: int = 900
    top_p: float = 0.96


def refine(system: Staged, batch: dict[str, Any], noise: Source, config: RefinementConfig) -> dict[str, Tensor]:
    """The losses of `system.loss` with "loss" = teacher-forced loss + sigma * "student"; "teacher" is the first alone.

    "student" is the mean cross-entropy of a sub-token in the second pass, "agreement" how often its likeliest codes are
    those of the first. Each pass drops conditions by numbers of its own. Gradients come through the logits of both
    passes, never through tokens. Of a residual tokenizer the inputs are the sums of the predicted scales (Deviation:
    only models without residuals are published).
    """
    lesson = system.lesson(batch, noise)
    if lesson.layout.K < 2 or lesson.tokens.shape[1] != lesson.layout.n:
        raise ValueError(f"scales are learned from coarser ones: all of at least two are needed, got {lesson.layout}")
    predicted = predict(system, lesson, noise, config)
    scales = chosen(config, lesson.layout, noise)
    null = noise.uniform("drop again", 0, ()).to(predicted.device) < system.label_drop
    d = student(system, predicted, system.transformer.conditioner(lesson.cond, null), lesson.layout, scales)
    seen = predicted[:, d.where[0].to(predicted.device)]
    target = seen if config.target == "teacher" else lesson.tokens[:, d.where[0].to(predicted.device)]
    loss = -d.log_prob(target).mean() / target.shape[-1]
    agreement = (d.logits.detach().argmax(-1) == seen).float().mean()
    teacher = lesson.losses["loss"]
    own = {"teacher": teacher.detach(), "student": loss.detach(), "agreement": agreement}
    return {**lesson.losses, "loss": teacher + config.sigma * loss, **own}


@torch.no_grad()
def predict(system: Staged, lesson: Lesson, noise: Source, config: RefinementConfig) -> Tensor:
    """What the teacher-forced pass of a lesson says of every token, [B, N, S]."""
    logits, layout = lesson.predicted.logits.detach(), lesson.layout
    if not config.draw:
        return logits.argmax(-1)
    if config.cfg_scale > 1:
        nobody = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        c = system.transformer.conditioner(lesson.cond, nobody)
        x = system.tokenizer.inputs(lesson.tokens, layout)
        null = system.one_pass(x, c, layout, range(1, layout.K), system.see).logits
        t = config.cfg_scale * (1 + layout.level_N.double() / (layout.K - 1)) / 2
        weights = torch.stack((1 + t, -t))[None].expand(len(logits), -1, -1)  # [B, 2, N]
        logits = mix(torch.stack((logits, null), 1), weights)
    kept = top_p(top_k(logits, config.top_k), config.top_p)
    return Categorical(torch.arange(layout.n)[None], kept).sample(noise)


def chosen(config: RefinementConfig, layout: Layout, noise: Source) -> Sequence[int]:
    """The scales that the second pass predicts; a batch shares a random one."""
    if config.transitions == "random":
        return (1 + int(float(noise.uniform("transition", 0, ())[0]) * (layout.K - 1)),)
    return (layout.K - 1,) if config.transitions == "last" else range(1, layout.K)


def student_inputs(system: Staged, tokens: Tensor, layout: Layout, scales: Sequence[int]) -> Tensor:
    """What some scales see of predicted tokens [B, N, S], as while sampling: [B, n, C]."""
    first = scales[0]
    with torch.no_grad():
        x = system.tokenizer.inputs(tokens, layout, first, scales[-1] + 1)
    spans = [
        slice(layout.offsets[k] - layout.offsets[first], layout.offsets[k + 1] - layout.offsets[first]) for k in scales
    ]
    return torch.cat([x[:, span] for span in spans], 1)


def student(system: Staged, tokens: Tensor, c: Condition, layout: Layout, scales: Sequence[int]) -> Categorical:
    """The distributions of some scales given predicted tokens of the scale before each: no scale sees another.

    Compat: the start row has the position of its scale, and not the one of its own that it has elsewhere.
    """
    bare = c._replace(start=c.start - system.transformer.start_position[:, 0])
    d = system.one_pass(student_inputs(system, tokens, layout, scales), bare, layout, scales, start_and_own)
    return Categorical(layout.where(*scales), d.logits[:, layout.sizes[0] :])


def start_and_own(q: Rows, k: Rows) -> Tensor:
    """A row sees the start and the rows of its own scale."""
    return (k.step == 0) | (k.step == q.step)
