"""What a tokenizer is trained on: reconstruction, quantiser, perceptual and adversarial terms; codebook upkeep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arvis.noise import Noise
from arvis.quant.multiscale import area
from arvis.tokenizers import Trainable
from arvis.training.adversarial import Adversary


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the terms, and when dead codes are revived.

    `l1`, `l2` compare pixels in [-1, 1], `edges` their differences along both axes; `vq`, `kl` and `entropy` are the
    quantiser's own terms, where it has them; `perceptual` and `adversarial` count only where their networks are given.
    `adaptive` scales the latter so that it pulls as hard at the decoder's last layer as the pixel and perceptual terms
    do (VQGAN, arXiv 2012.09841).

    Every `revive_every` updates (0: never) codes with less than `revive_below` of the mean hits are set to vectors of
    the batch, until `revive_until` updates are done (0: no end): averaged weights need the last part of a run without
    revivals.
    """

    l1: float = 1.0
    l2: float = 1.0
    edges: float = 0.0
    vq: float = 1.0
    kl: float = 1e-6
    entropy: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    adaptive: bool = False
    revive_every: int = 10
    revive_below: float = 0.05
    revive_until: int = 0


OWN = ("vq", "kl", "entropy")
"""Losses of a quantiser that count."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(images, images) in [-1, 1] -> their distance, a scalar or [B]."""


def tokenizer_loss(
    tokenizer: Trainable,
    batch: dict[str, Any],
    noise: Noise,
    config: TokenizerLossConfig,
    updates: int | None = None,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
) -> dict[str, Tensor]:
    """ "loss", its terms, PSNR in dB, and the tokenizer's own metrics (usage, perplexity); "loss_adversary" with a GAN.

    `batch["image"]` is [B, 3, H, W] in [-1, 1]; a smaller picture that comes out is compared with averages over it.
    `updates` is the number of updates done before: the codebook's statistics are kept and dead codes revived; None
    (validation) changes nothing. Usage is that of the moving average of hits over past batches, the perplexity too.
    """
    x = batch["image"]
    layout = tokenizer.layout(tuple(x.shape[2:]))
    f = tokenizer.features(x)
    quantized = tokenizer.quantized(f, layout, noise)
    y = tokenizer.reconstruct(quantized.values)
    if y.shape != x.shape:  # coded at a coarser size
        x = area(x, tuple(y.shape[2:]))
    error = (y - x).float()
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
    }
    if perceptual is not None:
        terms["perceptual"] = perceptual(y, x).mean()
    if adversary is not None:
        pulls = _total(config, terms)
        scaled = config.adaptive and y.requires_grad
        terms["adversarial"] = adversary.generator(
            y, updates, pulls if scaled else None, tokenizer.decoder.last_weight if scaled else None
        )
    terms |= {name: quantized.losses[name] for name in OWN if name in quantized.losses}
    out = {"loss": _total(config, terms)}
    if adversary is not None:
        out["loss_adversary"] = adversary.discriminator(x, y.detach(), updates)
    if updates is not None:
        below = config.revive_below if _due(config, updates) else None
        revived = tokenizer.tend_(f.detach(), quantized.tokens, layout, noise, updates, below)
        terms["revived"] = torch.tensor(float(revived), device=x.device)
    terms["psnr"] = 10 * (4 / y.clamp(-1, 1).sub(x).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)).log10().mean()
    return out | {name: term.detach() for name, term in (terms | tokenizer.metrics()).items()}


def _total(config: TokenizerLossConfig, terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()


def _due(config: TokenizerLossConfig, updates: int) -> bool:
    """Whether dead codes are revived after this batch."""
    if not config.revive_every or (config.revive_until and updates >= config.revive_until):
        return False
    return (updates + 1) % config.revive_every == 0
