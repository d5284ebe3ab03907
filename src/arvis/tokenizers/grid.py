"""An image as one grid of codes: VQGAN (arXiv 2012.09841), with the quantiser of LlamaGen (arXiv 2406.06525)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.revive import pick, restart_
from arvis.quant.usage import UsageRing, count, dead, perplexity, summed_over_ranks, update_hits_, used
from arvis.quant.vq import VQ, CosineVQ, VQConfig, unit
from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import Layout, Space

if TYPE_CHECKING:
    from arvis.noise import Source


@dataclass(frozen=True, kw_only=True)
class GridVQConfig:
    """`grid` is the default number of cells (rows, columns); exactly one of `cnn` and `patch` is the backbone.

    A table of `vocab_size` codes of `code_width` channels, looked up by angle if `l2_norm`. `beta` weighs the
    commitment term, `entropy_ratio` the one that keeps choices decided and all codes in use (0: none).
    """

    grid: tuple[int, int] = (16, 16)
    vocab_size: int = 16384
    code_width: int = 8
    l2_norm: bool = True
    beta: float = 0.25
    entropy_ratio: float = 0.0
    cnn: CNNConfig | None = None
    patch: PatchConfig | None = None

    def __post_init__(self) -> None:
        chosen(self.cnn, self.patch)

    @property
    def backbone(self) -> Backbone:
        return chosen(self.cnn, self.patch)

    @property
    def downsample(self) -> int:
        """Pixels per cell along each axis."""
        return self.backbone.downsample


class GridVQ(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> tokens [B, N, 1], one per cell, row-major.

    `quantize` looks vectors up; `hits` [V] is the moving average of how often codes occur, `recent` the ids of the last
    65,536 tokens. Both are kept by `tend_` alone.
    """

    hits: Tensor

    def __init__(self, config: GridVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = coder(config.backbone)
        channels = config.backbone.z_channels
        vq = VQConfig(size=config.vocab_size, width=config.code_width, beta=config.beta, entropy=config.entropy_ratio)
        self.quantize = CosineVQ(vq) if config.l2_norm else VQ(vq)
        self._set(self.quantize.embedding.weight)
        self.register_buffer("hits", torch.zeros(config.vocab_size))
        self.recent = UsageRing()
        self.quant_conv = nn.Conv2d(channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, channels, 1)

    @property
    def space(self) -> Space:
        return Space(sizes=(self.config.vocab_size,))

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout:
        """The grid of the configuration, or that of images of `shape` (H, W) pixels."""
        if shape is None:
            return Layout((self.config.grid,))
        cell = self.config.downsample
        if any(side % cell or side < cell for side in shape):
            raise ValueError(f"image sides must be multiples of {cell}, got {shape}")
        return Layout((tuple(side // cell for side in shape),))

    def features(self, x: Tensor) -> Tensor:
        """What is quantised: float32 [B, D, h, w] (float64 of a float64 module)."""
        f = self.quant_conv(self.encoder(x))
        return f.to(torch.promote_types(f.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        """Tokens [B, N, 1] of images; ValueError where they do not fit the layout."""
        f = self.features(x)
        if layout is not None and layout.levels != (tuple(f.shape[2:]),):
            raise ValueError(
                f"images of {tuple(x.shape[2:])} pixels give {tuple(f.shape[2:])} cells, not {layout.levels}"
            )
        return self.quantize.encode(_rows(f))

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens [B, N, 1].

        Cells that are not `known` [B, N] are grey; to the decoder they look like the mean of the known ones.
        """
        if known is None:
            return self.reconstruct(self.codes(tokens, layout)).clamp(-1, 1)
        seen = known.to(tokens.device)[..., None]
        codes, seen_map = self.codes(tokens.where(seen, 0), layout), _map(seen, self._size(layout))
        mean = (codes * seen_map).sum((2, 3), keepdim=True) / seen_map.sum((2, 3), keepdim=True).clamp_min(1)
        image = self.reconstruct(torch.where(seen_map, codes, mean)).clamp(-1, 1)
        return image * seen_map.repeat_interleave(self.config.downsample, 2).repeat_interleave(
            self.config.downsample, 3
        )

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of quantised features [B, D, h, w] with gradients, not clamped, float32."""
        weight = self.post_quant_conv.weight
        out = self.decoder(self.post_quant_conv(f.to(weight.dtype)))
        return out.float()

    def codes(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Quantised features [B, D, h, w] of tokens [B, N, 1], as they are used (by angle: of length one)."""
        return _map(self.quantize.codes(tokens), self._size(layout))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass: reconstruction, not clamped, and what the quantiser says."""
        quantized = self._quantized(self.features(x))
        return self.reconstruct(quantized.values), quantized

    def _quantized(self, f: Tensor) -> Quantized:
        found = self.quantize(_rows(f))
        return found._replace(values=_map(found.values, tuple(f.shape[2:])))

    def _size(self, layout: Layout | None) -> tuple[int, ...]:
        levels = (layout or self.layout()).levels
        if len(levels) != 1 or len(levels[0]) != 2:
            raise ValueError(f"a grid of codes has one level of (rows, columns), got {levels}")
        return levels[0]

    # -- training -------------------------------------------------------------------------------------------------

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        return self._quantized(f)

    def _compared(self, x: Tensor) -> Tensor:
        """Vectors as distances are taken: of length one if codes are looked up by angle."""
        return unit(x) if self.config.l2_norm else x

    @torch.no_grad()
    def _set(self, vectors: Tensor) -> None:
        self.quantize.embedding.weight.copy_(self._compared(vectors))

    @torch.no_grad()
    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        """Sets the table to random encoder vectors."""
        self._set(pick(_rows(f).float(), self.config.vocab_size, noise, 0))

    @torch.no_grad()
    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        """A vector is the likelier to become a code the farther it is from its present one."""
        self.recent.add_(tokens)
        update_hits_(self.hits, summed_over_ranks(count(tokens, self.config.vocab_size)), updates)
        if below is None:
            return 0
        gone, vectors = dead(self.hits, below), self._compared(_rows(f).float())
        error = (vectors - self.quantize.codes(self.quantize.encode(vectors))).square().sum(-1)
        n = restart_(self.quantize.embedding.weight, gone, vectors, noise, updates, error)
        self.hits[gone] = self.hits.mean()
        return n

    def metrics(self) -> dict[str, Tensor]:
        """The share of codes among the last 65,536 tokens, and the perplexity of the moving average."""
        return {"usage": used(self.recent.hits(self.config.vocab_size)), "perplexity": perplexity(self.hits)}


def _rows(f_BDhw: Tensor) -> Tensor:
    """A map as row-major vectors [B, N, D]."""
    return f_BDhw.flatten(2).transpose(1, 2)


def _map(x_BND: Tensor, size: tuple[int, ...]) -> Tensor:
    """Row-major vectors as a map [B, D, h, w]."""
    return x_BND.transpose(1, 2).unflatten(2, size)
