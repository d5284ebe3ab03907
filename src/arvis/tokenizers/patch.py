"""A patchified autoencoder: transformer blocks on a coarse grid, so that nearly all work is matrix products.

Made for machines whose matrix units are fast and whose convolutions are not; an own design, without a paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """`width` channels per patch of `patch` pixels; `grid` is the size at which positions are stored.

    `encoder_depth` and `decoder_depth` count blocks; `refine` is the width of the convolutions at half resolution that
    smooth the borders of the patches; `double_z` makes the encoder give a mean and a log variance.
    """

    patch: int = 8
    grid: tuple[int, int] = (8, 8)
    in_channels: int = 3
    z_channels: int = 32
    width: int = 256
    heads: int = 4
    mlp_ratio: float = 3.0
    encoder_depth: int = 2
    decoder_depth: int = 2
    refine: int = 16
    double_z: bool = False

    def __post_init__(self) -> None:
        if self.patch % 2 or self.width % self.heads:
            raise ValueError(f"patch must be even and heads must divide width, got {self}")

    @property
    def downsample(self) -> int:
        """Pixels per cell along each axis."""
        return self.patch


class Block(nn.Module):
    """Pre-norm attention over all cells, then a GELU network."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (t h d) -> t b h n d", t=3, h=self.heads)
        # Written out: on few cells the backward of the fused CPU kernel is several times slower than two products.
        seen = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1, dtype=torch.float32)
        x = x + self.proj(rearrange(seen.to(v.dtype) @ v, "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class _Grid(nn.Module):
    """Learned positions and blocks over a grid of cells: [B, h, w, width] -> the same."""

    def __init__(self, config: PatchConfig, depth: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(config.width, *config.grid), std=0.02))
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(config.width)
        for block in self.blocks:  # near the identity at first
            for layer in (block.proj, block.fc2):
                nn.init.normal_(layer.weight, std=0.02 / max(1, 2 * depth) ** 0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        positions = self.positions
        if tuple(positions.shape[1:]) != tuple(size):
            positions = F.interpolate(positions[None].float(), size=tuple(size), mode="bicubic")[0]
        x = x.flatten(1, 2) + positions.flatten(1).T
        for block in self.blocks:
            x = block(x)
        return self.norm(x).unflatten(1, size)


class PatchEncoder(nn.Module):
    """Images [B, in_channels, H, W] -> maps [B, z_channels (twice with `double_z`), H / patch, W / patch]."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.in_channels * config.patch**2, config.width)
        self.grid = _Grid(config, config.encoder_depth)
        self.head = nn.Linear(config.width, config.z_channels * (1 + config.double_z))

    def forward(self, x: Tensor) -> Tensor:
        p = self.config.patch
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"image sides must be multiples of {p}, got {tuple(x.shape[2:])}")
        patches = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        return rearrange(self.head(self.grid(self.embed(patches))), "b h w c -> b c h w")


class PatchDecoder(nn.Module):
    """Maps [B, z_channels, h, w] -> images [B, in_channels, h * patch, w * patch], not clamped."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        half, out = config.patch // 2, 4 * config.in_channels
        self.embed = nn.Linear(config.z_channels, config.width)
        self.grid = _Grid(config, config.decoder_depth)
        self.unpatchify = nn.Linear(config.width, config.refine * half**2)
        self.colour = nn.Conv2d(config.refine, out, 1)
        self.refine = nn.Conv2d(config.refine, config.refine, 3, padding=1)
        self.refine_colour = nn.Conv2d(config.refine, out, 3, padding=1)

    @property
    def last_weight(self) -> Tensor:
        """The weight that makes the colours, where the pulls of two losses can be compared."""
        return self.colour.weight

    def forward(self, z: Tensor) -> Tensor:
        half = self.config.patch // 2
        h = self.unpatchify(self.grid(self.embed(rearrange(z, "b c h w -> b h w c"))))
        h = rearrange(h, "b h w (p q c) -> b c (h p) (w q)", p=half, q=half)
        smooth = self.refine_colour(F.gelu(self.refine(h), approximate="tanh"))
        return F.pixel_shuffle(self.colour(h) + smooth, 2)
