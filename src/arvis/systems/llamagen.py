"""LlamaGen: a plain Llama decoder that predicts the codes of a VQGAN one after another, row by row.

Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, arXiv 2406.06525. Weights: MIT.

A class, or 120 rows of frozen text features, stands before the codes. Rotary positions are those of the grid; the rows
of the condition have cos = sin = 0, so every query weighs them alike and they speak through their values alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from arvis.data.captions import clean_caption
from arvis.next_token import NextToken, TokenTransformer, cfg_until, temper_k_p
from arvis.nn.llama import LlamaBlock, RMSNorm, rotary_grid, swiglu_width
from arvis.nn.prefix import ClassPrefix, FeaturePrefix, WordPrefix
from arvis.nn.t5 import t5_features
from arvis.nn.text import TextConfig
from arvis.nn.trunk import Trunk
from arvis.published import File, Preset, Result
from arvis.sampling import per_item
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.grid import GridVQ, GridVQConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import Layout
from arvis.weights import Key
from arvis.weights.families import vqgan_keys


@dataclass(frozen=True, kw_only=True)
class LlamaGenSampling:
    """Settings of the official demonstration; each may be one number or one per item.

    u + `cfg_scale` (c - u) where the scale is above 1. Of the decoding steps after the first prediction, those up to
    number `cfg_interval` are guided, later ones not (-1: all are).
    """

    cfg_scale: float = 4.0
    cfg_interval: int = -1
    top_k: int = 2000
    top_p: float = 1.0
    temperature: float = 1.0

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=1.0, top_k=0)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """A frozen encoder `repo` of the hub, `channels` wide, and how many rows of it are read."""

    repo: str = "google/flan-t5-xl"
    channels: int = 2048
    rows: int = 120


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """Sizes of the transformer and its tokenizer.

    The condition is one of `num_classes`, or text (then that is 0): of a frozen encoder (`caption`), or of one that is
    trained along (`text`).
    `kv_heads` 0 means as many as heads. The network of a block has two thirds of four times the width, times
    `ffn_factor`, rounded up to a multiple of `ffn_multiple`. `still` leaves the rows of the condition where they are
    instead of switching their queries and keys off: text that is trained along learns faster. `dropout` is that of
    input rows and residuals, `drop` that of the condition.
    """

    tokenizer: GridVQConfig
    depth: int
    width: int
    heads: int
    kv_heads: int = 0
    num_classes: int = 1000
    caption: CaptionConfig | None = None
    text: TextConfig | None = None
    ffn_multiple: int = 256
    ffn_factor: float | None = None
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    still: bool = False
    dropout: float = 0.1
    drop: float = 0.1

    def __post_init__(self) -> None:
        kinds = [bool(self.num_classes), self.caption is not None, self.text is not None]
        if sum(kinds) != 1:
            raise ValueError(
                "the condition is one of num_classes, caption and text; got "
                f"num_classes={self.num_classes}, caption={self.caption}, text={self.text}"
            )


def weigh(sampling: Any, items: int, steps: int) -> Tensor:
    """Guidance weights [B, steps, 1 or 2] over the condition and none."""
    scale, decodes = (per_item(getattr(sampling, name), items) for name in ("cfg_scale", "cfg_interval"))
    return cfg_until(scale, decodes, steps)


def read_captions(prompts: list[str], device: torch.device, caption: CaptionConfig) -> tuple[Tensor, Tensor]:
    """Features of prompts, which are cleaned twice."""
    return t5_features([clean_caption(clean_caption(p)) for p in prompts], caption.repo, caption.rows, device)


def conditioner(config: LlamaGenConfig) -> ClassPrefix | FeaturePrefix | WordPrefix:
    """What makes the first rows."""
    if config.caption is not None:
        caption = config.caption
        return FeaturePrefix(caption.channels, config.width, caption.rows, partial(read_captions, caption=caption))
    if config.text is not None:
        return WordPrefix(config.text, config.width)
    return ClassPrefix(config.num_classes, config.width)


def block(config: LlamaGenConfig) -> LlamaBlock:
    """One block of a configuration."""
    return LlamaBlock(
        config.width,
        config.heads,
        hidden=swiglu_width(config.width, config.ffn_multiple, config.ffn_factor),
        kv_heads=config.kv_heads,
        eps=config.norm_eps,
        dropout=config.dropout,
    )


def build(config: LlamaGenConfig) -> NextToken:
    """A LlamaGen with freshly initialised weights; its head is zero."""
    dim, base, still = config.width // config.heads, config.rope_base, config.still

    def positions(layout: Layout, prefix: int) -> Tensor:
        return rotary_grid(layout, prefix, dim, base, still)

    prefix = conditioner(config)
    transformer = TokenTransformer(
        prefix,
        Trunk(block(config) for _ in range(config.depth)),
        RMSNorm(config.width, config.norm_eps),
        codes=config.tokenizer.vocab_size,
        width=config.width,
        positions=positions,
        dropout=config.dropout,
    )
    transformer.init_weights()
    if isinstance(prefix, WordPrefix):
        prefix.encoder.init_weights()
    return NextToken(
        GridVQ(config.tokenizer),
        transformer,
        LlamaGenSampling,
        weigh=weigh,
        narrow=temper_k_p,
        knobs=("temperature", "top_k", "top_p"),
        drop=config.drop,
    )


# -- presets ------------------------------------------------------------------------------------------------------

SIZES = {
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "xxxl": (48, 2560, 40),
    "1b": (22, 2048, 32),
    "3b": (24, 3200, 32),
    "7b": (32, 4096, 32),
}
"""Depth, width and heads by name; xxxl, 1b and 7b have no published weights."""


def vq(downsample: int, side: int) -> GridVQConfig:
    """The published tokenizers of `side` x `side` cells: 16,384 codes of 8 channels, 16x or 8x down."""
    ch_mult = {16: (1, 1, 2, 2, 4), 8: (1, 2, 2, 4)}[downsample]
    return GridVQConfig(grid=(side, side), cnn=CNNConfig(ch=128, ch_mult=ch_mult, z_channels=256))


def sized(size: str, pixels: int, caption: CaptionConfig | None = None) -> LlamaGenConfig:
    """A size of the paper for pictures of so many pixels."""
    depth, width, heads = SIZES[size]
    return LlamaGenConfig(
        tokenizer=vq(16, pixels // 16),
        depth=depth,
        width=width,
        heads=heads,
        num_classes=0 if caption else 1000,
        caption=caption,
    )


_INSIDE = "model|module|state_dict|"
_CLASS, _TEXT = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
_ADAMW = {"schedule": "constant", "final": 1.0, "weight_decay": 0.05, "clip": 1.0, "betas": (0.9, 0.95)}
_TOKENIZER = {
    "steps": 40 * (1_281_167 // 128),
    "batch": 128,
    "lr": 1e-4,
    **_ADAMW,
    "weight_decay": 0.0,
}


def _preset(size: str, pixels: int, scale: float, batch: int = 256) -> Preset:
    """A class-conditional size, with the settings of its published FID."""
    return Preset(
        config=lambda: sized(size, pixels),
        files={
            "tokenizer": File(repo=_CLASS, name="vq_ds16_c2i.pt", inside=_INSIDE),
            "transformer": File(repo=_CLASS, name=f"c2i_{size.upper()}_{pixels}.pt", inside=_INSIDE),
        },
        licence="MIT",
        sampling={"cfg_scale": scale, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
        training={
            "tokenizer": _TOKENIZER,
            "generator": {"steps": 300 * (1_281_167 // batch), "batch": batch, "lr": 1e-4 * batch / 256, **_ADAMW},
        },
    )


def _text_preset(stage: int, pixels: int, steps: int) -> Preset:
    """A stage of the text-conditional model; `steps` pass its pictures once (the official number is not stated)."""
    caption = CaptionConfig()
    return Preset(
        config=lambda: sized("xl", pixels, caption),
        files={
            "tokenizer": File(repo=_TEXT, name="vq_ds16_t2i.pt", inside=_INSIDE),
            "transformer": File(repo=_TEXT, name=f"t2i_XL_stage{stage}_{pixels}.pt", inside=_INSIDE),
        },
        licence="MIT",
        text=caption.repo,
        sampling={"cfg_scale": 7.5, "top_k": 1000, "top_p": 1.0, "temperature": 1.0},
        training={"tokenizer": _TOKENIZER, "generator": {"steps": steps, "batch": 256, "lr": 1e-4, **_ADAMW}},
    )


def emoji_64() -> LlamaGenConfig:
    """64x64 pixels, 8x8 cells of 1,024 codes; words of an encoder that is trained along."""
    tokenizer = GridVQConfig(grid=(8, 8), vocab_size=1024, patch=PatchConfig())
    return LlamaGenConfig(
        tokenizer=tokenizer,
        depth=6,
        width=256,
        heads=4,
        num_classes=0,
        text=TextConfig(words=16),
        still=True,
        dropout=0.0,
    )


_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}

CONFIG = LlamaGenConfig

PRESETS = {
    "llamagen-b-256": _preset("b", 256, 2.0),
    "llamagen-b-384": _preset("b", 384, 2.0),
    "llamagen-l-256": _preset("l", 256, 2.0),
    "llamagen-l-384": _preset("l", 384, 2.0),
    "llamagen-xl-384": _preset("xl", 384, 1.75, batch=512),
    "llamagen-xxl-384": _preset("xxl", 384, 1.75, batch=512),
    "llamagen-3b-384": _preset("3b", 384, 1.65, batch=512),
    "llamagen-xl-t2i-256": _text_preset(1, 256, 50_000_000 // 256),
    "llamagen-xl-t2i-512": _text_preset(2, 512, 10_000_000 // 256),
    "llamagen-emoji-64": Preset(
        config=emoji_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 2.0, "top_k": 200, "top_p": 0.9},
        training={
            "tokenizer": {
                "steps": 1000,
                "batch": 64,
                "lr": 3e-3,
                **_SCHEDULE,
                "clip": 1.0,
                "weight_decay": 0.01,
                "muon": ("coder.grid",),
            },
            "generator": {"steps": 2000, "batch": 64, "lr": 3e-3, **_SCHEDULE, "muon": ("trunk",)},
        },
    ),
}

RESULTS = tuple(
    Result(
        preset=name, metric="FID", value=fid, settings=f"cfg {scale}, all codes, 50k, {note}", source="official README"
    )
    for name, fid, scale, note in (
        ("llamagen-b-256", 5.46, 2.0, "at 256"),
        ("llamagen-b-384", 6.09, 2.0, "resized to 256"),
        ("llamagen-l-256", 3.80, 2.0, "at 256"),
        ("llamagen-l-384", 3.07, 2.0, "resized to 256"),
        ("llamagen-xl-384", 2.62, 1.75, "resized to 256"),
        ("llamagen-xxl-384", 2.34, 1.75, "resized to 256"),
        ("llamagen-3b-384", 2.18, 1.65, "resized to 256"),
    )
)


# -- official names -----------------------------------------------------------------------------------------------


def tokenizer_keys(config: GridVQConfig) -> tuple[Key, ...]:
    """Official names of a convolutional tokenizer."""
    return vqgan_keys(config.backbone)


TRANSFORMER_KEYS = (
    Key("conditioner.embedding.weight", "cls_embedding.embedding_table.weight"),
    Key("conditioner.null", "cls_embedding.uncond_embedding"),
    Key("conditioner.{fc}.weight", "cls_embedding.cap_proj.{fc}.weight"),
    Key("embedding.weight", "tok_embeddings.weight"),
    Key("trunk.blocks.{i}.attn.qkv.weight", "layers.{i}.attention.wqkv.weight"),
    Key("trunk.blocks.{i}.attn.out.weight", "layers.{i}.attention.wo.weight"),
    Key("trunk.blocks.{i}.ffn.gate.weight", "layers.{i}.feed_forward.w1.weight"),
    Key("trunk.blocks.{i}.ffn.up.weight", "layers.{i}.feed_forward.w3.weight"),
    Key("trunk.blocks.{i}.ffn.down.weight", "layers.{i}.feed_forward.w2.weight"),
    Key("trunk.blocks.{i}.attn_norm.weight", "layers.{i}.attention_norm.weight"),
    Key("trunk.blocks.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
    Key("norm.weight", "norm.weight"),
    Key("output.weight", "output.weight"),
    Key((), "freqs_cis"),  # old files: the rotary table
    Key((), "layers.{i}.attention.kv_cache.{rest*}"),  # of a model that was saved after sampling
)


def keys(config: LlamaGenConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part."""
    return {"tokenizer": tokenizer_keys(config.tokenizer), "transformer": TRANSFORMER_KEYS}


def tiny() -> NextToken:
    """The smallest complete LlamaGen, for the laws."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
    tokenizer = GridVQConfig(grid=(2, 3), vocab_size=5, code_width=4, cnn=cnn)
    system = build(LlamaGenConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, kv_heads=1, num_classes=3))
    for p in system.transformer.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)  # the head too: with one of zeros nothing could be told
    return system
