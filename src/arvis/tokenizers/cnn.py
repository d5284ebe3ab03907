"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), as VAR's tokenizer uses them.

Attribute names are those of the published checkpoints, so that state dicts map one to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.attention import attend

# The maps of the full resolution are what a tokenizer's memory goes to, so that none is held longer than it is read.


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Channels are `ch` times `ch_mult` per resolution; each resolution after the first halves the map.

    `using_sa` puts attention after every block of the lowest resolution (`decoder_sa`: there in the decoder, too),
    `using_mid_sa` between the two middle blocks. `sa_levels` and `decoder_sa_levels` are further resolutions with
    attention (0: the full one). `double_z` makes the encoder give a mean and a log variance. `decoder_ch_mult` is the
    decoder's where it differs; `halvings` is how many of the first resolutions are halved, by default all but the last.
    """

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    in_channels: int = 3
    z_channels: int = 32
    using_sa: bool = True
    decoder_sa: bool = True
    using_mid_sa: bool = True
    sa_levels: tuple[int, ...] = ()
    decoder_sa_levels: tuple[int, ...] = ()
    double_z: bool = False
    decoder_ch_mult: tuple[int, ...] = ()
    halvings: int | None = None

    def __post_init__(self) -> None:
        levels = min(len(self.ch_mult), len(self.decoder_ch_mult or self.ch_mult))
        if not 0 <= self.downs < levels:
            raise ValueError(f"{levels} resolutions can be halved up to {levels - 1} times, got halvings={self.downs}")
        if self.ch % 32 and self.ch % 24:
            raise ValueError(f"group normalisation has 32 or 24 groups: ch must be a multiple of one, got {self.ch}")

    @property
    def downs(self) -> int:
        """How often the map is halved."""
        return len(self.ch_mult) - 1 if self.halvings is None else self.halvings

    @property
    def downsample(self) -> int:
        """Pixels per cell along each axis."""
        return 2**self.downs


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(24 if channels % 32 else 32, channels, eps=1e-6)


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)), in place where no gradient needs what lies between."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _one_by_one(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x); picture by picture where one keeps the machine busy, but in training."""
    if len(x) > 1 and x.device.type != "cuda" and not torch.is_grad_enabled():
        return torch.cat([run(one) for one in x.split(1)])
    return run(x)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_activated(self.norm1, x))
        h = _activated(self.norm2, h)
        h = self.conv2(h)
        return self.nin_shortcut(x) + h


class PixelAttention(nn.Module):
    """Single-head attention over all cells of the map, 1x1 projections, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, HW, 3C]
        q, k, v = qkv.chunk(3, dim=-1)
        h = attend(q, k, v, None, q.shape[-1] ** -0.5)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves the map: one row and column of zeros at the bottom right, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the map: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = PixelAttention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Stage(nn.Module):
    """The blocks of one resolution, each followed by attention if there is any, then the change of resolution."""

    def __init__(
        self,
        channels: list[int],
        attention: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(PixelAttention(c) if attention else nn.Identity() for c in channels[1:])
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def steps(self) -> Iterator[nn.Module]:
        """The parts in their order."""
        for block, attention in zip(self.block, self.attn, strict=True):
            yield from (block, attention)
        yield from (self.downsample, self.upsample)


class CNNEncoder(nn.Module):
    """Images [B, in_channels, H, W] -> maps [B, z_channels (twice with `double_z`), H / downsample, W / downsample]."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = config.ch if level == 0 else widths[level - 1]
            channels = [before, *[width] * config.num_res_blocks]
            down = Downsample(width) if level < config.downs else None
            attention = level in config.sa_levels or (config.using_sa and level == last)
            self.down.append(Stage(channels, attention, downsample=down))
        self.mid = Middle(widths[-1], config.using_mid_sa)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (1 + config.double_z), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _one_by_one(self._maps, x)

    def _maps(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for step in stage.steps():
                h = step(h)
        return self.conv_out(_activated(self.norm_out, self.mid(h)))


class CNNDecoder(nn.Module):
    """Maps [B, z_channels, h, w] -> images [B, in_channels, h * downsample, w * downsample], not clamped."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.ch * m for m in config.decoder_ch_mult or config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.using_mid_sa)
        self.up = nn.ModuleList()  # up[0] is the full resolution, used last
        for level, width in enumerate(widths):
            before = widths[min(level + 1, last)]
            channels = [before, *[width] * (config.num_res_blocks + 1)]
            up = Upsample(width) if 0 < level <= config.downs else None
            lowest = config.using_sa and config.decoder_sa and level == last
            attention = level in config.decoder_sa_levels or lowest
            self.up.append(Stage(channels, attention, upsample=up))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    @property
    def last_weight(self) -> Tensor:
        """The weight that makes the colours, where the pulls of two losses can be compared."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        return _one_by_one(self._pictures, z)

    def _pictures(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for step in stage.steps():
                h = step(h)
        return self.conv_out(_activated(self.norm_out, h))
