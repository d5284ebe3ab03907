"""The network around a quantiser: which encoder and decoder a tokenizer has is one field of its configuration."""

from __future__ import annotations

from torch import nn

from arvis.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder
from arvis.tokenizers.patch import PatchConfig, PatchDecoder, PatchEncoder

Backbone = CNNConfig | PatchConfig


def chosen(cnn: CNNConfig | None, patch: PatchConfig | None) -> Backbone:
    """The one that is given; ValueError for both or neither."""
    if (cnn is None) == (patch is None):
        raise ValueError(f"exactly one of cnn and patch is the backbone, got {cnn=} {patch=}")
    return cnn if cnn is not None else patch  # type: ignore[return-value]


def coder(config: Backbone) -> tuple[nn.Module, nn.Module]:
    """A fresh encoder, images -> maps, and decoder, maps -> images."""
    if isinstance(config, CNNConfig):
        return CNNEncoder(config), CNNDecoder(config)
    return PatchEncoder(config), PatchDecoder(config)
