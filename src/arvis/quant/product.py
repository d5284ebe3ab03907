"""Product quantisation: the channels in parts, each with its own quantiser (arXiv 2411.16681 for its use in images)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.quant.base import Quantized


class Product(nn.Module):
    """Quantisers of parts of `widths` channels side by side: [..., sum of widths] -> ids of all parts [..., S]."""

    def __init__(self, parts: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        if len(parts) != len(widths) or not parts:
            raise ValueError(f"{len(parts)} quantisers and {len(widths)} widths: one width for each is needed")
        self.parts, self.widths = nn.ModuleList(parts), tuple(widths)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for part in self.parts for size in part.sizes)

    def encode(self, z: Tensor) -> Tensor:
        return torch.cat([part.encode(x) for part, x in zip(self.parts, z.split(self.widths, -1), strict=True)], -1)

    def codes(self, tokens: Tensor) -> Tensor:
        ids = tokens.split([len(part.sizes) for part in self.parts], -1)
        return torch.cat([part.codes(i) for part, i in zip(self.parts, ids, strict=True)], -1)

    def forward(self, z: Tensor) -> Quantized:
        """Losses are sums over the parts; stats are vectors, one number per part."""
        out = [part(x) for part, x in zip(self.parts, z.split(self.widths, -1), strict=True)]
        losses = {name: torch.stack([o.losses[name] for o in out]).sum() for name in out[0].losses}
        stats = {name: torch.stack([o.stats[name] for o in out]) for name in out[0].stats}
        return Quantized(torch.cat([o.values for o in out], -1), torch.cat([o.tokens for o in out], -1), losses, stats)


def join_ids(tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """One id [..., 1] of the ids [..., S], the first one fastest. Raises ValueError where 63 bits are not enough."""
    return (tokens * _radix(sizes, tokens.device)).sum(-1, keepdim=True)


def split_ids(tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """The inverse of `join_ids`: [..., 1] -> [..., S]."""
    return tokens // _radix(sizes, tokens.device) % torch.tensor(sizes, device=tokens.device)


def _radix(sizes: Sequence[int], device: torch.device) -> Tensor:
    if math.prod(sizes) >= 2**63:
        raise ValueError(f"an id of {math.prod(sizes)} values does not fit into 63 bits: keep the ids apart")
    return torch.tensor([math.prod(sizes[:i]) for i in range(len(sizes))], device=device)


def disentanglement(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared cosine of the codes of two parts of equal width (FQGAN, arXiv 2411.16681): in [0, 1]."""
    return F.cosine_similarity(a, b, dim=-1).square().mean()
