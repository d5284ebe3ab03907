"""K-means: centres of frozen features, and tokens made of them (DiGIT, arXiv 2410.12490)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.revive import pick
from arvis.quant.usage import count
from arvis.quant.vq import nearest, unit, vq_stats, wide

if TYPE_CHECKING:
    from arvis.noise import Noise


@torch.no_grad()
def kmeans(
    vectors: Tensor, n: int, noise: Noise, at: int = 0, iterations: int = 10, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors: centres [n, D] of `vectors` [..., D], and how many each one has [n].

    `cosine` re-normalises the centres after each iteration. A centre without vectors stays where it is.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    rows = unit(rows) if cosine else wide(rows)
    centres_VD = pick(rows, n, noise, at)
    for _ in range(iterations):
        ids = nearest(rows, centres_VD)
        counts_V1 = count(ids, n)[:, None]
        means_VD = torch.zeros_like(centres_VD).index_add_(0, ids, rows) / counts_V1.clamp_min(1)
        means_VD = unit(means_VD) if cosine else means_VD
        centres_VD = torch.where(counts_V1 > 0, means_VD, centres_VD)
    return centres_VD, count(nearest(rows, centres_VD), n)


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """`size` centres of `width` channels."""

    size: int = 8192
    width: int = 768


class KMeans(nn.Module):
    """The nearest of fixed centres, [..., D] -> ids [..., 1]; nothing here is trained by gradient."""

    centroids: Tensor

    def __init__(self, config: KMeansConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centroids", torch.zeros(config.size, config.width))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.config.size,)

    def fit_(self, vectors: Tensor, noise: Noise, iterations: int = 20) -> None:
        """Sets the centres to those of `vectors` [..., D]."""
        self.centroids.copy_(kmeans(vectors, self.config.size, noise, iterations=iterations)[0])

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.centroids)[..., None]

    def codes(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens[..., 0], self.centroids)

    def forward(self, z: Tensor) -> Quantized:
        tokens = self.encode(z)
        return Quantized(self.codes(tokens), tokens, {}, vq_stats(tokens, self.config.size))
