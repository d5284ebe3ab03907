"""FlexVAR learns to draw digits on random lists of scales, and then draws them on lists it has never seen.

The claims: with the same weights any list runs, and sampling with the cache is the model that was trained; a scale by
itself is a picture; likelihoods hold on longer lists than any in training; the scale before is read; the class is what
is drawn, at unseen numbers of steps and an unseen size; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, mean, sizes
from arvis.checks.digits import CLASSES, Digits, digits
from arvis.checks.mutants import forget_scales, ignore_class, ignore_order, of_system, swap_guidance, zero_head
from arvis.noise import Noise
from arvis.quant.multiscale import area, to_rows
from arvis.systems.flexvar import (
    PRESETS,
    FlexVAR,
    FlexVARConfig,
    FlexVARSampling,
    ListConfig,
    build,
)
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.resized import ResizedVQConfig
from arvis.tokens import Layout, pyramid
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate

PARAMETERS = {"flexvar-d16": 315_561_936, "flexvar-d20": 607_513_952, "flexvar-d24": 1_041_314_576}
"""Of the official transformers; the tokenizer has 72,049,827."""

SHORT, LONG, LARGE = pyramid((1, 2, 4, 8)), pyramid((1, 2, 3, 4, 5, 6, 7, 8)), pyramid((1, 2, 4, 8, 12))
"""Lists in training have at most six scales, of which the last has 8 cells a side."""
LISTS = (SHORT, pyramid((1, 2, 3, 4, 6, 8)), LONG, LARGE, Layout(((1, 1), (2, 4), (4, 8), (8, 16))))


TRIED = 100
"""Test digits whose likelihood is measured."""


@dataclass
class Trained:
    """What is examined."""

    system: FlexVAR
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage."""

    tokenizer: int = 600
    transformer: int = 400


def config() -> FlexVARConfig:
    """32x32 pixels, 8x8 cells of 128 codes at the last scale."""
    patch = PatchConfig(patch=4, z_channels=32, width=96, encoder_depth=1, decoder_depth=1)
    tokenizer = ResizedVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=128, code_width=16, least=2, patch=patch)
    lists = ListConfig(own=0.0, picks=((3, 3, 7),), last=8, gaps=(0.3, 0.6, 0.9))
    return FlexVARConfig(
        tokenizer=tokenizer,
        depth=4,
        width=128,
        heads=4,
        num_classes=CLASSES,
        grid=16,
        lists=lists,
        shared_aln=True,
        adaln_init=0.1,
    )


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer at random sizes, then transformer on random lists, in run folders that are gone afterwards."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        _train_tokenizer(system, data, length.tokenizer, Path(folder) / "tokenizer", on_step)
        learn(system, data, length.transformer, Path(folder) / "transformer", on_step)
    return Trained(system.eval(), data)


def _train_tokenizer(system: FlexVAR, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokenizer = system.tokenizer
    with torch.no_grad():
        tokenizer.init_(tokenizer.features(data.images[:256]), tokenizer.layout(), Noise.of(0))
    terms = TokenizerLossConfig(l1=0.0, l2=1.0, revive_every=20, revive_until=steps // 2)
    fit(
        tokenizer,
        lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms, updates=batch["step"]),
        lambda step: {"image": data.images[_rows(step, 32, data)]},
        FitConfig(
            steps=steps, batch=32, lr=3e-3, warmup=min(20, steps), clip=1.0, muon=("coder.grid",), precision="float32"
        ),
        run,
        on_step=lambda info: on_step(),
    )
    tokenizer.eval().requires_grad_(False)


def learn(system: FlexVAR, data: Digits, steps: int, run: Path, on_step: OnStep, first: int = 0) -> None:
    """Train the transformer by the system's own loss, from batch number `first` on."""
    features = system.latents(data.images)["features"]

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(first + step, 32, data)
        return {"features": features[rows], "class_labels": data.labels[rows]}

    fit(
        system.transformer,
        system.loss,
        batch,
        FitConfig(steps=steps, batch=32, lr=3e-3, warmup=min(20, steps), muon=("trunk",), precision="float32"),
        run,
        on_step=lambda info: on_step(),
    )


def _rows(step: int, batch: int, data: Digits) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's four conditions, in its order, and what is drawn."""
    system, data = trained.system, trained.digits
    return [
        *(cached(system, layout) for layout in LISTS),
        alone(system, data),
        unseen(system, data),
        swapped(system, data),
        *recognised(system, data),
        *parameters(),
    ]


def cached(system: FlexVAR, layout: Layout) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one masked pass over the same tokens."""
    cond = system.prepare({"class_labels": torch.arange(CLASSES)})
    s, logits = system.start(cond, FlexVARSampling.plain(), Noise.of(2, CLASSES), layout), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise))
    gap = (torch.cat(logits, 1) - system.teacher(s.tokens, cond, layout).logits).abs().max()
    sizes = " ".join(f"{h}" if h == w else f"{h}x{w}" for h, w in layout.levels)
    return at_most(f"largest difference of cached and one-pass logits on {sizes}", float(gap), 1e-4)


def alone(system: FlexVAR, data: Digits) -> Claim:
    """The picture of the scale of 4 cells by itself, against the averaged original."""
    tokenizer = system.tokenizer
    tokens = tokenizer.encode(data.test_images, SHORT)
    shown = tokenizer.reconstruct(tokenizer.codes(tokens, SHORT, 2)).clamp(-1, 1)
    error = (shown - area(data.test_images, tuple(shown.shape[2:]))).square().mean((1, 2, 3))
    return at_least("PSNR in dB of a middle scale by itself", mean(10 * (4 / error).log10()), 19.0)


def nats(system: FlexVAR, data: Digits, layout: Layout) -> Tensor:
    """Nats of every token [n, N] of some test digits on a list."""
    tokens = system.tokenizer.encode(data.test_images[:TRIED], layout)
    cond = system.prepare({"class_labels": data.test_labels[:TRIED]})
    return -system.teacher(tokens, cond, layout).log_prob(tokens)


def unseen(system: FlexVAR, data: Digits) -> Claim:
    """Nats per token of unseen digits on a list longer than any in training, against lists like those in training."""
    own = system.tokenizer.config.patch_nums
    seen = [mean(nats(system, data, pyramid(system.lists.draw(own, Noise.of(seed))))) for seed in range(4)]
    longest = mean(nats(system, data, LONG))
    return at_most(
        "nats on the longest, unseen list, as a part of those on lists of training", 4 * longest / sum(seen), 1.1
    )


def swapped(system: FlexVAR, data: Digits) -> Claim:
    """What it costs the last scale that the scale before it is another digit's."""
    layout = SHORT
    tokens = system.tokenizer.encode(data.test_images[:TRIED], layout)
    other, last = tokens.clone(), layout.span(layout.K - 1)
    other[:, layout.span(layout.K - 2)] = tokens[:, layout.span(layout.K - 2)].roll(1, 0)
    cond = system.prepare({"class_labels": data.test_labels[:TRIED]})
    right, wrong = (-mean(system.teacher(x, cond, layout).log_prob(x)[:, last]) for x in (tokens, other))
    return at_least("nats per token that another digit's scale before costs", wrong - right, 0.3)


def recognised(system: FlexVAR, data: Digits, each: int = 10) -> list[Claim]:
    """Digits drawn on unseen lists are taken for their class by their nearest real neighbours; without one are not."""
    return [
        at_least("share of digits recognised, drawn in 8 steps", drawn(system, data, LONG, each), 0.8),
        at_least("share of digits recognised, drawn in 4 steps", drawn(system, data, SHORT, each), 0.8),
        at_least("share of digits recognised, drawn half as large again", drawn(system, data, LARGE, each), 0.7),
        at_most("share recognised as a class that was not given", drawn(system, data, LONG, each, False), 0.25),
    ]


def drawn(system: FlexVAR, data: Digits, layout: Layout, each: int, given: bool = True) -> float:
    """The share of digits drawn on a list that are recognised as the class they were asked for."""
    labels = torch.arange(CLASSES).repeat(each)
    sampling = FlexVARSampling(cfg_scale=2.0, drawn=(), top_k=0, top_p=0.95)
    cond = system.prepare({"class_labels": labels if given else torch.full_like(labels, CLASSES)})
    tokens = finish(generate(system, cond, sampling, Noise.of(3, len(labels)), layout)).tokens
    images = system.tokenizer.decode(tokens, layout)
    return data.recognised(F.interpolate(images, size=data.images.shape[2:], mode="area"), labels)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def code_residuals(trained: Trained) -> None:
    """Each scale codes what the coarser ones left over."""
    tokenizer = trained.system.tokenizer

    def residuals(f: Tensor, layout: Layout) -> Tensor:
        rest, found = f, []
        for k, level in enumerate(layout.levels):
            found.append(tokenizer.quantize.encode(to_rows(area(rest, level))))
            codes = tokenizer.accumulate(f, found[-1], k, layout) * f.norm(dim=1).mean()
            rest = rest - F.interpolate(codes, size=f.shape[2:], mode="bicubic")
        return torch.cat(found, 1)

    tokenizer.tokens = residuals


def blind_input(trained: Trained) -> None:
    """The scale before is not read, while sampling and in one pass."""
    trained.system.transformer.word.weight.data.zero_()


def crop_positions(trained: Trained) -> None:
    """A scale has the first positions of the grid instead of all of it, averaged."""
    transformer = trained.system.transformer
    grid = transformer.position.data
    transformer.embed = lambda c, x_BNC, layout, first, last: (
        type(transformer).embed(transformer, c, x_BNC, layout, first, last)
        + torch.cat([to_rows(grid[:, :, :h, :w] - area(grid, (h, w))) for h, w in layout.levels[first:last]], 1)
    )


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "ignored condition": of_system(ignore_class),
    "ignored mask": of_system(ignore_order),
    "forgotten cache": of_system(forget_scales),
    "residual codes": code_residuals,
    "blind input": blind_input,
    "cropped positions": crop_positions,
    "swapped guidance": of_system(swap_guidance),
}
