"""Infinity's tokenizer: an image as a pyramid of bit vectors on the unit sphere, without a codebook (arXiv 2412.04431).

A level codes what the coarser ones left over by the signs of its channels (BSQ, arXiv 2406.07548); bilinearly upsampled
codes add up to the map that is decoded. There is no convolution between levels, so the sum is all there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded
from arvis.quant.base import Quantized
from arvis.quant.multiscale import area, to_map, to_rows
from arvis.quant.sphere import BSQ, BSQConfig
from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.ratios import RATIOS, scales_to, whole
from arvis.tokenizers.summing import inputs, summed, sums
from arvis.tokens import Layout, Space

if TYPE_CHECKING:
    from arvis.noise import Source


@dataclass(frozen=True, kw_only=True)
class BitPyramidConfig:
    """`bits` channels per cell; `scales` (h, w) are the default levels in tokens; exactly one backbone.

    A token covers `patchify` x `patchify` cells and has the bits of all of them. `entropy` and `commit` weigh the terms
    of the quantiser.
    """

    bits: int = 32
    scales: tuple[tuple[int, int], ...] = RATIOS[1.0]
    patchify: int = 1
    entropy: float = 0.1
    commit: float = 0.25
    cnn: CNNConfig | None = None
    patch: PatchConfig | None = None

    def __post_init__(self) -> None:
        if self.backbone.z_channels != self.bits or self.backbone.double_z:
            raise ValueError(
                f"the backbone gives one channel per bit: {self.bits}, got z_channels={self.backbone.z_channels} "
                f"and double_z={self.backbone.double_z}"
            )

    @property
    def backbone(self) -> Backbone:
        return chosen(self.cnn, self.patch)

    @property
    def downsample(self) -> int:
        """Pixels per token of the last scale along each axis."""
        return self.backbone.downsample * self.patchify


class BitPyramid(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> bits [B, N, S], levels from coarse to fine, S = bits x patchify^2.

    The bits of a token are those of its cells, channel by channel (the order of `pixel_unshuffle`).
    """

    def __init__(self, config: BitPyramidConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = coder(config.backbone)
        self.quantize = BSQ(BSQConfig(bits=config.bits, entropy=config.entropy, commit=config.commit))
        self._share_of_ones: Tensor | None = None

    @property
    def channels(self) -> int:
        """Of what a generator sees of the sum: as many as a token has bits."""
        return self.config.bits * self.config.patchify**2

    @property
    def space(self) -> Space:
        return Space(sizes=(2,) * self.channels)

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout:
        """The scales of the configuration, or those for images of `shape` (H, W) pixels.

        A list of the official tables is exchanged for the one that ends in the size; if there is none, and for own
        lists, the scales are stretched (a single cell stays one).
        """
        own, cell = Layout(self.config.scales), self.config.downsample
        if shape is None:
            return own
        if any(side % cell or side < cell for side in shape):
            raise ValueError(f"image sides must be multiples of {cell}, got {shape}")
        last = tuple(side // cell for side in shape)
        if last == own.levels[-1]:
            return own
        if whole(own) is not None and (listed := scales_to(last)) is not None:
            return listed
        (y, x), (to_y, to_x) = own.levels[-1], last
        stretched = ((max(1, round(h * to_y / y)), max(1, round(w * to_x / x))) for h, w in self.config.scales)
        return Layout(tuple(s if to != (1, 1) else to for s, to in zip(stretched, self.config.scales, strict=True)))

    # -- images and features --------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """What is quantised: float32 [B, bits, H, W] (float64 of a float64 module)."""
        f = self.encoder(x)
        return f.to(torch.promote_types(f.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        """Bits [B, N, S] of images; the layout's last level must have the size of the features."""
        return self.corrected(self.features(x), layout or self.layout(tuple(x.shape[2:])))[0]

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of bits [B, N, S]; of `known` [B, N] only levels wholly known are added."""
        return self.decode_features(summed(self, tokens, layout or self.layout(), known))

    @torch.no_grad()
    def decode_features(self, f: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of (partial) sums [B, bits, H, W]."""
        return self.reconstruct(f).clamp(-1, 1)

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of sums f with gradients, not clamped, float32."""
        return self.decoder(f.to(next(self.decoder.parameters()).dtype)).float()

    # -- the recursion --------------------------------------------------------------------------------------------

    def start(self, batch: int, layout: Layout) -> Tensor:
        """The empty sum: zeros [B, bits, H, W]."""
        weight = next(self.decoder.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(batch, self.config.bits, *self._cells(layout, layout.K - 1), dtype=dtype)

    def accumulate(self, f: Tensor, tokens_BnS: Tensor, k: int, layout: Layout) -> Tensor:
        """f + the codes of level k, bilinearly brought to the size of the last level."""
        code_BnC = self.quantize.codes(self.cell_rows(tokens_BnS, k, layout)).to(f.dtype)
        return f + self._spread(to_map(code_BnC, self._cells(layout, k)), layout)

    def next_input(self, f: Tensor, k: int, layout: Layout) -> Tensor:
        """What a generator sees before level k >= 1: f bilinearly brought to the size of level k, [B, n_k, S].

        Compat: bilinear also where the map shrinks, without averaging.
        """
        return self.token_rows(_resized(f, self._cells(layout, k)))

    def inputs(self, tokens: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """The inputs of levels first..last-1 under teacher forcing, [B, sum of n_k, S]; level 0 has none."""
        return inputs(self, tokens, layout, first, layout.K if last is None else last)

    def fhats(self, tokens: Tensor, layout: Layout) -> list[Tensor]:
        """The partial sum after each level."""
        return sums(self, tokens, layout)

    @torch.no_grad()
    def corrected(self, f: Tensor, layout: Layout, flips_BNS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bitwise self-correction: (labels [B, N, S], inputs [B, N - n_0, S]) of features under flipped bits.

        Each level codes what is left of f after the flipped bits of the coarser ones, so its labels make good for
        flips. `flips_BNS` says which bits; without it the labels are the tokens and the inputs teacher forcing's.
        """
        cells = self._cells(layout, layout.K - 1)
        if tuple(f.shape[2:]) != cells:
            raise ValueError(f"features of {tuple(f.shape[2:])} cells do not fit the last level of {layout}: {cells}")
        fhat, labels, seen = torch.zeros_like(f), [], []
        for k in range(layout.K):
            rest = f - fhat if k == layout.K - 1 else area(f - fhat, self._cells(layout, k))
            bits_BnS = self.token_rows(self.quantize.encode(rest))
            labels.append(bits_BnS)
            if k == layout.K - 1:
                break
            drawn = bits_BnS if flips_BNS is None else bits_BnS ^ flips_BNS[:, layout.span(k)].to(bits_BnS.device)
            fhat = self.accumulate(fhat, drawn, k, layout)
            seen.append(self.next_input(fhat, k + 1, layout))
        empty = f.new_zeros(len(f), 0, self.channels)
        return torch.cat(labels, 1), torch.cat([empty, *seen], 1)

    def _cells(self, layout: Layout, k: int) -> tuple[int, int]:
        """The cells of level k of a layout in tokens."""
        h, w = layout.levels[k]
        return h * self.config.patchify, w * self.config.patchify

    def token_rows(self, h_BCHW: Tensor) -> Tensor:
        """A map of cells [B, bits, H, W] as tokens [B, n, S]."""
        return to_rows(F.pixel_unshuffle(h_BCHW, self.config.patchify))

    def cell_rows(self, tokens_BnS: Tensor, k: int, layout: Layout) -> Tensor:
        """Tokens of level k [B, n, S] as rows of cells [B, n x patchify^2, bits]."""
        return to_rows(F.pixel_shuffle(to_map(tokens_BnS, layout.levels[k]), self.config.patchify))

    def _spread(self, h_BCHW: Tensor, layout: Layout) -> Tensor:
        return _resized(h_BCHW, self._cells(layout, layout.K - 1))

    # -- training -------------------------------------------------------------------------------------------------

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        """The sum of all levels; each passes its gradient straight to its unit vectors. Losses: means over levels."""
        with unrounded(f):
            f = f if f.dtype == torch.float64 else f.float()
            fhat, tokens, found = torch.zeros_like(f), [], []
            for k in range(layout.K):
                cells = self._cells(layout, k)
                rest = f - fhat.detach()
                level = self.quantize(to_rows(rest if k == layout.K - 1 else area(rest, cells)))
                tokens.append(self.token_rows(to_map(level.tokens, cells)))
                fhat = fhat + self._spread(to_map(level.values, cells), layout)
                found.append(level)
        losses = {name: torch.stack([level.losses[name] for level in found]).mean() for name in found[0].losses}
        balance = torch.stack([level.stats["bit_mean"] for level in found])
        return Quantized(fhat, torch.cat(tokens, 1), losses, {"bit_mean": balance})

    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        """There is no table."""

    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        """There are no codes that could die; how often each bit is set is kept for the log."""
        self._share_of_ones = tokens.float().mean((0, 1))
        return 0

    def metrics(self) -> dict[str, Tensor]:
        """The mean entropy of a bit over the last batch, in bits (1: as often set as not), and the lowest one."""
        if self._share_of_ones is None:
            return {}
        p = self._share_of_ones
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
        return {"bit_entropy": entropy.mean(), "bit_entropy_least": entropy.min()}


def _resized(h_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear in both directions, float32; a map of the size stays as it is."""
    with unrounded(h_BCHW):
        return h_BCHW if h_BCHW.shape[2:] == size else F.interpolate(h_BCHW, size=size, mode="bilinear")
