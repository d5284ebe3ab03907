"""Official names that several published systems share: of LlamaGen's tokenizer, and of VAR's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arvis.rows import Rows, See, render, upto
from arvis.tokenizers.backbone import Backbone
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokens import Layout
from arvis.weights.keys import SAME_NAMES, Key
from arvis.weights.transforms import Constant, Fuse, Rearrange


@dataclass(frozen=True)
class Recent:
    """The official ring of used ids is ours; the average of hits starts as its counts."""

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        ring, hits = official[0], own[1]
        if ring.is_meta:
            return [ring, hits]
        return [ring, torch.bincount(ring.long(), minlength=len(hits))[: len(hits)].to(hits.dtype)]

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [ours[0].float()]


def vqgan_keys(backbone: Backbone) -> tuple[Key, ...]:
    """LlamaGen's names of a convolutional tokenizer with one codebook (arXiv 2406.06525); the decoder's list runs from
    its lowest resolution up. Other backbones have no official names."""
    if not isinstance(backbone, CNNConfig):
        return SAME_NAMES
    last = len(backbone.decoder_ch_mult or backbone.ch_mult) - 1
    places = [("encoder.down.{l}", "encoder.conv_blocks.{l}")]
    places += [(f"decoder.up.{last - i}", f"decoder.conv_blocks.{i}") for i in range(last + 1)]
    rows: list[Key] = []
    for ours, theirs in places:
        rows += [
            Key(f"{ours}.block.{{j}}.{{p*}}", f"{theirs}.res.{{j}}.{{p*}}"),
            _qkv(f"{ours}.attn.{{j}}", f"{theirs}.attn.{{j}}"),
            Key(f"{ours}.{{p*}}", f"{theirs}.{{p*}}"),
        ]
    return (
        *rows,
        Key("{side}.mid.block_1.{p*}", "{side}.mid.0.{p*}"),
        _qkv("{side}.mid.attn_1", "{side}.mid.1"),
        Key("{side}.mid.attn_1.{p*}", "{side}.mid.1.{p*}"),
        Key("{side}.mid.block_2.{p*}", "{side}.mid.2.{p*}"),
        Key(("recent.ring", "hits"), "quantize.codebook_used", Recent(), optional=True),
        *SAME_NAMES,
    )


def _qkv(ours: str, theirs: str) -> Key:
    return Key(f"{ours}.qkv.{{p}}", tuple(f"{theirs}.{x}.{{p}}" for x in "qkv"), Fuse(3))


ADALN_KEYS = (
    Key("word.{p}", "word_embed.{p}"),
    Key("start_position", "pos_start"),
    Key("position", "pos_1LC"),
    Key("shared.{p}", "shared_ada_lin.1.{p}"),
    Key("trunk.blocks.{i}.modulation.project.{p}", "blocks.{i}.ada_lin.1.{p}"),
    Key("trunk.blocks.{i}.modulation.offset", "blocks.{i}.ada_gss", Rearrange("1 1 six c -> 1 six c")),
    Key("trunk.blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.mat_qkv.weight"),
    Key("trunk.blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
    Key("trunk.blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
    Key(
        (),
        "blocks.{i}.attn.zero_k_bias",
        Constant(torch.zeros_like),
        like="trunk.blocks.{i}.attn.q_bias",
    ),
    Key(
        "trunk.blocks.{i}.attn.temperature.log_scale",
        "blocks.{i}.attn.scale_mul_1H11",
        Rearrange("1 h 1 1 -> h 1 1"),
    ),
    Key("trunk.blocks.{i}.attn.out.{p}", "blocks.{i}.attn.proj.{p}"),
    Key("trunk.blocks.{i}.ffn.up.{p}", "blocks.{i}.ffn.fc1.{p}"),
    Key("trunk.blocks.{i}.ffn.down.{p}", "blocks.{i}.ffn.fc2.{p}"),
    Key("head.project.{p}", "head_nm.ada_lin.1.{p}"),
    Key("head.linear.{p}", "head.{p}"),
)
"""Of a transformer over scales, without its condition and its levels (VAR, arXiv 2404.02905)."""


def mask_key(layout: Layout, see: See = upto, optional: bool = False) -> Key:
    """The official buffer of such a transformer that holds the additive mask of its scales."""
    rows = Rows.of(layout.level_N)

    def bias(like: Tensor) -> Tensor:
        visible = render(see, rows, rows)
        out = like.new_zeros(1, 1, layout.n, layout.n)
        return out if visible is None else out.masked_fill(~visible.to(like.device), float("-inf"))

    return Key((), "attn_bias_for_masking", Constant(bias), like="position", optional=optional)
