"""CoDe against its official code, and full-size checkpoints of its drafters and refiners by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arvis.noise import Noise, Recorded, Source
from arvis.parity.harness import Fixture
from arvis.state import State
from arvis.systems.code import CodeSampling, Collaborative, collaborate, official
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import at
from arvis.walk import walk
from arvis.weights import SAME_NAMES, Key, load_official

MODELS = official(8).drafter.module
"""The system of the published models."""

_QUANTIZER = {
    "vocab_size": "vocab_size",
    "Cvae": "z_channels",
    "beta": "beta",
    "using_znorm": "using_znorm",
    "quant_resi": "quant_resi",
    "share_quant_resi": "share_quant_resi",
}
_TRANSFORMER = {
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "heads",
    "num_classes": "num_classes",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_aln",
    "attn_l2_norm": "attn_l2_norm",
}

_QUANTIZER_KEYS = (Key("ema_vocab_hit_SV", "ema_vocab_hit_SV", optional=True, initial=torch.zeros_like), *SAME_NAMES)


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes and settings."""
    tokenizer = tokenizer_of(fixture.model("quantizer"))
    models = {}
    for name in ("drafter", "refiner"):
        config = configured(tokenizer, fixture.model(name))
        models[name], table = MODELS.build(config).eval(), MODELS.keys(config)["transformer"]
        load_official(models[name].transformer, table, fixture.weights(name), source=f"{fixture.folder}: {name}")
    shared = models["drafter"].tokenizer
    load_official(shared.quantize, _QUANTIZER_KEYS, fixture.weights("quantizer"), source=f"{fixture.folder}: quantizer")
    models["refiner"].tokenizer = shared
    io = fixture.io
    for name, given in fixture.runs.items():
        if "mask_l" in given:
            yield from _prefix(models["drafter"], io, name, given)
        else:
            yield from _sampled(models, io, name, given, fixture.tensors)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    named = {"vocab_size": "vocab_size", "Cvae": "Cvae", "v_patch_nums": "patch_nums"}
    config = configured(tokenizer_of({ours: values[theirs] for ours, theirs in named.items()}), values)
    return MODELS.build(config).transformer, MODELS.keys(config)["transformer"]


def tokenizer_of(values: Mapping[str, Any]) -> PyramidVQConfig:
    """The tokenizer whose quantiser has official constructor values; its encoder and decoder are the smallest."""
    own = {ours: values[theirs] for theirs, ours in _QUANTIZER.items() if theirs in values}
    sides = tuple(values["v_patch_nums"])
    patch = PatchConfig(
        grid=(sides[-1], sides[-1]), z_channels=own["z_channels"], width=4, heads=1, encoder_depth=1, decoder_depth=1
    )
    return PyramidVQConfig(patch_nums=sides, patch=patch, **own)


def configured(tokenizer: PyramidVQConfig, values: Mapping[str, Any]) -> Any:
    """A model over its scales from official constructor values; absent ones are the official defaults."""
    if tuple(values["patch_nums"]) != tokenizer.patch_nums:
        raise ValueError(f"quantiser and model differ in scales: {tokenizer.patch_nums} and {values['patch_nums']}")
    own = {ours: values[theirs] for theirs, ours in _TRANSFORMER.items() if theirs in values}
    return MODELS.CONFIG(tokenizer=tokenizer, label_drop=0.0, **own)


def _sampled(
    models: Mapping[str, Any], io: Mapping[str, Tensor], name: str, given: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """A collaborative run: tokens, sums, what is handed over, guided logits."""
    handover = given["exit_num"]
    if given["guidance"] != "var_ramp" or given["entry_num"] != handover:
        raise ValueError(f"guidance is var_ramp, and the refiner enters where the drafter exits, got {dict(given)}")
    drafter, refiner = (models[given.get("model", name)] for name in ("drafter", "refiner"))
    pair = collaborate(drafter, refiner, handover).eval()
    layout, items = pair.tokenizer.layout(), len(io["labels"])
    sampling = CodeSampling(
        cfg_scale=given["cfg"],
        top_k=tuple(given["top_k"]),
        top_p=given["top_p"],
        temperature=tuple(given["temperature"]),
    )
    greedy = set(given["top_k"]) == {1}
    noise: Source = Noise.of(0, items)
    if not greedy:
        uniform = [io["uniforms"][:, layout.span(k), None] for k in range(layout.K)]
        noise = Recorded({"draw": uniform}, {}, items)
    s = pair.start(pair.prepare({"class_labels": io["labels"]}), sampling, noise)
    for step in walk(pair, s):
        if step.k == handover and f"{name}_f_hat_draft" in tensors:
            yield f"{name}_f_hat_draft", s.more["f"].clone()
            yield f"{name}_hub", pair.tokenizer.inputs(s.tokens, layout, 1, handover + 1)
    yield f"{name}_tokens", s.tokens[..., 0]
    if f"{name}_f_hat_final" in tensors:
        yield f"{name}_f_hat_final", s.more["f"]
    logits = _guided(pair, io["labels"], given["cfg"], s)
    for k in given.get("logits_scales", ()):
        if f"{name}_logits_s{k}" in tensors:
            yield f"{name}_logits_s{k}", logits[k]


def _guided(pair: Collaborative, labels: Tensor, scale: float, done: State) -> list[Tensor]:
    """Guided logits of each scale before filters, along what was drawn."""
    sampling = replace(CodeSampling.plain(), cfg_scale=scale)
    s, out = pair.start(pair.prepare({"class_labels": labels}), sampling, Noise.of(0, len(labels))), []
    while not bool(s.done.all()):
        d: Any = pair.predict(s)
        out.append(d.logits[:, :, 0])
        pair.commit(s, d, at(done.tokens, d.where))
    return out


def _prefix(model: Any, io: Mapping[str, Tensor], name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Teacher forcing over a prefix of the scales, as a drafter learns."""
    layout, labels = model.transformer.layout, io["labels"]
    if given["mask_l"] not in layout.offsets:
        raise ValueError(f"a prefix ends with a scale: one of {layout.offsets[1:]} positions, got {given['mask_l']}")
    last = layout.offsets.index(given["mask_l"])
    c = model.transformer.conditioner({"class_labels": labels}, torch.zeros(len(labels), dtype=torch.bool))
    h = model.transformer(c, io[f"{name}_input"] if last > 1 else None, 0, last, model.see)
    yield f"{name}_logits_tail", model.transformer.head(h, c.vector)[:, -given["tail"] :]
