"""The small network that draws a scale with regard to its own tokens: stable sampling (arXiv 2406.10797)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arvis.nn.trunk import Call, Trunk
from arvis.rows import Rows, render


class StableSampler(nn.Module):
    """Draws a scale with regard to those of its tokens that are placed: logits from what the transformer says of the
    scale and from the code vectors there, zeros where none is.

    A row of the text's summary comes first. It sees all rows, the others see it and their own scale.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], head: nn.Module, *, channels: int, text: int, width: int, K: int
    ) -> None:
        super().__init__()
        self.word = nn.Linear(channels, width)
        self.level = nn.Embedding(K, width)
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.project = nn.Linear(text, width)
        self.join = nn.Linear(2 * width, width)
        self.trunk = Trunk(blocks)
        self.head = head

    def forward(self, h: Tensor, placed_BnC: Tensor, pooled: Tensor, level_n: Tensor, table: Tensor) -> Tensor:
        """Logits [B*G, n, V] of rows h [B*G, n, D] of some scales; table [1, 1 + n, ...] begins with position 0."""
        first = self.project(pooled)[:, None] + self.start_position
        word = self.word(placed_BnC) + self.level(level_n.to(h.device))
        word = word.repeat_interleave(len(h) // len(word), 0)
        x = self.join(torch.cat((torch.cat((first, word), 1), torch.cat((first, h), 1)), -1))
        rows = Rows.of(torch.cat((torch.tensor([_SUMMARY]), level_n)))
        x = self.trunk(x, Call(mask=render(_own_scale, rows, rows), table=table))
        return self.head(x[:, 1:])


_SUMMARY = -1


def _own_scale(q: Rows, k: Rows) -> Tensor:
    """Rows of one scale see each other; the summary is seen by all, and sees all."""
    return (k.step == q.step) | (k.step == _SUMMARY) | (q.step == _SUMMARY)
