"""SAR against its official training step, and full-size SAR checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arvis.noise import Noise
from arvis.parity.flexvar import configured
from arvis.parity.flexvar import skeleton as base_skeleton
from arvis.parity.harness import Fixture
from arvis.systems.sar import SARConfig, build, keys
from arvis.training.refinement import RefinementConfig, predict, refine, student, student_inputs
from arvis.weights import Key, load_official

_TARGETS = {"csfl": "teacher", "tf_then_single_sf": "data"}


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    smallest = {"ch": 32, "ch_mult": [1], "z_channels": 1}  # pictures come as features
    base = configured({**fixture.model("quantizer"), **smallest}, fixture.model("transformer"))
    shared = True
    for name, given in fixture.runs.items():
        config = SARConfig(base=_with_list(base, tuple(given["patch_nums"])), refinement=_refinement(given))
        system = build(config).eval()
        load_official(
            system.transformer, keys(config)["transformer"], fixture.weights("transformer"), source=str(fixture.folder)
        )
        system.tokenizer.quantize.embedding.weight.copy_(fixture.weights("quantizer")["embedding.weight"])
        batch = {"features": fixture.io["h"], "class_labels": fixture.io["labels"]}
        if shared:  # what does not depend on the mode is recorded once
            yield from _passes(system, batch, config.refinement)
            shared = False
        yield from _step(system, batch, config.refinement, name, fixture)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    return base_skeleton(layout)


def _with_list(base: Any, sides: tuple[int, ...]) -> Any:
    """The configuration whose only list in training is one."""
    tokenizer = replace(base.tokenizer, patch_nums=sides)
    return replace(base, tokenizer=tokenizer, lists=replace(base.lists, own=1.0))


def _refinement(given: Mapping[str, Any]) -> RefinementConfig:
    if given["training_mode"] not in _TARGETS or given["sf_use_sampling"]:
        raise ValueError(f"recorded steps are {' or '.join(_TARGETS)} with the likeliest codes, got {given}")
    return RefinementConfig(sigma=given["sigma"], target=_TARGETS[given["training_mode"]])  # type: ignore[arg-type]


def _passes(system: Any, batch: dict[str, Tensor], config: RefinementConfig) -> Iterator[tuple[str, Tensor]]:
    """Both passes and what goes in and comes out."""
    noise = Noise.of(0, len(batch["features"]))
    lesson = system.lesson(batch, noise)
    layout = lesson.layout
    predicted, last = predict(system, lesson, noise, config), layout.K - 1
    c = system.transformer.conditioner(lesson.cond, torch.zeros(len(noise), dtype=torch.bool))
    yield "gt_tokens", lesson.tokens[..., 0]
    yield "tf_input", system.tokenizer.inputs(lesson.tokens, layout, 1)
    yield "tf_logits", lesson.predicted.logits[:, :, 0]
    yield "teacher_tokens", predicted[..., 0]
    yield "sf_input", student_inputs(system, predicted, layout, [last])
    yield "sf_logits", student(system, predicted, c, layout, [last]).logits[:, :, 0]


def _step(
    system: Any, batch: dict[str, Tensor], config: RefinementConfig, name: str, fixture: Fixture
) -> Iterator[tuple[str, Tensor]]:
    """The losses and gradients of one training step."""
    noise = Noise.of(0, len(batch["features"]))
    with torch.enable_grad():
        losses = refine(system, batch, noise, config)
        losses["loss"].backward()
    transformer = system.transformer
    found = {
        "losses_tf_sf_total": torch.stack([losses[n].detach() for n in ("teacher", "student", "loss")]),
        "grad_word_embed_weight": transformer.word.weight.grad,
        "grad_head_bias": transformer.head.linear.bias.grad,
        "grad_norm_all": torch.stack([p.grad.norm() for p in transformer.parameters()]).norm()[None],
    }
    with torch.no_grad():
        lesson = system.lesson(batch, noise)
        last = lesson.layout.span(lesson.layout.K - 1)
        target = predict(system, lesson, noise, config) if config.target == "teacher" else lesson.tokens
        found[f"targets_{name}"] = target[:, last, 0]
    for recorded, about in fixture.tensors.items():
        if about["run"] == name:
            key = recorded.removeprefix(f"{name}_").removeprefix("sf_")
            if key in found:
                yield recorded, found[key]
