"""Residual quantisation: each stage codes what the earlier ones left over (RQ-VAE, arXiv 2203.01941)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.product import side_by_side
from arvis.quant.vq import straight_through


class Residual(nn.Module):
    """A chain of quantisers, [..., D] -> ids of all stages one after another; the same one may occur several times.

    `first` takes only the first stages (quantiser dropout, or a coarser code).
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        if not stages:
            raise ValueError("residual quantisation needs at least one stage")
        self.stages = nn.ModuleList(stages)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for stage in self.stages for size in stage.sizes)

    def encode(self, z: Tensor, first: int | None = None) -> Tensor:
        return self(z, first).tokens

    def codes(self, tokens: Tensor) -> Tensor:
        """The sum of the codes of as many stages as `tokens` [..., S] has ids for."""
        total, at = None, 0
        for stage in self.stages:
            if at == tokens.shape[-1]:
                break
            width = len(stage.sizes)
            code = stage.codes(tokens[..., at : at + width])
            total, at = code if total is None else total + code, at + width
        if total is None or at != tokens.shape[-1]:
            raise ValueError(f"{tokens.shape[-1]} ids per position do not end at a stage of the sizes {self.sizes}")
        return total

    def forward(self, z: Tensor, first: int | None = None) -> Quantized:
        """Losses are means over the stages; stats are vectors, one number per sub-token.

        Each stage sees the encoder's gradient: its input is z minus codes that count as constants.
        """
        rest, total, parts = z, torch.zeros_like(z), []
        for stage in self.stages[:first]:
            part = stage(rest)
            code = stage.codes(part.tokens).detach()
            rest, total = rest - code, total + code
            parts.append(part)
        joined = side_by_side(parts)
        losses = {name: loss / len(parts) for name, loss in joined.losses.items()}
        return Quantized(straight_through(z, total), joined.tokens, losses, joined.stats)
