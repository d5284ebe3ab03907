"""Lookup-free quantisation: the signs of the channels are the code (MAGVIT-2, arXiv 2310.05737)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.entropy import joint_bit_entropies
from arvis.quant.usage import token_stats
from arvis.quant.vq import straight_through, wide


def bits_of(z: Tensor) -> Tensor:
    """1 where positive, else 0 (also for zero): int64."""
    return (z > 0).long()


def pack_bits(bits: Tensor, little_endian: bool = False) -> Tensor:
    """Bits [..., d] as one id [..., 1]; the first bit is the most significant one unless `little_endian`."""
    return (bits * _weights(bits.shape[-1], little_endian, bits.device)).sum(-1, keepdim=True)


def unpack_bits(tokens: Tensor, d: int, little_endian: bool = False) -> Tensor:
    """The inverse of `pack_bits`: ids [..., 1] -> bits [..., d]."""
    return tokens // _weights(d, little_endian, tokens.device) % 2


def _weights(d: int, little_endian: bool, device: torch.device) -> Tensor:
    if d > 62:
        raise ValueError(f"{d} bits do not fit into one id: keep the bits")
    at = torch.arange(d, device=device)
    return 2 ** (at if little_endian else d - 1 - at)


@dataclass(frozen=True, kw_only=True)
class LFQConfig:
    """`bits` channels of +-`scale`. The loss is `entropy` * (sample - `diversity` * batch) + `commit` * commitment.

    `inverse_temperature` sharpens the soft choice; the batch entropy is joint inside groups of `group` bits. `floor`
    lies under the probabilities in logarithms (1e-5 in public code; 0 is exact).
    """

    bits: int = 18
    scale: float = 1.0
    entropy: float = 0.1
    diversity: float = 1.0
    commit: float = 0.25
    inverse_temperature: float = 100.0
    group: int = 9
    floor: float = 0.0
    little_endian: bool = False


class LFQ(nn.Module):
    """The sign of each channel, zero counting as minus: [..., d] -> one id [..., 1]; straight-through gradient."""

    def __init__(self, config: LFQConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def sizes(self) -> tuple[int, ...]:
        return (2**self.config.bits,)

    def encode(self, z: Tensor) -> Tensor:
        return pack_bits(bits_of(z), self.config.little_endian)

    def codes(self, tokens: Tensor) -> Tensor:
        bits = unpack_bits(tokens, self.config.bits, self.config.little_endian)
        return (bits * 2.0 - 1) * self.config.scale

    def forward(self, z: Tensor) -> Quantized:
        config = self.config
        z = wide(z)
        bits = bits_of(z)
        q = ((bits * 2 - 1) * config.scale).to(z.dtype)
        # softmax over codes of 2 tau <z, c> makes the bits independent, with these logits
        logits = 4 * config.inverse_temperature * config.scale * z
        sample, batch = joint_bit_entropies(logits, config.group, config.floor)
        commit = F.mse_loss(z, q)
        losses = {
            "vq": config.entropy * (sample - config.diversity * batch) + config.commit * commit,
            "entropy_sample": sample.detach(),
            "entropy_batch": batch.detach(),
            "commit": commit.detach(),
        }
        tokens = pack_bits(bits, config.little_endian)
        stats = {**token_stats(tokens, self.sizes), "bit_mean": bits.float().mean(tuple(range(bits.dim() - 1)))}
        return Quantized(straight_through(z, q), tokens, losses, stats)
