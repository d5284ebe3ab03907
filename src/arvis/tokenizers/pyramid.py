"""VAR's tokenizer: an image as a pyramid of token maps over one shared codebook (arXiv 2404.02905)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from arvis.quant.base import Quantized
from arvis.quant.multiscale import MultiScaleVQ, MultiScaleVQConfig, Target, area, area_target, to_rows
from arvis.quant.usage import perplexity, used_by_average
from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.summing import inputs, summed, sums
from arvis.tokens import Layout, Space, pyramid

if TYPE_CHECKING:
    from arvis.noise import Source


@dataclass(frozen=True, kw_only=True)
class PyramidVQConfig:
    """`patch_nums` are the sides of the default scales; exactly one of `cnn` and `patch` is the backbone.

    `beta` weighs the commitment term, `using_znorm` looks codes up by angle, `quant_resi` is the share of the phi
    convolution and `share_quant_resi` their number (0: one per scale); names as in VAR.
    """

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    z_channels: int = 32
    beta: float = 0.25
    using_znorm: bool = False
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    quant_conv_ks: int = 3
    cnn: CNNConfig | None = None
    patch: PatchConfig | None = None

    def __post_init__(self) -> None:
        if self.backbone.z_channels != self.z_channels:
            raise ValueError(f"the backbone's z_channels {self.backbone.z_channels} must equal {self.z_channels}")

    @property
    def backbone(self) -> Backbone:
        return chosen(self.cnn, self.patch)

    @property
    def downsample(self) -> int:
        """Pixels per cell of the last scale along each axis."""
        return self.backbone.downsample


class PyramidVQ(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> tokens [B, N, 1], levels from coarse to fine, one after another.

    Each level codes what the coarser ones left over; the sum f of all upsampled code maps is decoded. State dict names
    are those of VAR's checkpoints. `target` is what a level has to code (VAR: the area-averaged residual).
    `quantize(f, layout)` is the quantiser's forward: Quantized with straight-through values and losses["vq"].
    """

    def __init__(self, config: PyramidVQConfig, target: Target = area_target) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = coder(config.backbone)
        quantize = MultiScaleVQConfig(
            size=config.vocab_size,
            width=config.z_channels,
            levels=len(config.patch_nums),
            beta=config.beta,
            cosine=config.using_znorm,
            ratio=config.quant_resi,
            shares=config.share_quant_resi,
        )
        self.quantize = MultiScaleVQ(quantize, target)
        size, pad = config.quant_conv_ks, config.quant_conv_ks // 2
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, size, padding=pad)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, size, padding=pad)

    @property
    def space(self) -> Space:
        return Space(sizes=(self.config.vocab_size,))

    @property
    def channels(self) -> int:
        """Of what a generator sees."""
        return self.config.z_channels

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout:
        """The pyramid of the configuration, or the same one stretched to images of `shape` (H, W) pixels."""
        sides = self.config.patch_nums
        if shape is None:
            return pyramid(sides)
        cell = self.config.downsample
        if any(side % cell or side < cell for side in shape):
            raise ValueError(f"image sides must be multiples of {cell}, got {shape}")
        last = [side // cell for side in shape]
        return Layout(tuple(tuple(max(1, round(p * side / sides[-1])) for side in last) for p in sides))

    def features(self, x: Tensor) -> Tensor:
        """What is quantised: float32 [B, C, H, W] (float64 of a float64 module)."""
        f = self.quant_conv(self.encoder(x))
        return f.to(torch.promote_types(f.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        """Tokens [B, N, 1] of images; the layout's last level must have the size of the features."""
        return self.quantize.encode(self.features(x), layout or self.layout(tuple(x.shape[2:])))

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens [B, N, 1]; of `known` [B, N] only levels wholly known are added."""
        return self.decode_features(summed(self, tokens, layout or self.layout(), known))

    @torch.no_grad()
    def decode_features(self, f: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of (partial) sums [B, C, H, W]."""
        return self.reconstruct(f).clamp(-1, 1)

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of sums f with gradients, not clamped, float32."""
        weight = self.post_quant_conv.weight
        return self.decoder(self.post_quant_conv(f.to(weight.dtype))).float()

    def embed(self, tokens_BnS: Tensor) -> Tensor:
        """Code vectors [B, n, C], as they are added (never normalised)."""
        return self.quantize.embedding(tokens_BnS[..., 0])

    def start(self, batch: int, layout: Layout) -> Tensor:
        """The empty sum: zeros [B, C, H, W]."""
        weight = self.quantize.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(batch, self.config.z_channels, *layout.levels[-1], dtype=dtype)

    def accumulate(self, f: Tensor, tokens_BnS: Tensor, k: int, layout: Layout) -> Tensor:
        """f + phi_k(bicubic(codes of level k)); the last level is not resized."""
        return self.accumulate_soft(f, self.embed(tokens_BnS), k, layout)

    def accumulate_soft(self, f: Tensor, h_BnC: Tensor, k: int, layout: Layout) -> Tensor:
        """The same for given code vectors: mixtures of codes, codes of another image."""
        return f + self.quantize.spread(h_BnC, k, layout)

    def next_input(self, f: Tensor, k: int, layout: Layout) -> Tensor:
        """What a generator sees before level k >= 1: f averaged over the cells of level k, [B, n_k, C] float32."""
        return to_rows(area(f, layout.levels[k]))

    def inputs(self, tokens: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """The inputs of levels first..last-1 under teacher forcing, [B, sum of n_k, C]; level 0 has none.

        Only tokens of levels below last - 1 are read.
        """
        return inputs(self, tokens, layout, first, layout.K if last is None else last)

    def fhats(self, tokens: Tensor, layout: Layout) -> list[Tensor]:
        """The partial sum after each level."""
        return sums(self, tokens, layout)

    def forward(self, x: Tensor, layout: Layout | None = None) -> tuple[Tensor, Quantized]:
        """The training pass: reconstruction, not clamped, and what the quantiser says."""
        quantized = self.quantize(self.features(x), layout or self.layout(tuple(x.shape[2:])))
        return self.reconstruct(quantized.values), quantized

    # -- training -------------------------------------------------------------------------------------------------

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        return self.quantize(f, layout)

    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        self.quantize.init_(f, layout, noise)

    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        self.quantize.record_(tokens, layout, updates)
        return 0 if below is None else self.quantize.revive_(f, layout, noise, updates, below)

    def metrics(self) -> dict[str, Tensor]:
        """Per level: the share of codes in use and their perplexity."""
        hits_SV = self.quantize.ema_vocab_hit_SV
        return {f"usage_{k}": share for k, share in enumerate(used_by_average(hits_SV))} | {
            f"perplexity_{k}": value for k, value in enumerate(perplexity(hits_SV))
        }
