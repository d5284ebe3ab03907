"""MVAR against its official code, and full-size MVAR checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.neighbourhood import near
from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.parity.var import configured as as_var
from arvis.rows import Rows, render
from arvis.state import Cond
from arvis.systems.mvar import MVAR, MVARConfig, MVARSampling, build, keys
from arvis.tokens import Layout, at
from arvis.walk import walk
from arvis.weights import Key, load_official


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    config = configured(fixture.model("quantizer"), fixture.model("transformer"))
    system = build(config).eval()
    table, weights = keys(config), fixture.weights("transformer")
    load_official(system.transformer, table["transformer"], weights, source=f"{fixture.folder}: transformer")
    quantizer = {f"quantize.{name}": tensor for name, tensor in fixture.weights("quantizer").items()}
    own = {name: tensor for name, tensor in system.tokenizer.state_dict().items() if not name.startswith("quantize.")}
    load_official(system.tokenizer, table["tokenizer"], own | quantizer, source=f"{fixture.folder}: quantizer")
    tokens, labels = fixture.io["gt_tokens"][..., None], fixture.io["labels"]
    yield from _segments(system, tokens, labels, fixture.runs["train"], config)
    cond = system.prepare({"class_labels": labels})
    yield from _sampled(system, cond, "ar_cfg", fixture.runs["ar_cfg"])
    yield from _sampled(system, cond, "ar_nocfg", fixture.runs["ar_nocfg"])


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The transformer, and its table."""
    values = layout["constructor"]
    config = configured({**values, "v_patch_nums": values["patch_nums"]}, values)
    return build(config).parts()["transformer"], keys(config)["transformer"]


def configured(quantizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> MVARConfig:
    """Our configuration from official constructor values; the recordings know no more of the tokenizer."""
    renamed = {**quantizer, "z_channels": quantizer["Cvae"], "ch": 32, "ch_mult": (1,), "num_res_blocks": 1}
    return MVARConfig(
        scale=as_var(renamed, transformer),
        kernel_size=transformer["kernel_size"],
        refine_step=transformer["refine_step"],
    )


def _segments(
    system: MVAR, tokens: Tensor, labels: Tensor, given: Mapping[str, Any], config: MVARConfig
) -> Iterator[tuple[str, Tensor]]:
    layout, items, coarse = system.tokenizer.layout(), len(tokens), given["coarse_scales"]
    yield "var_input", system.tokenizer.inputs(tokens, layout, 1)
    yield "tf_logits_all_segments", system.teacher(tokens, system.prepare({"class_labels": labels})).logits[:, :, 0]
    losses = []
    for step in range(system.ratio - 1, system.ratio - 1 + given["segments"]):
        batch = {"tokens": tokens, "class_labels": labels, "step": step}
        losses.append(system.loss(batch, Noise.of(0, items))["loss"])
    yield "segment_losses", torch.stack(losses)
    yield "mask_visible_coarse", _visible(system, *range(coarse))
    for side in given["neighbourhood_sides"]:
        grid = Layout(((side, side),))
        rows = Rows.of(grid.level_N, grid.place_N)
        seen = render(near(grid, config.kernel_size, 0), rows, rows)
        yield f"neighbourhood_mask_{side}x{side}", torch.ones(grid.n, grid.n) if seen is None else seen[0, 0]


def _visible(system: MVAR, *scales: int) -> Tensor:
    rows = system.transformer.rows(*scales)
    seen = render(system.see, rows, rows)
    return torch.ones(rows.count, rows.count) if seen is None else seen[0, 0]


def _sampled(system: MVAR, cond: Cond, name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    if given["sampling"] != "argmax" or given["guidance"] not in ("var_ramp", None):
        raise ValueError(f"recorded runs are guided by var_ramp or not at all and take the argmax, got {given}")
    noise = Noise.of(0, len(cond["class_labels"]))
    scale = given["cfg"] if given["guidance"] else 1.0
    s = system.start(cond, MVARSampling(cfg_scale=scale, top_k=0, top_p=0.0, temperature=0.0), noise)
    for _ in walk(system, s):
        pass
    yield f"{name}_tokens", s.tokens[..., 0]
    yield f"{name}_fhat", s.more["f"]
    tokens, logits = s.tokens, []
    s = system.start(cond, MVARSampling(cfg_scale=scale, top_k=0, top_p=0.0), noise)
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    yield f"{name}_logits_guided", torch.cat(logits, 1)
