"""Vector quantisation whose table follows moving averages instead of a gradient (arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.kmeans import kmeans
from arvis.quant.revive import restart_
from arvis.quant.usage import count, summed_over_ranks
from arvis.quant.vq import Estimator, nearest, straight_through, unit, vq_stats, wide

if TYPE_CHECKING:
    from arvis.noise import Noise


@dataclass(frozen=True, kw_only=True)
class EMAVQConfig:
    """`size` codes of `width` channels; `cosine` keeps vectors and codes on the unit sphere.

    `decay` is that of the averages, `epsilon` smooths the counts, `beta` weighs the commitment term, the only loss.
    """

    size: int = 1024
    width: int = 256
    decay: float = 0.99
    epsilon: float = 1e-5
    beta: float = 1.0
    cosine: bool = False


class EMAVQ(nn.Module):
    """Nearest code, straight-through gradient: [..., D] -> ids [..., 1].

    `embed` [V, D] = `embed_avg` / smoothed `cluster_size`; all three are buffers, saved with the module. The forward
    pass moves nothing, in whichever mode: `update_` does, once per training step, with the ids that the old table gave.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, config: EMAVQConfig, estimator: Estimator = straight_through) -> None:
        super().__init__()
        self.config, self.estimator = config, estimator
        table_VD = torch.randn(config.size, config.width) * config.width**-0.5
        table_VD = unit(table_VD) if config.cosine else table_VD
        self.register_buffer("embed", table_VD)
        self.register_buffer("embed_avg", table_VD.clone())
        self.register_buffer("cluster_size", torch.ones(config.size))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.config.size,)

    def encode(self, z: Tensor) -> Tensor:
        return nearest(self._space(z), self.embed)[..., None]

    def codes(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens[..., 0], self.embed)

    def forward(self, z: Tensor) -> Quantized:
        z = self._space(z)
        tokens = self.encode(z)
        q = self.codes(tokens)
        commit = F.mse_loss(z, q)
        losses = {"vq": self.config.beta * commit, "commit": commit.detach()}
        return Quantized(self.estimator(z, q), tokens, losses, vq_stats(tokens, self.config.size))

    @torch.no_grad()
    def update_(self, z: Tensor, tokens: Tensor) -> None:
        """Moves counts, sums and codes towards a batch `z` [..., D] with ids [..., 1], summed over all processes."""
        rows, ids, config = self._space(z).reshape(-1, self.config.width), tokens.reshape(-1), self.config
        counts_V = summed_over_ranks(count(ids, config.size))
        sums_VD = summed_over_ranks(torch.zeros_like(self.embed).index_add_(0, ids, rows.to(self.embed)))
        self.cluster_size.lerp_(counts_V.to(self.cluster_size), 1 - config.decay)
        self.embed_avg.lerp_(sums_VD, 1 - config.decay)
        self._renew()

    @torch.no_grad()
    def init_(self, z: Tensor, noise: Noise, iterations: int = 10) -> None:
        """Sets the codes to the k-means centres of a batch, which all processes must share."""
        rows = self._space(z).reshape(-1, self.config.width)
        centres_VD, counts_V = kmeans(rows, self.config.size, noise, iterations=iterations, cosine=self.config.cosine)
        self.cluster_size.copy_(counts_V)
        self.embed_avg.copy_(centres_VD * counts_V[:, None])
        self.embed.copy_(centres_VD)

    @torch.no_grad()
    def revive_(self, z: Tensor, noise: Noise, at: int, threshold: float = 2.0, weight: Tensor | None = None) -> int:
        """Sets codes whose average count is below `threshold` to random vectors of a batch; says how many.

        The threshold is their new count. Selftok's is 0.2 times the vectors of a batch per code, and its `weight` [...]
        of each vector is that of its position (`revive.scarce_positions`).
        """
        gone = self.cluster_size < threshold
        n = restart_(self.embed, gone, self._space(z), noise, at, weight)
        self.cluster_size[gone] = threshold
        self.embed_avg[gone] = self.embed[gone] * threshold
        return n

    def _renew(self) -> None:
        total, epsilon = self.cluster_size.sum(), self.config.epsilon
        smoothed_V = (self.cluster_size + epsilon) / (total + self.config.size * epsilon) * total
        table_VD = self.embed_avg / smoothed_V[:, None].clamp_min(1e-30)
        if self.config.cosine:  # a code whose sum has faded away keeps its direction
            table_VD = torch.where(self.embed_avg.norm(dim=1, keepdim=True) > 1e-20, unit(table_VD), self.embed)
        self.embed.copy_(table_VD)

    def _space(self, z: Tensor) -> Tensor:
        """The vector that is looked up: float32, of length one for the cosine form."""
        return unit(z) if self.config.cosine else wide(z)
