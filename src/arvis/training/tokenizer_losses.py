"""What a tokenizer is trained on: reconstruction, quantiser, perceptual and adversarial terms; codebook upkeep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arvis.noise import Noise
from arvis.quant.usage import perplexity, used_by_average
from arvis.tokenizers import PyramidVQ
from arvis.tokens import Layout
from arvis.training.adversarial import Adversary


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the terms, and when dead codes are revived.

    `l1`, `l2` compare pixels in [-1, 1], `edges` their differences along both axes, `vq` is the quantiser's own term;
    `perceptual` and `adversarial` count only where their networks are given. `adaptive` scales the latter so that it
    pulls as hard at the decoder's last layer as the pixel and perceptual terms do (VQGAN, arXiv 2012.09841).

    Every `revive_every` updates (0: never) codes with less than `revive_below` of the mean hits are set to vectors of
    the batch, until `revive_until` updates are done (0: no end): averaged weights need the last part of a run without
    revivals.
    """

    l1: float = 1.0
    l2: float = 1.0
    edges: float = 0.0
    vq: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    adaptive: bool = False
    revive_every: int = 10
    revive_below: float = 0.05
    revive_until: int = 0


Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(images, images) in [-1, 1] -> their distance, a scalar or [B]."""


def tokenizer_loss(
    tokenizer: PyramidVQ,
    batch: dict[str, Any],
    noise: Noise,
    config: TokenizerLossConfig,
    updates: int | None = None,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
) -> dict[str, Tensor]:
    """ "loss", its terms, PSNR in dB, and for each level k `usage_k` and `perplexity_k`; "loss_adversary" with a GAN.

    `batch["image"]` is [B, 3, H, W] in [-1, 1]. `updates` is the number of updates done before: the codebook's
    statistics are kept and dead codes revived; None (validation) changes nothing. Usage is that of the moving average
    of hits over past batches, the perplexity too.
    """
    x = batch["image"]
    layout = tokenizer.layout(tuple(x.shape[2:]))
    f = tokenizer.features(x)
    quantized = tokenizer.quantize(f, layout)
    y = tokenizer.reconstruct(quantized.values)
    error = (y - x).float()
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "vq": quantized.losses["vq"],
    }
    if perceptual is not None:
        terms["perceptual"] = perceptual(y, x).mean()
    if adversary is not None:
        pulls = _total(config, {name: term for name, term in terms.items() if name != "vq"})
        scaled = config.adaptive and y.requires_grad
        terms["adversarial"] = adversary.generator(
            y, updates, pulls if scaled else None, tokenizer.decoder.last_weight if scaled else None
        )
    out = {"loss": _total(config, terms)}
    if adversary is not None:
        out["loss_adversary"] = adversary.discriminator(x, y.detach(), updates)
    if updates is not None:
        revived = tend_codebook(tokenizer, f.detach(), quantized.tokens, layout, noise, config, updates)
        terms["revived"] = torch.tensor(float(revived), device=x.device)
    terms["psnr"] = 10 * (4 / y.clamp(-1, 1).sub(x).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)).log10().mean()
    return out | {name: term.detach() for name, term in (terms | codebook_metrics(tokenizer)).items()}


def _total(config: TokenizerLossConfig, terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()


def tend_codebook(
    tokenizer: PyramidVQ,
    f: Tensor,
    tokens: Tensor,
    layout: Layout,
    noise: Noise,
    config: TokenizerLossConfig,
    updates: int,
) -> int:
    """Records the hits of a batch of features and tokens, and revives dead codes when it is time; says how many."""
    tokenizer.quantize.record_(tokens, layout, updates)
    due = config.revive_every and (updates + 1) % config.revive_every == 0
    if not due or (config.revive_until and updates >= config.revive_until):
        return 0
    return tokenizer.quantize.revive_(f, layout, noise, updates, config.revive_below)


def codebook_metrics(tokenizer: PyramidVQ) -> dict[str, Tensor]:
    """Per level of the configuration: the share of codes in use and their perplexity, from the average of hits."""
    hits_SV = tokenizer.quantize.ema_vocab_hit_SV
    used_S, perplexity_S = used_by_average(hits_SV), perplexity(hits_SV)
    return {f"usage_{k}": share for k, share in enumerate(used_S)} | {
        f"perplexity_{k}": value for k, value in enumerate(perplexity_S)
    }
