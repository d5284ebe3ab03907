"""LlamaGen against its official code, and full-size checkpoints by their names and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.next_token import NextToken, temper_k_p
from arvis.noise import Noise, Recorded, Source
from arvis.parity.harness import Fixture
from arvis.sampling import per_item
from arvis.state import Cond
from arvis.systems.llamagen import CaptionConfig, LlamaGenConfig, LlamaGenSampling, build, keys, tokenizer_keys
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.grid import GridVQ, GridVQConfig
from arvis.walk import walk
from arvis.weights import Key, load_official

_TOKENIZER = {
    "codebook_size": "vocab_size",
    "codebook_embed_dim": "code_width",
    "codebook_l2_norm": "l2_norm",
    "commit_loss_beta": "beta",
    "entropy_loss_ratio": "entropy_ratio",
}
_CNN = {"ch": "ch", "z_channels": "z_channels", "num_res_blocks": "num_res_blocks"}
_TRANSFORMER = {
    "n_layer": "depth",
    "dim": "width",
    "n_head": "heads",
    "multiple_of": "ffn_multiple",
    "ffn_dim_multiplier": "ffn_factor",
    "norm_eps": "norm_eps",
    "rope_base": "rope_base",
}
_FIXED = {"norm_groups": 32, "norm_eps": 1e-6}
"""What no official tokenizer changes, and ours does not either."""


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    values = fixture.model("tokenizer")
    tokenizer = GridVQ(tokenizer_config(values)).eval()
    load_official(
        tokenizer, tokenizer_keys(tokenizer.config), fixture.weights("tokenizer"), source=f"{fixture.folder}: tokenizer"
    )
    yield from _tokenizer(tokenizer, fixture.io)
    for part, prepared in (("c2i", _classes), ("t2i", _captions)):
        config = configured(values, fixture.model(part))
        system = build(config).eval()
        load_official(
            system.transformer, keys(config)["transformer"], fixture.weights(part), source=f"{fixture.folder}: {part}"
        )
        yield from prepared(system, fixture)
    logits = fixture.io["filter.logits"][:, None, None]
    for name, given in _outputs(fixture, "filter"):
        knobs = {k: per_item(given[k], len(logits)) for k in ("top_k", "top_p")}
        yield name, temper_k_p(logits, {"temperature": torch.ones(1), **knobs})[:, 0, 0].softmax(-1)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    if "codebook_size" in values:
        config = tokenizer_config(values)
        return GridVQ(config), tokenizer_keys(config)
    config = configured({"codebook_size": values["vocab_size"], "ch": 32, "ch_mult": [1], "z_channels": 1}, values)
    return build(config).parts()["transformer"], keys(config)["transformer"]


def tokenizer_config(values: Mapping[str, Any], side: int = 16) -> GridVQConfig:
    """Our tokenizer from official constructor values; absent ones are the official defaults, which are ours."""
    for name, only in _FIXED.items():
        if values.get(name, only) != only:
            raise ValueError(f"group normalisation of the tokenizer has {name}={only}, got {values[name]}")
    down = tuple(values.get("encoder_ch_mult", values.get("ch_mult", (1, 1, 2, 2, 4))))
    up = tuple(values.get("decoder_ch_mult", down))
    cnn = {ours: values[theirs] for theirs, ours in _CNN.items() if theirs in values}
    return GridVQConfig(
        grid=(side, side),
        cnn=CNNConfig(ch_mult=down, decoder_ch_mult=() if up == down else up, **cnn),
        **{ours: values[theirs] for theirs, ours in _TOKENIZER.items() if theirs in values},
    )


def configured(tokenizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> LlamaGenConfig:
    """Our configuration from official constructor values; conditions are never dropped."""
    side = math.isqrt(transformer["block_size"])
    if side**2 != transformer["block_size"]:
        raise ValueError(f"block_size is that of a square grid, got {transformer['block_size']}")
    if transformer["vocab_size"] != tokenizer["codebook_size"]:
        raise ValueError(f"the transformer has {transformer['vocab_size']} codes, the tokenizer {tokenizer}")
    condition: dict[str, Any] = {"num_classes": transformer.get("num_classes", 1000)}
    if transformer["model_type"] == "t2i":
        caption = CaptionConfig(channels=transformer.get("caption_dim", 2048), rows=transformer["cls_token_num"])
        condition = {"num_classes": 0, "caption": caption}
    return LlamaGenConfig(
        tokenizer=tokenizer_config(tokenizer, side),
        kv_heads=transformer.get("n_kv_head") or 0,
        drop=0.0,
        **condition,
        **{ours: transformer[theirs] for theirs, ours in _TRANSFORMER.items() if theirs in transformer},
    )


def _outputs(fixture: Fixture, component: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The outputs of a component that a run with sampling settings made, with those settings."""
    for name, about in fixture.tensors.items():
        given = fixture.runs.get(about["run"] or "", {})
        if about["role"] == "output" and name.startswith(f"{component}.") and "top_k" in given:
            yield name, given


def _tokenizer(tokenizer: GridVQ, io: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    image = io["vq.image"]
    layout, f = tokenizer.layout(tuple(image.shape[2:])), tokenizer.features(image)
    quantized = tokenizer.quantized(f, layout, Noise.of(0))
    yield "vq.pre_quant", f
    yield "vq.quant", quantized.values
    yield "vq.indices", quantized.tokens[..., 0]
    yield "vq.recon", tokenizer.reconstruct(quantized.values)
    yield "vq.decode2", tokenizer.reconstruct(tokenizer.codes(io["vq.codes2"].flatten(1)[..., None], layout))
    yield "vq.loss_codebook", quantized.losses["codebook"].view(io["vq.loss_codebook"].shape)
    yield "vq.loss_commit", (quantized.losses["commit"] * tokenizer.config.beta).view(io["vq.loss_commit"].shape)


def _classes(system: NextToken, fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    io = fixture.io
    tokens, batch = io["c2i.tokens"][..., None], {"class_labels": io["c2i.class"]}
    yield "c2i.logits", system.teacher(tokens, system.prepare(batch)).logits[:, :, 0]
    yield "c2i.loss", system.loss({"tokens": tokens, **batch}, Noise.of(0, len(tokens)))["loss"][None]
    yield "c2i.rope", system.transformer.table(system.tokenizer.layout())[0]
    yield from _sampled(system, fixture, "c2i", system.prepare({"class_labels": io["c2i.gen_class"]}))


def _captions(system: NextToken, fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    io, given = fixture.io, fixture.runs["t2i_teacher_forcing"]
    if given["padding"] != "left":
        raise ValueError(f"captions are padded on the left, got padding={given['padding']!r}")
    texts = [io[f"t2i.caption_valid{i}"] for i in range(len(given["caption_lens"]))]
    most = max(map(len, texts))
    batch = {
        "text_features": torch.stack([F.pad(text, (0, 0, 0, most - len(text))) for text in texts]),
        "text_visible": torch.stack([torch.arange(most) < len(text) for text in texts]),
    }
    tokens, cond = io["t2i.tokens"][..., None], system.prepare(batch)
    yield "t2i.logits", system.teacher(tokens, cond).logits[:, :, 0]
    loss = system.loss({"tokens": tokens, **batch, "valid": given["valid"]}, Noise.of(0, len(tokens)))["loss"]
    yield f"t2i.loss_valid_{'_'.join(map(str, given['valid']))}", loss[None]
    yield from _sampled(system, fixture, "t2i", cond)


def _sampled(system: NextToken, fixture: Fixture, part: str, cond: Cond) -> Iterator[tuple[str, Tensor]]:
    items = len(next(iter(cond.values())))
    for name, given in _outputs(fixture, part):
        noise = _noise(fixture, fixture.tensors[name]["run"], items)
        s = system.start(cond, _sampling(given), noise)
        for _ in walk(system, s):
            pass
        yield name, s.tokens[..., 0]


def _sampling(given: Mapping[str, Any]) -> LlamaGenSampling:
    """The settings of a run; without sampling the most likely code is taken, whatever the temperature."""
    return LlamaGenSampling(
        cfg_scale=given["cfg_scale"],
        cfg_interval=given["cfg_interval"],
        top_k=given["top_k"],
        top_p=given["top_p"] if given["top_p"] > 0 else 1e-9,
        temperature=max(given["temperature"], 1e-5) if given["sample_logits"] else 0.0,
    )


def _noise(fixture: Fixture, run: str, items: int) -> Source:
    """The recorded uniforms of a run [N, B], one step per row; nobody asks for them where there are none."""
    for name, about in fixture.tensors.items():
        if about["role"] == "noise" and about["run"] == run:
            return Recorded({"draw": list(fixture.io[name][:, :, None, None])}, {}, items)
    return Noise.of(0, items)
