"""SimVQ: a frozen random table seen through one trained linear map (arXiv 2411.02038)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded
from arvis.quant.base import Quantized
from arvis.quant.vq import Estimator, nearest, straight_through, vq_losses, vq_stats, wide


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """`size` codes of `width` channels; `beta` weighs the commitment term."""

    size: int = 1024
    width: int = 256
    beta: float = 0.25


class SimVQ(nn.Module):
    """Codes C W with C fixed ~ N(0, 1/d): all move together, so that few die. [..., D] -> ids [..., 1].

    `transform` takes the place of the linear map W, such as a small MLP; W starts as the identity.
    """

    frozen_codebook: Tensor

    def __init__(
        self, config: SimVQConfig, transform: nn.Module | None = None, estimator: Estimator = straight_through
    ) -> None:
        super().__init__()
        self.config, self.estimator = config, estimator
        self.register_buffer("frozen_codebook", torch.randn(config.size, config.width) * config.width**-0.5)
        if transform is None:
            transform = nn.Linear(config.width, config.width, bias=False)
            nn.init.eye_(transform.weight)
        self.code_transform = transform

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.config.size,)

    def table(self) -> Tensor:
        """The effective codes [V, D], float32."""
        with unrounded(self.frozen_codebook):
            return self.code_transform(self.frozen_codebook)

    def encode(self, z: Tensor) -> Tensor:
        return nearest(z, self.table())[..., None]

    def codes(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens[..., 0], self.table())

    def forward(self, z: Tensor) -> Quantized:
        z, table_VD = wide(z), self.table()
        tokens = nearest(z, table_VD)[..., None]
        q = F.embedding(tokens[..., 0], table_VD)
        losses = vq_losses(z, q, self.config.beta)
        return Quantized(self.estimator(z, q), tokens, losses, vq_stats(tokens, self.config.size))
