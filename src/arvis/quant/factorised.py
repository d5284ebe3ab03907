"""Factorised quantisation: several views of the same features, each with its own codes (FQGAN, arXiv 2411.16681)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.product import side_by_side


class Factorised(nn.Module):
    """Quantisers of learned views of one vector, [..., D] -> ids of all views [..., S], values side by side.

    `adapters` make the view of each quantiser. `disentangle` weighs the mean squared cosine of the codes of any two
    views, which must then have one width; 0.1 in FQGAN.
    """

    def __init__(self, adapters: Sequence[nn.Module], parts: Sequence[nn.Module], disentangle: float = 0.1) -> None:
        super().__init__()
        if len(parts) != len(adapters) or not parts:
            raise ValueError(f"{len(parts)} quantisers and {len(adapters)} adapters: one adapter for each is needed")
        self.adapters, self.parts, self.disentangle = nn.ModuleList(adapters), nn.ModuleList(parts), disentangle

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for part in self.parts for size in part.sizes)

    def encode(self, z: Tensor) -> Tensor:
        return torch.cat([part.encode(view(z)) for view, part in zip(self.adapters, self.parts, strict=True)], -1)

    def codes(self, tokens: Tensor) -> Tensor:
        ids = tokens.split([len(part.sizes) for part in self.parts], -1)
        return torch.cat([part.codes(i) for part, i in zip(self.parts, ids, strict=True)], -1)

    def forward(self, z: Tensor) -> Quantized:
        """Losses are sums over the views, "vq" with the disentanglement, whose gradient goes to the encoder alone."""
        views = [part(view(z)) for view, part in zip(self.adapters, self.parts, strict=True)]
        out = side_by_side(views)
        if self.disentangle == 0 or len(views) == 1:
            return out
        apart = torch.stack([disentanglement(a.values, b.values) for a, b in combinations(views, 2)]).mean()
        vq = out.losses.get("vq", 0) + self.disentangle * apart
        return out._replace(losses={**out.losses, "vq": vq, "disentangle": apart.detach()})


def disentanglement(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared cosine of the codes of two views of equal width: in [0, 1]."""
    return F.cosine_similarity(a, b, dim=-1).square().mean()
