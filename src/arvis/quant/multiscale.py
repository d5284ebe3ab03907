"""Multi-scale residual quantisation: a feature map as a sum of upsampled code maps (VAR, arXiv 2404.02905).

The recursion is made of pure functions; what one scale has to code is a plug-in (`Target`), so that other splits of the
map (frequency bands) use the same recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded
from arvis.quant.base import Quantized
from arvis.quant.revive import pick, restart_
from arvis.quant.usage import count, dead, perplexity, summed_over_ranks, update_hits_, used
from arvis.quant.vq import nearest, nearest_cosine, straight_through
from arvis.tokens import Layout

if TYPE_CHECKING:
    from arvis.noise import Source

Target = Callable[[Tensor, Tensor, int, Layout], Tensor]
"""(rest, f, k, layout) -> what level k has to code, [B, C, h_k, w_k]; rest = f minus what is coded already."""

Spread = Callable[[Tensor, int, Layout], Tensor]
"""(codes [B, n_k, C], k, layout) -> the contribution of level k to the full map, [B, C, H, W]."""


def area_target(rest: Tensor, f: Tensor, k: int, layout: Layout) -> Tensor:
    """VAR's target: the residual averaged over the cells of level k; the residual itself at the last level."""
    return rest if k == layout.K - 1 else area(rest, layout.levels[k])


def area(f: Tensor, size: tuple[int, ...]) -> Tensor:
    """Adaptive average pooling of [B, C, H, W] to `size`."""
    return F.interpolate(f, size=size, mode="area")


def to_map(h_BnC: Tensor, size: tuple[int, ...]) -> Tensor:
    """Row-major positions [B, n, C] as a map [B, C, h, w]."""
    return h_BnC.transpose(1, 2).unflatten(2, size)


def to_rows(h_BCHW: Tensor) -> Tensor:
    """A map [B, C, h, w] as row-major positions [B, n, C]."""
    return h_BCHW.flatten(2).transpose(1, 2)


def spread(h_BnC: Tensor, k: int, layout: Layout, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """phi(bicubic upsampling of level k to the last level's size), float32; the last level is not resized."""
    with unrounded(h_BnC):
        h = to_map(h_BnC if h_BnC.dtype == torch.float64 else h_BnC.float(), layout.levels[k])
        if k < layout.K - 1:
            h = F.interpolate(h, size=layout.levels[-1], mode="bicubic")
        return phi(h)


def residual_encode(
    f: Tensor, code: Callable[[Tensor, int], Tensor], spread: Spread, layout: Layout, target: Target = area_target
) -> Iterator[tuple[Tensor, Tensor]]:
    """The encoding recursion: yields for each level (what was to be coded [B, n_k, C], its contribution [B, C, H, W]).

    `code(z_BnC, k)` returns the code vectors of level k. `f` [B, C, H, W] must have the size of the last level. The
    residual carries no gradient; the contributions carry the one of `code` and `spread`.
    """
    if tuple(f.shape[2:]) != layout.levels[-1]:
        raise ValueError(f"a map of {tuple(f.shape[2:])} cells does not fit the last level of {layout}")
    f = f.detach()
    rest = f
    for k in range(layout.K):
        z_BnC = to_rows(target(rest, f, k, layout))
        h = spread(code(z_BnC, k), k, layout)
        rest = rest - h.detach()
        yield z_BnC, h


def ticks(shares: int) -> np.ndarray:
    """The relative positions of `shares` shared convolutions; four sit closer to the ends (a quirk of VAR)."""
    edge = 1 / 3 / 4 if shares == 4 else 1 / 2 / shares
    return np.linspace(edge, 1 - edge, shares)


def phi_index(k: int, levels: int, shares: int) -> int:
    """Which of `shares` convolutions level k of `levels` uses: the one whose tick is nearest to k / (levels - 1)."""
    at = k / (levels - 1) if levels > 1 else 0.0
    return int(np.argmin(np.abs(ticks(shares) - at)))  # Compat: rounding in float64 decides between equal distances


class Phi(nn.Conv2d):
    """The part-residual 3x3 convolution (1 - a) h + a conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        assert self.bias is not None
        mixed = self._conv_forward(h, self.weight.to(h.dtype), self.bias.to(h.dtype))
        return h.mul(1 - self.ratio) + mixed.mul(self.ratio)


class OnePhi(nn.Module):
    """One convolution for all levels."""

    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.qresi = phi

    def pick(self, k: int, levels: int) -> nn.Module:
        return self.qresi


class SharedPhi(nn.Module):
    """A few convolutions, each for the levels around its tick."""

    def __init__(self, phis: list[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)

    def pick(self, k: int, levels: int) -> nn.Module:
        return self.qresi_ls[phi_index(k, levels, len(self.qresi_ls))]


class OwnPhi(nn.ModuleList):
    """One convolution for each level of the configuration; other lists share them by relative position."""

    def pick(self, k: int, levels: int) -> nn.Module:
        return self[phi_index(k, levels, len(self))]


@dataclass(frozen=True, kw_only=True)
class MultiScaleVQConfig:
    """One table of `size` codes of `width` channels for all of `levels` levels.

    `beta` weighs the commitment term; `cosine` looks codes up by angle (their unnormalised vectors are added all the
    same); `ratio` is the share of the convolution phi (0: none); `shares` is how many phi there are (0: one per level).
    """

    size: int = 4096
    width: int = 32
    levels: int = 10
    beta: float = 0.25
    cosine: bool = False
    ratio: float = 0.5
    shares: int = 4


class MultiScaleVQ(nn.Module):
    """Maps [B, C, H, W] -> tokens [B, N, 1] of a pyramid of levels; attribute names are those of VAR's checkpoints.

    The buffer `ema_vocab_hit_SV` [levels, V] is the moving average of hits; only `record_` and `revive_` change it.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: MultiScaleVQConfig, target: Target = area_target) -> None:
        super().__init__()
        self.config = config
        self.target = target
        self.embedding = nn.Embedding(config.size, config.width)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(config.levels, config.size))
        self.quant_resi = self._phis()

    def _phis(self) -> OnePhi | SharedPhi | OwnPhi:
        n = self.config.shares or self.config.levels
        plain = abs(self.config.ratio) < 1e-6
        phis = [nn.Identity() if plain else Phi(self.config.width, self.config.ratio) for _ in range(n)]
        if self.config.shares == 0:
            return OwnPhi(phis)
        return OnePhi(phis[0]) if n == 1 else SharedPhi(phis)

    def lookup(self, z: Tensor) -> Tensor:
        """Ids of the nearest codes, [..., C] -> [...]."""
        return nearest_cosine(z, self.embedding.weight) if self.config.cosine else nearest(z, self.embedding.weight)

    def spread(self, h_BnC: Tensor, k: int, layout: Layout) -> Tensor:
        """The contribution of code vectors of level k to the map, [B, C, H, W], float32."""
        return spread(h_BnC, k, layout, self.quant_resi.pick(k, layout.K))

    @torch.no_grad()
    def encode(self, f: Tensor, layout: Layout) -> Tensor:
        """The tokens [B, N, 1] of a map."""
        return torch.cat(self._run(f, layout)[0], 1)[..., None]

    @torch.no_grad()
    def targets(self, f: Tensor, layout: Layout) -> Tensor:
        """The vectors that are looked up while a map is encoded, all levels: [B, N, C]."""
        return torch.cat(self._run(f, layout)[1], 1)

    def _run(self, f: Tensor, layout: Layout) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: ids [B, n_k], vectors looked up [B, n_k, C], contributions [B, C, H, W]."""
        ids: list[Tensor] = []

        def code(z_BnC: Tensor, k: int) -> Tensor:
            ids.append(self.lookup(z_BnC))
            return self.embedding(ids[-1])

        steps = list(residual_encode(f, code, self.spread, layout, self.target))
        return ids, [z for z, _ in steps], [h for _, h in steps]

    def forward(self, f: Tensor, layout: Layout) -> Quantized:
        """`values` is the sum over levels with a straight-through gradient; per-level stats are vectors [K].

        losses["vq"] is the mean over levels of beta |sg(fhat_k) - f|^2 + |fhat_k - sg(f)|^2, fhat_k the partial sums.
        """
        with unrounded(f):
            f = f if f.dtype == torch.float64 else f.float()
            ids, _, parts = self._run(f, layout)
            fhat, codebook, commit = torch.zeros_like(f), [], []
            for h in parts:
                fhat = fhat + h
                codebook.append(F.mse_loss(fhat, f.detach()))
                commit.append(F.mse_loss(fhat.detach(), f))
            codebook, commit = torch.stack(codebook), torch.stack(commit)
            tokens = torch.cat(ids, 1)[..., None]
            hits_KV = self.hits(tokens, layout)
        losses = {
            "vq": (commit * self.config.beta + codebook).mean(),
            "codebook": codebook.detach().mean(),
            "commit": commit.detach().mean(),
        }
        stats = {"usage": used(hits_KV), "perplexity": perplexity(hits_KV), "mse": commit.detach()}
        return Quantized(straight_through(f, fhat), tokens, losses, stats)

    def hits(self, tokens_BN1: Tensor, layout: Layout) -> Tensor:
        """How often each code occurs in each level: float32 [K, V]."""
        return torch.stack([count(tokens_BN1[:, layout.span(k)], self.config.size) for k in range(layout.K)])

    @torch.no_grad()
    def record_(self, tokens_BN1: Tensor, layout: Layout, updates: int) -> None:
        """Moves the average of hits towards those of a batch (summed over processes), after `updates` earlier calls.

        Levels of a list of another length count for the level at the same relative position.
        """
        levels = self.config.levels
        hits_KV = summed_over_ranks(self.hits(tokens_BN1, layout))
        rows = [round(k * (levels - 1) / max(layout.K - 1, 1)) for k in range(layout.K)]
        hits_SV = torch.zeros_like(self.ema_vocab_hit_SV)
        hits_SV.index_add_(0, torch.tensor(rows, device=hits_SV.device), hits_KV)
        update_hits_(self.ema_vocab_hit_SV, hits_SV, updates)

    @torch.no_grad()
    def init_(self, f: Tensor, layout: Layout, noise: Source, at: int = 0) -> None:
        """Sets the table to random encoder vectors, as if every level were coded without error.

        All levels are equally likely, so that the few cells of the coarse ones find enough codes.
        """
        steps = residual_encode(f.float(), lambda z, k: z, self.spread, layout, self.target)
        vectors = torch.cat([z for z, _ in steps], 1)
        weight_BN = _cells(layout).to(f.device).expand(vectors.shape[:2])
        self.embedding.weight.copy_(pick(vectors, self.config.size, noise, at, weight_BN))

    @torch.no_grad()
    def revive_(self, f: Tensor, layout: Layout, noise: Source, at: int, threshold: float = 0.05) -> int:
        """Sets the codes with less than `threshold` of the mean hits to vectors of the batch `f`; says how many.

        A vector is the likelier the more error its code leaves in the full map. Revived codes get the mean hits, so
        that they have time to find their place. `at` is the training step.
        """
        gone = dead(self.ema_vocab_hit_SV.sum(0), threshold)
        vectors = self.targets(f.float(), layout)
        error_BN = (vectors - self.embedding(self.lookup(vectors))).square().sum(2) * _cells(layout).to(f.device)
        n = restart_(self.embedding.weight, gone, vectors, noise, at, error_BN)
        self.ema_vocab_hit_SV[:, gone] = self.ema_vocab_hit_SV.mean(1, keepdim=True)
        return n


def _cells(layout: Layout) -> Tensor:
    """How many cells of the last level one position covers, [N]."""
    return torch.cat([torch.full((n,), layout.sizes[-1] / n) for n in layout.sizes])
