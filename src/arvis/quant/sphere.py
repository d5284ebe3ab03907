"""Binary spherical quantisation: signs on the unit sphere (BSQ, arXiv 2406.07548)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.entropy import bit_entropies
from arvis.quant.lookup_free import bits_of
from arvis.quant.usage import token_stats
from arvis.quant.vq import straight_through, unit


@dataclass(frozen=True, kw_only=True)
class BSQConfig:
    """`bits` channels; the loss is `entropy` / tau (`decision` sample - `diversity` batch) + `commit` commitment.

    tau is `inverse_temperature`; `entropy` is the product of the two official weights of the term. The batch entropy is
    the sum over bits, an upper bound of the joint one.
    """

    bits: int = 16
    entropy: float = 0.1
    decision: float = 1.0
    diversity: float = 1.0
    commit: float = 0.25
    inverse_temperature: float = 100.0


class BSQ(nn.Module):
    """Vectors normalised, then the sign of each channel over sqrt(d): [..., d] -> bits [..., d], no ids, no table.

    Zero counts as minus. The gradient passes straight to the unit vector. Codes have length one.
    """

    def __init__(self, config: BSQConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def sizes(self) -> tuple[int, ...]:
        return (2,) * self.config.bits

    def encode(self, z: Tensor) -> Tensor:
        return bits_of(z)

    def codes(self, tokens: Tensor) -> Tensor:
        return (tokens * 2.0 - 1) * self.config.bits**-0.5

    def forward(self, z: Tensor) -> Quantized:
        config, u = self.config, unit(z)
        tokens = self.encode(u)
        q = self.codes(tokens).to(u.dtype)
        tau = config.inverse_temperature
        sample, batch = bit_entropies(4 * tau * config.bits**-0.5 * u)
        commit = F.mse_loss(u, q)
        losses = {
            "vq": config.entropy / tau * (config.decision * sample - config.diversity * batch) + config.commit * commit,
            "entropy_sample": sample.detach(),
            "entropy_batch": batch.detach(),
            "commit": commit.detach(),
        }
        stats = {**token_stats(tokens, self.sizes), "bit_mean": tokens.float().mean(tuple(range(tokens.dim() - 1)))}
        return Quantized(straight_through(u, q), tokens, losses, stats)
