"""STAR draws digits that it is told in words, and its sampler learns that tokens belong together, in minutes.

The claims: equal places of two scales have equal positions; sampling with the cache is the model that was trained; a
scale that is drawn in steps places each token once; tokens that are all alike, whatever they are, are drawn alike in
steps and not at once; the words are what is drawn; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean, sizes
from arvis.checks.digits import CLASSES, Digits, digits, learn_pictures, learn_tokens
from arvis.checks.mutants import forget_scales, ignore_text, of_system, zero_head
from arvis.nn.attention import rotate
from arvis.nn.rotary_scales import normalised_table
from arvis.nn.text import TextConfig
from arvis.noise import Noise
from arvis.reveal import Revealed
from arvis.systems.star import PRESETS, STAR, Inside, STARConfig, STARSampling, build
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import pyramid
from arvis.training.fit import fit
from arvis.training.fit_config import FitConfig
from arvis.walk import finish, generate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PARAMETERS = {
    "star-256-d16": 274_934_272,
    "star-256-d30": 1_678_731_016,
    "star-512-d30": 1_678_731_016,
    "star-1024-d30": 1_678_738_696,
    "star-1024-d30-sampler": 1_828_798_562,
}
"""Of the official transformers."""

TEXT = TextConfig(buckets=256, words=2, pieces=6, width=64, depth=1, heads=2)


@dataclass
class Trained:
    """What is examined: a model of digits, and one of patterns."""

    system: STAR
    alike: STAR
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer, of the transformer with its sampler, and of the model of patterns."""

    tokenizer: int = 260
    transformer: int = 220
    patterns: int = 700


def config() -> STARConfig:
    """32x32 pixels, 4x4 cells at the last of four scales: 30 tokens, of which the sampler draws the last 25."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=16)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=128, z_channels=16, cnn=cnn)
    return STARConfig(tokenizer=tokenizer, depth=4, width=128, heads=4, text=TEXT, sampler_from=2, sampler_blocks=2)


def pattern_config() -> STARConfig:
    """The same scales with 16 codes, a small transformer, and no pictures."""
    patch = PatchConfig(grid=(4, 4), z_channels=16, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=16, z_channels=16, patch=patch)
    return STARConfig(tokenizer=tokenizer, depth=2, width=64, heads=4, text=TEXT, sampler_from=3, sampler_blocks=2)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, then transformer and sampler at once; and a model of patterns."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
    learn_pictures(system.tokenizer, data, length.tokenizer, on_step)
    learn_tokens(
        system.transformer,
        lambda batch, noise: system.loss({**batch, "prompt": told(batch["class_labels"])}, noise),
        system.tokenizer.encode(data.images),
        data,
        FitConfig(steps=length.transformer, batch=64, lr=2e-3, schedule="constant", precision="float32"),
        on_step,
    )
    return Trained(system.eval(), learn_patterns(length.patterns, on_step), data)


def told(labels: Tensor) -> list[str]:
    """The digits in words; what is no digit is not told."""
    return [NAMES[y] if y < CLASSES else "" for y in labels.tolist()]


def learn_patterns(steps: int, on_step: OnStep) -> STAR:
    """A model of pictures whose last scale has one code everywhere, of which the coarser scales say nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(pattern_config())
        torch.nn.init.normal_(system.tokenizer.quantize.embedding.weight)
    system.tokenizer.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        fit(
            system.transformer,
            system.loss,
            lambda step: {"tokens": patterns(system, 64, step), "prompt": [""] * 64},
            FitConfig(steps=steps, batch=64, lr=2e-3, warmup=20, schedule="cosine", precision="float32"),
            Path(folder) / "run",
            on_step=lambda info: on_step(),
        )
    return system.eval()


def patterns(system: STAR, items: int, seed: int) -> Tensor:
    """Tokens [B, N, 1]: random codes, and one for all of the last scale."""
    layout, noise = system.transformer.layout, Noise.of(seed, items)
    tokens = (noise.uniform("codes", 0, (layout.n, 1)) * system.space.sizes[0]).long()
    last = layout.span(layout.K - 1)
    tokens[:, last] = tokens[:, last][:, :1]
    return tokens


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order; and that digits are recognised."""
    system, data = trained.system, trained.digits
    return [
        placed_alike(system),
        cached(system),
        placed_once(system),
        *drawn_alike(trained.alike),
        worded(system, data),
        *recognised(system, data),
        *parameters(),
    ]


def placed_alike(system: STAR) -> Claim:
    """Products of equal queries and keys within a scale and within the finer one whose every second cell lies there."""
    layout, table = system.transformer.layout, system.transformer.table
    products = []
    for k, stride in ((1, 1), (2, 2)):
        cells = table[:, layout.span(k)].unflatten(1, layout.levels[k])[:, ::stride, ::stride].flatten(1, 2)
        q = rotate(torch.ones(1, 1, cells.shape[1], 2 * cells.shape[2]), cells, "interleaved")
        products.append(q @ q.mT)
    gap = (products[0] - products[1]).abs().max()
    return at_most("largest difference of attention between equal places of scales 2 and 3", float(gap), 1e-3)


def cached(system: STAR) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one masked pass over the same tokens."""
    cond = system.prepare({"prompt": NAMES * 2})
    s, logits = system.start(cond, STARSampling.plain(), Noise.of(2, 2 * CLASSES)), []
    while not bool(s.done.all()):
        d: Any = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise))
    one_pass: Any = system.teacher(s.tokens, cond)
    gap = (torch.cat(logits, 1) - one_pass.logits).abs().max()
    return at_most("largest difference of cached and one-pass logits", float(gap), 1e-4)


def placed_once(system: STAR) -> Claim:
    """How often the tokens of a scale are placed: in each step those that were not there and are."""
    s, wrong = system.start(system.prepare({"prompt": NAMES}), STARSampling(inside="stable"), Noise.of(2, CLASSES)), 0
    while not bool(s.done.all()):
        d, seen = system.predict(s), []
        if isinstance(d, Revealed):
            law = d.law
            d.law = lambda x, known, step, law=law, seen=seen: (seen.append((x, known)), law(x, known, step))[1]
        x = d.sample(s.noise)
        for x0, known in seen:
            wrong += int((x0 != x)[known].sum())  # placed, and changed later
        for (_, before), (_, after) in pairwise(seen):
            wrong += int((before & ~after).sum() + (after == before).all(1).sum())  # taken away; nothing placed
        system.commit(s, d, x)
    return exactly("tokens of scales drawn in steps that are not placed once, or steps that place none", wrong, 0)


def drawn_alike(system: STAR, items: int = 200) -> list[Claim]:
    """The share of drawn patterns whose last scale has one code, drawn at once and in steps."""
    at_once, in_steps = (alike(system, inside, items) for inside in ("independent", "stable"))
    return [
        at_most("share of patterns that are alike everywhere, drawn at once", at_once, 0.2),
        at_least("the same drawn in steps", in_steps, 0.8),
    ]


def alike(system: STAR, inside: Inside, items: int) -> float:
    """The share of drawn last scales that have one code."""
    sampling = STARSampling(cfg_scale=0.0, top_k=0, top_p=0.0, inside=inside)
    cond = system.prepare({"prompt": [""] * items})
    tokens = finish(generate(system, cond, sampling, Noise.of(4, items))).tokens
    last = tokens[:, system.transformer.layout.span(system.transformer.layout.K - 1), 0]
    return mean((last == last[:, :1]).all(1))


def worded(system: STAR, data: Digits) -> Claim:
    """How much worse unseen digits are predicted under wrong words."""
    tokens, labels = system.tokenizer.encode(data.test_images), data.test_labels
    wrong = (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES
    right, other = (
        -mean(system.teacher(tokens, system.prepare({"prompt": told(y)})).log_prob(tokens)) for y in (labels, wrong)
    )
    return at_least("nats per token that a wrong word costs on test digits", other - right, 0.5)


def recognised(system: STAR, data: Digits, each: int = 20) -> list[Claim]:
    """Digits drawn in steps are taken for what was told by their nearest real neighbours, and untold are not."""
    labels = torch.arange(CLASSES).repeat(each)
    found = [drawn(system, data, labels, words, "stable") for words in (told(labels), [""] * len(labels))]
    return [
        at_least("share of drawn digits recognised as the word", found[0], 0.75),
        at_most("share recognised as that digit when none was told", found[1], 0.25),
    ]


def drawn(system: STAR, data: Digits, labels: Tensor, words: Sequence[str], inside: Inside) -> float:
    """The share of digits drawn under some words that are recognised as labels."""
    sampling = STARSampling(cfg_scale=2.0, top_k=0, top_p=0.95, inside=inside)
    cond = system.prepare({"prompt": list(words)})
    tokens = finish(generate(system, cond, sampling, Noise.of(3, len(labels)))).tokens
    return data.recognised(system.tokenizer.decode(tokens), labels)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def count_cells(trained: Trained) -> None:
    """Positions are numbers of cells, in every scale from 0 to its own end."""
    t = trained.system.transformer
    dim = 2 * t.table.shape[2]
    t.table = normalised_table(pyramid((1, 2, 3, 4)), dim, 10000.0, -1.0)


def see_nothing(trained: Trained) -> None:
    """The sampler is not shown what is placed."""
    transformer: Any = trained.alike.transformer
    stable = transformer.stable
    transformer.stable = lambda h, placed, *rest: stable(h, torch.zeros_like(placed), *rest)


def place_at_once(trained: Trained) -> None:
    """All tokens are placed in the first step."""
    system: Any = trained.alike
    predict = system.predict

    def at_once(s: Any) -> Any:
        d = predict(s)
        if isinstance(d, Revealed):
            d.plan = d.plan._replace(steps=1)
        return d

    system.predict = at_once


def draw_again(trained: Trained) -> None:
    """Each step draws what is placed once more."""
    system: Any = trained.system
    predict = system.predict

    def again(s: Any) -> Any:
        d = predict(s)
        if isinstance(d, Revealed):
            sample = d.sample
            d.sample = lambda noise, pin=None, watch=None: sample(noise, pin, watch).flip(1)
        return d

    system.predict = again


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "ignored words": of_system(ignore_text),
    "forgotten cache": of_system(forget_scales),
    "counted cells": count_cells,
    "sampler that sees nothing": see_nothing,
    "one step": place_at_once,
    "tokens drawn again": draw_again,
}
