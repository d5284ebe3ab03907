"""VAR learns to draw digits: 1,500 real ones, both stages, some minutes on one core.

The claims: sampling with the cache is the model that was trained; every scale adds what the coarser ones left out; the
class is what is drawn, and without a class it is not; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from arvis.checks.claims import Claim, OnStep, at_least, at_most, mean, sizes
from arvis.checks.digits import CLASSES, Digits, digits, learn_pictures, learn_tokens, recognised
from arvis.checks.mutants import (
    add_nothing,
    forget_scales,
    ignore_class,
    ignore_order,
    of_system,
    swap_guidance,
    zero_head,
)
from arvis.noise import Noise
from arvis.systems.var import PRESETS, VAR, VARConfig, VARSampling, build
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.training.fit_config import FitConfig

PARAMETERS = {
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    "var-d36": 2_353_893_904,
}
"""Of the official transformers."""


@dataclass
class Trained:
    """What is examined."""

    system: VAR
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage; more of the second only learns the 1,500 digits by heart."""

    tokenizer: int = 450
    transformer: int = 300


def config() -> VARConfig:
    """32x32 pixels, 4x4 cells at the last of four scales: 30 tokens."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=16)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=128, z_channels=16, cnn=cnn)
    return VARConfig(tokenizer=tokenizer, depth=4, width=128, heads=4, num_classes=CLASSES)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, then transformer."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
    learn_pictures(system.tokenizer, data, length.tokenizer, on_step)
    tokens = system.tokenizer.encode(data.images)
    fit = FitConfig(steps=length.transformer, batch=64, lr=2e-3, schedule="constant", precision="float32")
    learn_tokens(system.transformer, system.loss, tokens, data, fit, on_step)
    return Trained(system.eval(), data)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order."""
    system, data = trained.system, trained.digits
    return [
        cached(system),
        *residual(system, data),
        conditioned(system, data),
        *recognised(system, data, VARSampling(cfg_scale=2.0, top_k=0, top_p=0.95), 0.85),
        *parameters(),
    ]


def cached(system: VAR) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one masked pass over the same tokens."""
    cond = system.prepare({"class_labels": torch.arange(2 * CLASSES) % CLASSES})
    s, logits = system.start(cond, VARSampling.plain(), Noise.of(2, 2 * CLASSES)), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise))
    gap = (torch.cat(logits, 1) - system.teacher(s.tokens, cond).logits).abs().max()
    return at_most("largest difference of cached and one-pass logits", float(gap), 1e-4)


def residual(system: VAR, data: Digits) -> list[Claim]:
    """The error of the reconstructed features after the last scale, against that after the first."""
    f = system.tokenizer.features(data.test_images)
    layout = system.tokenizer.layout()
    fhats = system.tokenizer.fhats(system.tokenizer.encode(data.test_images), layout)
    first, last = ((fhat - f).square().mean((1, 2, 3)) for fhat in (fhats[0], fhats[-1]))
    return [
        at_least("share of test digits whose features get closer by the finer scales", mean(last < first), 0.99),
        at_most(
            "error of the features after the last scale, as a part of that after the first",
            mean(last) / mean(first),
            0.5,
        ),
    ]


def conditioned(system: VAR, data: Digits) -> Claim:
    """How much worse unseen digits are predicted under wrong labels."""
    tokens, labels = system.tokenizer.encode(data.test_images), data.test_labels
    wrong = (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES
    right, other = (
        -mean(system.teacher(tokens, system.prepare({"class_labels": y})).log_prob(tokens)) for y in (labels, wrong)
    )
    return at_least("nats per token that a wrong class costs on test digits", other - right, 1.0)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def reverse_order(trained: Trained) -> None:
    """The tokens of a scale are laid out from its end to its beginning."""
    tokenizer = trained.system.tokenizer
    tokenizer.embed = lambda tokens_BnS: tokenizer.quantize.embedding(tokens_BnS[..., 0].flip(1))


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "ignored condition": of_system(ignore_class),
    "ignored mask": of_system(ignore_order),
    "forgotten cache": of_system(forget_scales),
    "no residual": of_system(add_nothing),
    "wrong order": reverse_order,
    "swapped guidance": of_system(swap_guidance),
}
