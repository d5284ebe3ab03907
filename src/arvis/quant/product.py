"""Product quantisation: the channels in parts, each with its own quantiser (Jegou et al. 2011)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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
        """Losses are sums over the parts; stats are vectors, one number per sub-token."""
        return side_by_side([part(x) for part, x in zip(self.parts, z.split(self.widths, -1), strict=True)])


def side_by_side(parts: Sequence[Quantized]) -> Quantized:
    """Results joined along the channels: losses are sums over the parts that have them, stats stand in their order."""
    losses: dict[str, Tensor] = {}
    for part in parts:
        losses |= {name: losses[name] + loss if name in losses else loss for name, loss in part.losses.items()}
    names = dict.fromkeys(name for part in parts for name in part.stats)
    stats = {name: torch.cat([part.stats[name].reshape(-1) for part in parts if name in part.stats]) for name in names}
    return Quantized(
        torch.cat([part.values for part in parts], -1), torch.cat([part.tokens for part in parts], -1), losses, stats
    )


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
