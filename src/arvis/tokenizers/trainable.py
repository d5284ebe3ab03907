"""What the training of a tokenizer asks of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from arvis.noise import Source
from arvis.quant.base import Quantized
from arvis.tokens import Layout


class Trainable(Protocol):
    """A tokenizer (an nn.Module) in three pieces, features -> quantised -> picture, with the upkeep of its codebook."""

    encoder: Any
    decoder: Any
    """Its `last_weight` makes the colours: there the pulls of two losses can be compared."""

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout: ...

    def features(self, x: Tensor) -> Tensor:
        """What is quantised, at least float32, of images [B, 3, H, W] in [-1, 1]."""
        ...

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        """The training pass of the quantiser; terms of its own are in `losses` by name ("vq", "kl", "entropy")."""
        ...

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of features as quantised (`Quantized.values`) with gradients, float32, not clamped."""
        ...

    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        """Initialise what depends on data from the features of the first batch."""
        ...

    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        """Record which codes a batch uses, after `updates` earlier batches; with `below` also revive the codes with
        less than this part of the mean hits, from the features `f`. Says how many were revived."""
        ...

    def metrics(self) -> dict[str, Tensor]:
        """What to log about the codebook: usage and perplexity from the average of hits."""
        ...
