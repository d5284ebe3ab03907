"""A small text encoder that is trained with its model: words as bags of hashed letter groups, then a transformer.

A word is the sum of the embeddings of itself and of its letter trigrams (arXiv 1607.04606), so "dogs" is near "dog",
and a word never seen in training still means something. No vocabulary file, no dependency.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from arvis.nn.request import prompts
from arvis.nn.trunk import Call, Trunk
from arvis.nn.vit import ViTBlock


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`buckets` hashed embeddings; prompts are cut after `words` words; a word has at most `pieces` pieces."""

    buckets: int = 4096
    words: int = 24
    pieces: int = 12
    width: int = 192
    depth: int = 2
    heads: int = 4


@lru_cache(maxsize=65536)
def _pieces(word: str, buckets: int, most: int) -> tuple[int, ...]:
    """Bucket ids of a word (first the word itself, then its trigrams); 0 is padding."""
    framed = f"<{word}>"
    parts = [word, *(framed[i : i + 3] for i in range(len(framed) - 2))]
    return tuple(1 + crc32(part.encode()) % (buckets - 1) for part in parts[:most])


def word_ids(prompts: Sequence[str], config: TextConfig) -> Tensor:
    """Prompts as int64 [B, words, pieces] of bucket ids, 0 where there is nothing."""
    out = torch.zeros(len(prompts), config.words, config.pieces, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        for i, word in enumerate(re.findall(r"\w+", prompt.lower())[: config.words]):
            ids = _pieces(word, config.buckets, config.pieces)
            out[row, i, : len(ids)] = torch.tensor(ids)
    return out


class TextEncoder(nn.Module):
    """Bucket ids [B, T, M] -> (rows [B, 1 + T, D], visible [B, 1 + T]); row 0 summarises, also of an empty prompt."""

    conditions = ("prompt",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.piece = nn.EmbeddingBag(config.buckets, config.width, mode="sum", padding_idx=0)
        self.summary = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + config.words, config.width))
        self.trunk = Trunk(ViTBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Words of unit size, so that they are told apart from the first step on."""
        nn.init.normal_(self.piece.weight, std=0.3)
        nn.init.normal_(self.position, std=0.02)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        """The prompts of a request as "text" [B, T, M]."""
        return {"text": word_ids(prompts(request), self.config).to(self.summary.device)}

    def read(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of conditions and which are visible; "no prompt" (`null_B`, or no conditions) is the empty prompt."""
        if cond is not None:
            return self(cond["text"].masked_fill(null_B[:, None, None], 0))
        shape = (len(null_B), self.config.words, self.config.pieces)
        return self(torch.zeros(shape, dtype=torch.int64, device=null_B.device))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        words = self.piece(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        x = torch.cat((self.summary.expand(len(ids), -1, -1), words), 1) + self.position
        visible = torch.cat((torch.ones_like(ids[:, :1, 0], dtype=torch.bool), ids[..., 0] > 0), 1)
        return self.norm(self.trunk(x, Call(mask=visible[:, None, None]))), visible
