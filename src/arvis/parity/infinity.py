"""Infinity against its official code, and full-size checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.rotary_scales import Style
from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.quant.multiscale import area, to_rows
from arvis.state import Cond
from arvis.systems.infinity import CaptionConfig, Infinity, InfinityConfig, InfinitySampling, build, keys
from arvis.tokenizers.bits import BitPyramidConfig
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.ratios import RATIOS
from arvis.tokens import Layout, at
from arvis.walk import finish, generate
from arvis.weights import Key, load_official

_STYLES: dict[int, Style] = {0: "own", 1: "resampled", 2: "grid"}


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes and settings."""
    config = configured(fixture.model("tokenizer"), fixture.model("transformer"))
    system = build(config).eval()
    for part, table in keys(config).items():
        load_official(system.parts()[part], table, fixture.weights(part), source=f"{fixture.folder}: {part}")
    runs, io, layout = fixture.runs, fixture.io, system.tokenizer.layout()
    cond = system.prepare(_padded(io["text_features"], io["text_cu_seqlens"].tolist()))
    yield from _tokenizer(system, io["image"], layout, runs["tokenizer"])
    yield from _text(system, cond)
    yield from _teacher(system, io, cond, layout, runs)
    for name, given in runs.items():
        if "cfg" in given:
            yield from _sampled(system, name, cond, layout, given)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    if "depth" in values:
        part, patchify = "transformer", values["apply_spatial_patchify"]
        smallest = {"base_ch": 32, "ch_mult": [1], "patch_size": 1, "num_res_blocks": 1}
        config = configured({"codebook_dim": values["vae_bits"], **smallest}, values)
    else:
        part, patchify = "tokenizer", values["apply_spatial_patchify_in_transformer"]
        smallest = {"text_channels": 128, "text_maxlen": 1, "embed_dim": 4, "depth": 1, "num_heads": 1}
        config = configured(values, {**smallest, "block_chunks": 1, "apply_spatial_patchify": patchify})
    return build(config).parts()[part], keys(config)[part]


def configured(tokenizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> InfinityConfig:
    """Our configuration from official constructor values; absent ones are those of the released models."""
    extra = tokenizer.get("decoder_extra_res_block", 1)
    if extra != 1 or not transformer.get("rope2d_each_sa_layer", 1):
        raise ValueError(f"decoders have one block more than encoders and positions are rotary, got {extra} more")
    bits, patchify = tokenizer["codebook_dim"], 2 if transformer.get("apply_spatial_patchify") else 1
    scales = _flat(transformer["scale_schedule"]) if "scale_schedule" in transformer else RATIOS[1.0]
    cells = tuple((h * patchify, w * patchify) for h, w in scales)
    if "scale_schedule" in tokenizer and _flat(tokenizer["scale_schedule"]) != cells:
        raise ValueError(f"the tokenizer's scales are {tokenizer['scale_schedule']}, the transformer needs {cells}")
    ch_mult = tuple(tokenizer.get("encoder_ch_mult") or tokenizer["ch_mult"])
    decoder_ch_mult = tuple(tokenizer.get("decoder_ch_mult", ch_mult))
    cnn = CNNConfig(
        ch=tokenizer["base_ch"],
        ch_mult=ch_mult,
        decoder_ch_mult=() if decoder_ch_mult == ch_mult else decoder_ch_mult,
        halvings=tokenizer["patch_size"].bit_length() - 1,
        num_res_blocks=tokenizer["num_res_blocks"],
        z_channels=bits,
        using_sa=False,
        using_mid_sa=False,
    )
    width, channels = transformer["embed_dim"], transformer["text_channels"]
    return InfinityConfig(
        tokenizer=BitPyramidConfig(bits=bits, scales=scales, patchify=patchify, cnn=cnn),
        depth=transformer["depth"],
        width=width,
        heads=transformer["num_heads"],
        caption=CaptionConfig(channels=channels, length=transformer["text_maxlen"]),
        pool_heads=transformer.get("pool_num_heads", channels // (64 if width > 4096 else 128)),
        chunks=transformer["block_chunks"],
        level_each_chunk=not transformer.get("add_lvl_embeding_only_first_block", 1),
        rope=_STYLES[transformer.get("rope2d_normalized_by_hw", 2)],
        labels="bits" if transformer.get("use_bit_label", 1) else "codes",
        mlp_ratio=transformer.get("mlp_ratio", 4.0),
        norm_eps=transformer.get("norm_eps", 1e-6),
        shared_aln=transformer.get("shared_aln", True),
        head_aln=transformer.get("head_aln", True),
        attn_l2_norm=transformer.get("cos_attn", True),
        label_drop=0.0,
        flip_strength=0.0,
    )


def _flat(schedule: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Scales (h, w) of a schedule (t, h, w) of images."""
    if any(t != 1 for t, _, _ in schedule):
        raise ValueError(f"scales of one image have t = 1, got {schedule}")
    return tuple((h, w) for _, h, w in schedule)


def _padded(packed: Tensor, ends: Sequence[int]) -> dict[str, Tensor]:
    """Features of all texts one after another -> one row of texts per item."""
    texts = [packed[a:b] for a, b in pairwise(ends)]
    features = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return {"text_features": features, "text_visible": torch.arange(features.shape[1]) < lengths[:, None]}


def _tokenizer(
    system: Infinity, image: Tensor, layout: Layout, given: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    tokenizer, patchify = system.tokenizer, system.tokenizer.config.patchify
    tokens = tokenizer.encode(image, layout)
    fhats = tokenizer.fhats(tokens, layout)
    yield "raw_features", tokenizer.features(image)
    yield "z_quantized", fhats[-1]
    for k in range(given["num_scales"]):
        yield f"bits_s{k}", _cells(system, tokens, k, layout)
    yield "recon", tokenizer.decode(tokens, layout)
    sizes = [(h * patchify, w * patchify) for h, w in layout.levels[1:]]
    yield "area_inputs", torch.cat([to_rows(area(f, size)) for f, size in zip(fhats, sizes, strict=False)], 1)


def _text(system: Infinity, cond: Cond) -> Iterator[tuple[str, Tensor]]:
    transformer = system.transformer
    c = transformer.conditioner(cond, torch.zeros(len(cond["text"]), dtype=torch.bool))
    assert c.context is not None
    yield "cond_BD", c.vector
    yield "text_ca", c.context[0][cond["visible"]]
    gss = transformer.modulation(c)
    yield "gss_shared", gss[:, None] if gss.dim() == 3 else gss


def _teacher(
    system: Infinity, io: Mapping[str, Tensor], cond: Cond, layout: Layout, runs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    transformer, f = system.transformer, system.tokenizer.features(io["image"])
    yield "rope_cos_sin", transformer.table(layout)[0].movedim(-1, 0)
    c = transformer.conditioner(cond, torch.zeros(len(f), dtype=torch.bool))
    for name, run_, logits in (("tf", "teacher_forcing", "tf_logits"), ("bsc", "bsc", "tf_logits_bsc")):
        if run_ not in runs:
            continue
        labels, x = system.tokenizer.corrected(f, layout, _flips(io, name, layout, system.space.S, runs[run_], system))
        yield f"{name}_input", x
        yield f"{name}_labels", labels
        yield logits, system.one_pass(x, c, layout, range(1, layout.K), system.see).logits.flatten(2)
    texts = {"text_features": cond["text"], "text_visible": cond["visible"]}
    for name, reweight in (("loss_reweighted", True), ("loss_plain", False)):
        weighed = Infinity(system.tokenizer, transformer, replace(system.config, reweight=reweight))
        yield name, weighed.loss({"image": io["image"], **texts}, Noise.of(0, len(f)))["loss"].float()[None]


def _flips(
    io: Mapping[str, Tensor], name: str, layout: Layout, bits: int, given: Mapping[str, Any], system: Infinity
) -> Tensor | None:
    """Which bits of the tokens are flipped before the next scales are quantised: [B, N, S]."""
    levels = min(given["noise_apply_layers"], layout.K)
    if levels <= 0 or not given["noise_apply_requant"]:
        return None
    parts = []
    for k in range(layout.K):
        if k < levels:
            uniform = io[f"{name}_uniform_s{k}"]
            flips = uniform < io[f"{name}_strength"][k]
            parts.append(system.tokenizer.token_rows(flips[:, 0].movedim(-1, 1)))
        else:
            parts.append(torch.zeros(len(io["image"]), layout.sizes[k], bits, dtype=torch.bool))
    return torch.cat(parts, 1)


def _sampled(
    system: Infinity, name: str, cond: Cond, layout: Layout, given: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    if given.get("guidance", "constant") != "constant" or not given.get("kv_cache", True):
        raise ValueError(f"guidance is constant or a list, over a cache, got {dict(given)}")
    items, places = len(cond["text"]), given["cfg_insertion_layer"]
    sampling = InfinitySampling(
        **_setting("cfg_scale", "cfg_list", given["cfg"]),
        **_setting("temperature", "temperature_list", given["tau"]),
        top_k=given["top_k"],
        top_p=given["top_p"],
        guide_after=tuple(places) if isinstance(places, Sequence) else (places,),
    )
    tokens = finish(generate(system, cond, sampling, Noise.of(0, items), layout)).tokens
    for k in range(layout.K):
        yield f"{name}_bits_s{k}", _cells(system, tokens, k, layout)
    s, logits = system.start(cond, replace(sampling, top_k=0, top_p=0.0), Noise.of(0, items), layout), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits.flatten(2))
        system.commit(s, d, at(tokens, d.where))
    yield f"{name}_logits", torch.cat(logits, 1)
    image = (system.tokenizer.decode(tokens, layout) + 1) / 2
    yield f"{name}_image_u8_bgr", image.permute(0, 2, 3, 1).mul(255).to(torch.uint8).flip(-1)


def _setting(one: str, each: str, value: float | Sequence[float]) -> dict[str, Any]:
    return {each: tuple(value)} if isinstance(value, Sequence) else {one: value}


def _cells(system: Infinity, tokens: Tensor, k: int, layout: Layout) -> Tensor:
    """Bits of scale k in the tokenizer's cells [B, 1, h, w, d]."""
    patchify = system.tokenizer.config.patchify
    h, w = layout.levels[k]
    rows = system.tokenizer.cell_rows(tokens[:, layout.span(k)], k, layout)
    return rows.view(len(tokens), 1, h * patchify, w * patchify, -1)
