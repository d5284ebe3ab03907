"""STAR against its official code, and full-size checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.clip import CLIPConfig
from arvis.nn.trunk import Call
from arvis.noise import Recorded
from arvis.parity.harness import Fixture
from arvis.reveal import reveal_counts
from arvis.state import Cond
from arvis.systems.star import STAR, Inside, STARConfig, STARSampling, build, keys, plan
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.walk import finish, generate
from arvis.weights import SAME_NAMES, Key, load_official

_INSIDE: dict[str, Inside] = {"new": "stable", "1024": "mixed"}


class FirstOfBatch(nn.Module):
    """As recorded: row 0 of the batch speaks for all of it in cross-attention. The library keeps this inside an item
    (`FirstRow`), which is the same for one picture at a time."""

    def __init__(self, cross: nn.Module) -> None:
        super().__init__()
        self.cross = cross

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return self.cross(x, call)[:1].expand_as(x)


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes and settings."""
    quantizer, transformer = fixture.model("quantizer"), fixture.model("transformer")
    config = configured(quantizer, transformer)
    runs, io = fixture.runs, fixture.io
    items = len(io["tf_tokens"])
    systems = {}
    for name in ("per_sample", "released"):
        system = build(config).eval()
        load_official(
            system.tokenizer.quantize, _QUANTIZER_KEYS, fixture.weights("quantizer"), source=f"{fixture.folder}"
        )
        load_official(
            system.transformer, keys(config)["transformer"], fixture.weights("transformer"), source=f"{fixture.folder}"
        )
        for block in system.transformer.trunk.blocks if name == "released" else ():
            block.cross = FirstOfBatch(block.get_submodule("cross"))
        systems[name] = system
    system = systems["per_sample"]
    cond = _cond(system, io, items)
    yield "rope_cos", system.transformer.table[0, ..., 0]
    yield "rope_sin", system.transformer.table[0, ..., 1]
    yield "tf_input", system.tokenizer.inputs(io["tf_tokens"][..., None], system.transformer.layout)
    for name, given in runs.items():
        if name.startswith("tf_"):
            yield from _teacher(systems[given["cross_attention"]], name.removeprefix("tf_"), io, cond)
        elif name == "sampler_head":
            yield from _sampler(systems[given["cross_attention"]], io, cond, given)
        elif "w_mask" in given:
            yield from _sampled(systems[given["cross_attention"]], name, io, cond, given)
    for case in runs["schedule"]["cases"]:
        steps, side = case["steps"], case["patch_size"]
        yield f"schedule_S{steps}_p{side}", reveal_counts(torch.tensor([side**2]), steps)[0]


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The transformer of a key layout, and its table."""
    config = configured({"v_patch_nums": layout["constructor"]["patch_nums"]}, layout["constructor"])
    return build(config).transformer, keys(config)["transformer"]


_QUANTIZER_KEYS = (
    Key("ema_vocab_hit_SV", "ema_vocab_hit_SV", optional=True, initial=torch.zeros_like),
    *SAME_NAMES,
)


def configured(quantizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> STARConfig:
    """Our configuration from official constructor values; absent ones are those of the released models.

    A recording has no encoder of pictures, so the smallest one stands there.
    """
    patch_nums = tuple(transformer["patch_nums"])
    if tuple(quantizer["v_patch_nums"]) != patch_nums:
        raise ValueError(f"tokenizer and transformer differ in scales: {quantizer['v_patch_nums']} and {patch_nums}")
    for name, only in (("shared_aln", False), ("enable_cross", True), ("rotary_pos_emb", True)):
        if transformer.get(name, only) is not only:
            raise ValueError(f"released models have {name}={only}, got {transformer[name]}: not supported")
    values = {**transformer, **quantizer}
    channels = values.get("Cvae", 32)
    named = {"beta": "beta", "using_znorm": "using_znorm", "quant_resi": "quant_resi"}
    shares = {"share_quant_resi": values.get("share_quant_resi", 4)}
    tokenizer = PyramidVQConfig(
        patch_nums=patch_nums,
        vocab_size=values.get("vocab_size", 4096),
        z_channels=channels,
        cnn=CNNConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=channels),
        **shares,
        **{ours: values[theirs] for theirs, ours in named.items() if theirs in values},
    )
    return STARConfig(
        tokenizer=tokenizer,
        depth=transformer["depth"],
        width=transformer["embed_dim"],
        heads=transformer["num_heads"],
        clip=CLIPConfig(channels=transformer.get("in_dim_cross", 1024)),
        mlp_ratio=transformer.get("mlp_ratio", 4.0),
        norm_eps=transformer.get("norm_eps", 1e-6),
        attn_l2_norm=transformer.get("attn_l2_norm", True),
        rope_theta=float(transformer.get("rope_theta", 10000.0)),
        rope_norm=float(transformer.get("rope_norm", 64.0)),
        level_rows=transformer.get("absolute_lvl_emb", True),
        logit_norm=transformer.get("enable_logit_norm", True),
        class_rows=transformer.get("num_classes", 1000) + 1,
        sampler_from=transformer.get("sample_from_idx", 9) if transformer.get("enable_adaptive_norm") else None,
        sampler_blocks=transformer.get("sampler_blocks", 3),
        label_drop=0.0,
    )


def _cond(system: STAR, io: Mapping[str, Tensor], items: int) -> Cond:
    """The first rows are texts, the next ones the empty prompt, one for each."""
    request = {}
    for name, rows in (("text", slice(items)), ("negative", slice(items, 2 * items))):
        for ours, theirs in (("features", "states"), ("pooled", "pooled"), ("visible", "mask")):
            request[f"{name}_{ours}"] = io[f"text_{theirs}"][rows]
    return system.prepare(request)


def _teacher(system: STAR, name: str, io: Mapping[str, Tensor], cond: Cond) -> Iterator[tuple[str, Tensor]]:
    h = _features(system, io["tf_tokens"], cond)
    yield f"tf_feat_{name}", h
    yield f"tf_logits_{name}", system.transformer.head(h)


def _features(system: STAR, tokens: Tensor, cond: Cond) -> Tensor:
    t = system.transformer
    c = t.conditioner(cond, torch.zeros(len(tokens), dtype=torch.bool))
    return t(c, system.tokenizer.inputs(tokens[..., None], t.layout), 0, t.layout.K, system.scales.see)


def _sampler(
    system: STAR, io: Mapping[str, Tensor], cond: Cond, given: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    t, first, last = system.transformer, given["scales"][0], given["scales"][-1] + 1
    span = slice(t.layout.offsets[first], t.layout.offsets[last])
    placed = system.tokenizer.embed(io["tf_tokens"][:, span, None]) * io["sampler_visible"][..., None]
    h = _features(system, io["tf_tokens"], cond)[:, span]
    yield f"sampler_logits_{given['cross_attention']}", t.stable(h, placed, cond["pooled"], first, last)


def _sampled(
    system: STAR, name: str, io: Mapping[str, Tensor], cond: Cond, given: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    if given["guidance"] != "var_ramp":
        raise ValueError(f"guidance here is var_ramp, got {given['guidance']!r}")
    inside: Inside = _INSIDE[given["sample_version"]] if given["w_mask"] else "independent"
    sampling = STARSampling(
        cfg_scale=given["cfg"],
        top_k=given["top_k"],
        top_p=given["top_p"],
        inside=inside,
        steps=given["sampler_steps"],
        random=given["random_score_steps"],
    )
    noise = _noise(system, io["uniforms"], io["reveal_scores"], sampling)
    s = finish(generate(system, cond, sampling, noise))
    yield f"{name}_tokens", s.tokens[..., 0]
    yield f"{name}_code_maps", system.tokenizer.embed(s.tokens)
    yield f"{name}_f_hat", s.more["f"]


def _noise(system: STAR, uniform: Tensor, score: Tensor, sampling: STARSampling) -> Recorded:
    """Numbers in the order in which the official code draws them, scale by scale and step by step."""
    draws, reveals, at, used = [], [], 0, 0
    for k, n in enumerate(system.transformer.layout.sizes):
        first = system.config.sampler_from
        inside = None if first is None or k < first else plan(sampling.inside, sampling.steps, sampling.random, k)
        steps, random = (1, 0) if inside is None else (inside.steps, min(inside.random, inside.steps))
        u = uniform[:, at : at + steps * n].view(len(uniform), steps, n)
        draws.append(u.transpose(1, 2) if inside is None else u)
        reveals.append(score[:, used : used + random * n].view(len(score), random, n))
        at, used = at + steps * n, used + random * n
    return Recorded({"draw": draws, "reveal": reveals}, {}, len(uniform))
