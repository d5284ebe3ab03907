"""The transformer over the scales of a pyramid, as VAR has it (arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.adaln import AdaLNHead
from arvis.nn.cache import Cache
from arvis.nn.request import class_labels, labels_where
from arvis.nn.trunk import Call, Trunk
from arvis.rows import Rows, See, render
from arvis.tokens import Layout


class Condition(NamedTuple):
    """A condition as the transformer takes it: the start row, the modulation input, and what cross-attention reads.

    `ahead` [R, layers, n, D] are the vectors of every block, where they were made once for all steps.
    """

    start: Tensor
    vector: Tensor
    context: tuple[Tensor, Tensor | None] | None = None
    ahead: Tensor | None = None


def stacked(rows: Sequence[Condition]) -> dict[str, Tensor]:
    """Conditions of G guidance rows as the tensors [B, G, ...] of a state."""
    out = {"start": torch.stack([r.start for r in rows], 1), "vector": torch.stack([r.vector for r in rows], 1)}
    if rows[0].context is not None:
        out["context"] = torch.stack([r.context[0] for r in rows if r.context], 1)
        out["visible"] = torch.stack([r.context[1] for r in rows if r.context and r.context[1] is not None], 1)
    if rows[0].ahead is not None:
        out["ahead"] = torch.stack([r.ahead for r in rows if r.ahead is not None], 1)
    return out


def unstacked(more: Mapping[str, Tensor]) -> Condition:
    """The condition [B*G, ...] in the tensors of a state."""
    context = (more["context"].flatten(0, 1), more["visible"].flatten(0, 1)) if "context" in more else None
    ahead = more["ahead"].flatten(0, 1) if "ahead" in more else None
    return Condition(more["start"].flatten(0, 1), more["vector"].flatten(0, 1), context, ahead)


class Conditioner(Protocol):
    """An nn.Module from raw conditions to a `Condition`; `prepare` reads the names in `conditions` from a request."""

    conditions: tuple[str, ...]

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]: ...
    def __call__(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition: ...


class ClassConditioner(nn.Module):
    """One learned row per class, and a last one for "no class"; it is the start row and the modulation at once."""

    conditions: tuple[str, ...] = ("class_labels",)

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        return class_labels(request, self.num_classes, self.embedding.weight.device)

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition:
        """Rows of the classes, those with `null_B` True as "no class"."""
        labels = labels_where(cond, null_B, self.num_classes)
        row = self.embedding(labels)
        return Condition(row, row)


class ScaleTransformer(nn.Module):
    """The transformer over scales: embed, blocks, head. The conditioner and the blocks are given.

    `layout` has the scales whose positions are learned, `channels` and `codes` are the tokenizer's; with `shared` one
    projection of the condition modulates all blocks (their modulations must be `SharedModulation`).
    """

    def __init__(
        self,
        conditioner: Conditioner,
        blocks: Sequence[nn.Module],
        *,
        layout: Layout,
        channels: int,
        codes: int,
        width: int,
        shared: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.layout, self.width = layout, width
        self.conditioner: Conditioner = conditioner
        self.word = nn.Linear(channels, width)
        self.start_position = nn.Parameter(torch.zeros(1, layout.sizes[0], width))
        self.position = nn.Parameter(torch.zeros(1, layout.n, width))
        self.level = nn.Embedding(layout.K, width)
        self.shared = nn.Linear(width, 6 * width) if shared else None
        self.trunk = Trunk(blocks)
        self.head = AdaLNHead(width, codes, eps)

    def embed(self, c: Condition, x_BNC: Tensor | None, first: int, last: int) -> Tensor:
        """Input rows [B*G, R, D] of scales first..last-1; x holds their features, without scale 0."""
        rows = []
        if first == 0:
            rows.append(c.start[:, None] + self.start_position)
        if x_BNC is not None:
            word = self.word(x_BNC)  # the same for every guidance row: multiplied once
            rows.append(word.repeat_interleave(len(c.start) // len(word), 0))
        span = slice(self.layout.offsets[first], self.layout.offsets[last])
        level = self.level(self.layout.level_N[span].to(self.position.device))
        return torch.cat(rows, 1) + self.position[:, span] + level

    def forward(
        self, c: Condition, x_BNC: Tensor | None, first: int, last: int, see: See, cache: Cache | None = None
    ) -> Tensor:
        """Hidden rows [B*G, R, D] of scales first..last-1, over the cache where there is one."""
        x = self.embed(c, x_BNC, first, last)
        rows = self.rows(*range(first, last))
        # nothing reads the rows of the last scale later, so they take no slot of the cache
        mask = render(see, rows, rows) if cache is None else cache.place(see, rows, keep=last < self.layout.K)
        return self._run(x, c, rows, mask, cache)

    def apart(self, c: Condition, x_BNC: Tensor, scales: Sequence[int], see: See) -> Tensor:
        """Hidden rows of scale 0 and of some others alone, in one pass under any rule; x holds the others' features."""
        parts = x_BNC.split([self.layout.sizes[k] for k in scales], 1)
        x = [self.embed(c, None, 0, 1), *(self.embed(c, part, k, k + 1) for k, part in zip(scales, parts, strict=True))]
        rows = self.rows(0, *scales)
        return self._run(torch.cat(x, 1), c, rows, render(see, rows, rows), None)

    def rows(self, *scales: int) -> Rows:
        """The rows of some scales; a row is tagged with its place in its scale."""
        where = self.layout.where(*scales)[0]
        return Rows.of(self.layout.level_N[where], self.layout.place_N[where])

    def _run(self, x: Tensor, c: Condition, rows: Rows, mask: Tensor | None, cache: Cache | None) -> Tensor:
        vector = self.modulation(c) if c.ahead is None else c.vector
        call = Call(mask=mask, cache=cache, vector=vector, ahead=c.ahead, context=c.context, rows=rows)
        return self.trunk(x, call)

    def once(self, c: Condition) -> Condition:
        """The condition with the vectors of all blocks."""
        return c._replace(ahead=made_ahead(self.trunk, self.modulation(c)))

    def modulation(self, c: Condition) -> Tensor:
        """What modulates the blocks: the vector of the condition, or the six vectors that all blocks share."""
        return c.vector if self.shared is None else self.shared(F.silu(c.vector)).view(-1, 6, self.width)

    def init_weights(self, gate: float) -> None:
        """VAR's initialisation."""
        initialise(self, self.trunk, self.head, self.width, gate)
        for position in (self.start_position, self.position):
            nn.init.trunc_normal_(position, std=(1 / (3 * self.width)) ** 0.5)


def made_ahead(trunk: Trunk, vector: Tensor) -> Tensor:
    """The vectors [R, layers, n, D] of all blocks, from what modulates them: they do not depend on the step."""
    return torch.stack([block.modulation(vector) for block in trunk.blocks], 1)


def initialise(module: nn.Module, trunk: Trunk, head: AdaLNHead, width: int, gate: float) -> None:
    """VAR's initialisation: gates scaled by `gate`, a small head, residual outputs scaled with depth."""
    depth, std = len(trunk), (1 / (3 * width)) ** 0.5
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=std)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)
    with torch.no_grad():
        head.linear.weight *= 0.02
        head.project.weight *= 0.5
        for block in trunk.blocks:
            block.attn.out.weight /= (2 * depth) ** 0.5
            block.ffn.down.weight /= (2 * depth) ** 0.5
            vectors = block.modulation.vectors
            vectors[: 2 * width] *= gate
            vectors[2 * width :] *= 0.5
