"""Frozen features of pictures: the vision transformer of DINOv2 (arXiv 2304.07193), with registers or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.trunk import Call, Trunk
from arvis.nn.vit import ViTBlock


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Sizes of the published small one, which learned positions on `grid` x `grid` patches of `patch` pixels; others
    have `registers`, rows that stand for no place (arXiv 2309.16588)."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 14
    grid: int = 37
    registers: int = 0
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6


class LayerScale(nn.Module):
    """A learned factor of each channel, behind the last layer of a branch (arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class DINOv2(nn.Module):
    """Pictures [B, 3, Y, X] without ImageNet's mean and deviation -> (summary [B, D], rows of their patches [B, P, D]).

    Any size: what a patch does not fill is left out, and positions are resampled. Raises ValueError for pictures that
    are smaller than a patch.
    """

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patches = nn.Conv2d(3, width, config.patch, config.patch)
        self.summary = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.position = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.trunk = Trunk(self._block() for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, config.norm_eps)

    def _block(self) -> ViTBlock:
        c = self.config
        block = ViTBlock(c.width, c.heads, c.mlp_ratio, eps=c.norm_eps)
        block.out = nn.Sequential(block.out, LayerScale(c.width))
        block.mlp[2] = nn.Sequential(block.mlp[2], LayerScale(c.width))
        return block

    def forward(self, x_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        if min(x_BCYX.shape[2:]) < self.config.patch:
            raise ValueError(
                f"pictures have at least one patch of {self.config.patch} pixels, got {tuple(x_BCYX.shape)}"
            )
        grid = self.patches(x_BCYX)
        first, place = self.positions(*grid.shape[2:]).split((1, grid.shape[2] * grid.shape[3]), 1)
        front = self.summary + first if self.registers is None else torch.cat((self.summary + first, self.registers), 1)
        x = torch.cat((front.expand(len(grid), -1, -1), grid.flatten(2).mT + place), 1)
        x = self.norm(self.trunk(x, Call()))
        return x[:, 0], x[:, front.shape[1] :]

    def positions(self, h: int, w: int) -> Tensor:
        """Positions [1, 1 + h w, D] of the summary and of h x w patches.

        Compat: models with registers were made with a filter where the grid shrinks, those without had none.
        """
        side = self.config.grid
        first, grid = self.position.split((1, side**2), 1)
        maps = grid.mT.unflatten(2, (side, side)).float()
        if (h, w) != (side, side):
            maps = F.interpolate(maps, size=(h, w), mode="bicubic", antialias=self.config.registers > 0)
        return torch.cat((first, maps.flatten(2).mT.to(first)), 1)
