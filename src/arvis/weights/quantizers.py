"""The official names of published quantisers, each relative to the quantiser itself; `beneath` puts them into a model.

    keys = beneath(EMA, ours="quantize.", official="encoder.quantizer.")

Three code bases have named most quantisers: taming-transformers (a table called `embedding`), vector-quantize-pytorch
(`_codebook` with a leading axis of heads, of which there is one here), and VAR (`ema_vocab_hit_SV`, `quant_resi`). FSQ
has no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arvis.weights.keys import SAME_NAMES, Key
from arvis.weights.transforms import Constant, Rearrange


class Initialised:
    """An official flag that says whether k-means has set the codes; nothing of ours, but it has to be set."""

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        if not official[0].is_meta and not bool(official[0].all()):
            raise ValueError("these codes were never initialised: the file was saved before the first training step")
        return []

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.ones((), dtype=torch.bool, device=ours[0].device)]


TABLE = (Key("embedding.weight", "embedding.weight"), Key((), "codebook_used"))
"""taming-transformers and what descends from it -> VQ and CosineVQ; the ring of recent ids is left out."""

EMA = (
    Key("embed", "_codebook.embed", Rearrange("1 v d -> v d")),
    Key("embed_avg", "_codebook.embed_avg", Rearrange("1 v d -> v d")),
    Key("cluster_size", "_codebook.cluster_size", Rearrange("1 v -> v")),
    Key((), "_codebook.initted", Initialised(), like="embed"),
)
"""vector-quantize-pytorch's VectorQuantize -> EMAVQ."""

LEARNED = (
    Key("embedding.weight", "_codebook.embed", Rearrange("1 v d -> v d")),
    Key((), "_codebook.{rest*}"),
)
"""The same with a table that is trained by gradient -> VQ and CosineVQ; its idle averages are left out."""

SIMVQ = (
    Key("frozen_codebook", "frozen_codebook"),
    Key("code_transform.{p*}", "code_transform.{p*}"),
)
"""vector-quantize-pytorch's SimVQ -> SimVQ, with a linear map or any other."""

MULTISCALE = (Key("ema_vocab_hit_SV", "ema_vocab_hit_SV", optional=True), *SAME_NAMES)
"""VAR's multi-scale table -> MultiScaleVQ; the averages of hits may be absent."""


def binary(bits: int) -> tuple[Key, ...]:
    """LFQ and BSQ: a buffer of the weights of the bits, the first one the most significant."""
    return (Key((), "mask", Constant(lambda: 2 ** torch.arange(bits - 1, -1, -1))),)


def residual(stage: Iterable[Key] = EMA) -> tuple[Key, ...]:
    """vector-quantize-pytorch's ResidualVQ -> Residual, from the rows of one stage."""
    return beneath(stage, ours="stages.{i}.", official="layers.{i}.")


def projected(inner: Iterable[Key]) -> tuple[Key, ...]:
    """A quantiser between two linear maps -> Projected, from the rows of what is between them."""
    maps = tuple(Key(f"project_{way}.{{p}}", f"project_{way}.{{p}}") for way in ("in", "out"))
    return (*maps, *beneath(inner, ours="quantizer.", official=""))


def beneath(keys: Iterable[Key], ours: str, official: str) -> tuple[Key, ...]:
    """The rows with a prefix before the names of both sides, such as "quantize."; `{i}` in both stands for a number."""

    def put(prefix: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)

    return tuple(
        replace(
            key,
            ours=put(ours, key.ours),
            official=put(official, key.official),
            like=ours + key.like if key.like else "",
            spellings=tuple(put(official, names) for names in key.spellings),
        )
        for key in keys
    )
