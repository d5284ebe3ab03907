"""Vector quantisation by the nearest row of a learned table: plain (Euclidean) and l2-normalised (cosine)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded
from arvis.quant.base import Quantized
from arvis.quant.entropy import distance_entropies
from arvis.quant.usage import token_stats

_CHUNK = 2**24
"""Distances held at once: 64 MiB of float32."""


@torch.no_grad()
def nearest(z: Tensor, table_VD: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Index of the nearest row of `table_VD` in Euclidean distance, for each vector of `z` [..., D]: int64 [...].

    Distances are float32 (float64 if either input is), also under autocast; ties go to the lowest index. At most
    `chunk` distances exist at any time.
    """
    if z.shape[-1] != table_VD.shape[-1]:
        raise ValueError(f"vectors of width {z.shape[-1]} cannot be looked up in a table of width {table_VD.shape[-1]}")
    dtype = torch.float64 if torch.float64 in (z.dtype, table_VD.dtype) else torch.float32
    with unrounded(z):
        rows, table = z.reshape(-1, z.shape[-1]).to(dtype), table_VD.to(dtype)
        half_V = table.square().sum(1).mul(0.5)  # |z|^2 is the same for all codes: left out
        step = max(1, chunk // len(table))
        ids = [torch.addmm(half_V, part, table.T, alpha=-1).argmin(1) for part in rows.split(step)]
    return torch.cat(ids).view(z.shape[:-1])


@torch.no_grad()
def nearest_cosine(z: Tensor, table_VD: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Index of the row of `table_VD` with the largest cosine to each vector of `z` [..., D]: int64 [...]."""
    return nearest(unit(z), unit(table_VD), chunk)


def wide(x: Tensor) -> Tensor:
    """The same in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last axis, at least in float32."""
    return F.normalize(wide(x), dim=-1, eps=1e-12)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q with the gradient of z."""
    return z + (q - z).detach()


Estimator = Callable[[Tensor, Tensor], Tensor]
"""(z, q) -> the value of q with a gradient for z: `straight_through`, or `rotation.rotate_to`."""


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """`size` codes of `width` channels; `beta` weighs the commitment term; `legacy_beta` puts it on the other one.

    `entropy` weighs the regulariser that keeps choices decided and all codes in use, a softmax over squared distances
    at `temperature` (LlamaGen has the term, FQGAN uses it with 0.03). It holds one number per vector and code.
    """

    size: int = 1024
    width: int = 256
    beta: float = 0.25
    legacy_beta: bool = False
    entropy: float = 0.0
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if self.size < 1 or self.width < 1:
            raise ValueError(f"a codebook needs positive size and width, got {self.size=} {self.width=}")


def vq_losses(z: Tensor, q: Tensor, beta: float, legacy_beta: bool = False) -> dict[str, Tensor]:
    """Codebook and commitment terms (arXiv 1711.00937), means over all elements; `q` carries the table's gradient."""
    codebook, commit = F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())
    vq = beta * codebook + commit if legacy_beta else codebook + beta * commit
    return {"vq": vq, "codebook": codebook.detach(), "commit": commit.detach()}


def regularised(losses: dict[str, Tensor], config: VQConfig, z: Tensor, table_VD: Tensor) -> dict[str, Tensor]:
    """The losses with the entropy term of a configuration, whose parts are added by name."""
    if config.entropy == 0:
        return losses
    sample, batch = distance_entropies(z, table_VD, config.temperature)
    vq = losses["vq"] + config.entropy * (sample - batch)
    return {**losses, "vq": vq, "entropy_sample": sample.detach(), "entropy_batch": batch.detach()}


def vq_stats(tokens: Tensor, size: int) -> dict[str, Tensor]:
    """Usage and perplexity of ids [..., 1] inside this batch alone."""
    return token_stats(tokens, (size,))


class VQ(nn.Module):
    """Nearest code in Euclidean distance, straight-through gradient (arXiv 1711.00937): [..., D] -> ids [..., 1]."""

    def __init__(self, config: VQConfig, estimator: Estimator = straight_through) -> None:
        super().__init__()
        self.config, self.estimator = config, estimator
        self.embedding = nn.Embedding(config.size, config.width)
        nn.init.uniform_(self.embedding.weight, -1 / config.size, 1 / config.size)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.config.size,)

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.embedding.weight)[..., None]

    def codes(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens[..., 0])

    def forward(self, z: Tensor) -> Quantized:
        z = wide(z)
        tokens = self.encode(z)
        q = self.codes(tokens)
        losses = vq_losses(z, q, self.config.beta, self.config.legacy_beta)
        losses = regularised(losses, self.config, z, self.embedding.weight)
        return Quantized(self.estimator(z, q), tokens, losses, vq_stats(tokens, self.config.size))


class CosineVQ(nn.Module):
    """Nearest code by angle: vectors and codes are normalised before distances, losses and output (arXiv 2110.04627).

    [..., D] -> ids [..., 1]; the output is the unit code. The stored table is never renormalised, only on use.
    """

    def __init__(self, config: VQConfig, estimator: Estimator = straight_through) -> None:
        super().__init__()
        self.config, self.estimator = config, estimator
        self.embedding = nn.Embedding(config.size, config.width)
        nn.init.uniform_(self.embedding.weight, -1 / config.size, 1 / config.size)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.config.size,)

    def encode(self, z: Tensor) -> Tensor:
        return nearest_cosine(z, self.embedding.weight)[..., None]

    def codes(self, tokens: Tensor) -> Tensor:
        return unit(self.embedding(tokens[..., 0]))

    def forward(self, z: Tensor) -> Quantized:
        u = unit(z)
        tokens = self.encode(u)
        q = self.codes(tokens)
        losses = vq_losses(u, q, self.config.beta, self.config.legacy_beta)
        losses = regularised(losses, self.config, u, unit(self.embedding.weight))
        return Quantized(self.estimator(u, q), tokens, losses, vq_stats(tokens, self.config.size))
