"""A trunk is a list of blocks with one signature: block(x, call, layer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from arvis.nn.attention import Mask
from arvis.nn.cache import Cache, Slots
from arvis.rows import Rows


@dataclass
class Call:
    """What every block of one trunk call may read.

    mask [B*G|B|1, 1, Q, K] bool or None; rotary table [B*G|B|1, R, h/2, 2]; cache; the modulation input `vector`
    [B*G, D], or what all layers make of it, `ahead` [B*G, layers, n, D]; cross-attention `context` = (keys
    [B*G, T, E], visible [B*G, T] bool or None). Mask and table of an item serve all its guidance rows. `rows` says
    which rows x holds, for blocks that go by their steps. A trunk hands the mask to its blocks made ready.
    """

    mask: Tensor | Mask | None = None
    table: Tensor | None = None
    cache: Cache | Slots | None = None
    vector: Tensor | None = None
    ahead: Tensor | None = None
    context: tuple[Tensor, Tensor | None] | None = None
    rows: Rows | None = None

    def modulated(self, modulation: nn.Module, layer: int) -> tuple[Tensor, ...]:
        """The vectors [B*G, 1, D] of a layer. ValueError where the call has no condition."""
        if self.ahead is not None:
            return self.ahead[:, layer, :, None].unbind(1)
        if self.vector is None:
            raise ValueError("a modulated block needs a condition vector in its call, got None")
        return modulation(self.vector)[:, :, None].unbind(1)


class Trunk(nn.Module):
    """Blocks in a row. `layers` runs a subset: heads at several depths, skipped depth, taps on hidden states."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x_RD: Tensor, call: Call, layers: Sequence[int] | None = None) -> Tensor:
        call = replace(call, mask=_ready(call.mask, x_RD), table=_spread(call.table, x_RD))
        for i in range(len(self.blocks)) if layers is None else layers:
            x_RD = self.blocks[i](x_RD, call, i)
        return x_RD


def _ready(mask: Tensor | Mask | None, x_RD: Tensor) -> Mask | None:
    """A mask looked at where it lies, once for all layers, and spread."""
    if mask is None:
        return None
    ready = Mask.of(mask) if isinstance(mask, Tensor) else mask
    return replace(ready, shown=_spread(ready.shown, x_RD), blind=_spread(ready.blind, x_RD))


def _spread(data: Tensor | None, x_RD: Tensor) -> Tensor | None:
    """Data of items [B, ...] for the rows of x [B*G, ...], on its device; one for all stays one."""
    if data is None:
        return None
    data = data.to(x_RD.device)
    return data if len(data) in (1, len(x_RD)) else data.repeat_interleave(len(x_RD) // len(data), 0)
