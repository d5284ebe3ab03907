"""Infinity learns which emoji belongs to which caption: 96 of them, both stages, some minutes on one core.

The claims: bits are a fixed point of their codes and every scale takes something off what is left; sampling with the
cache is the model that was trained; scales see coarser scales only; labels made anew after flips make good for them;
a picture's bits are more likely under its own caption; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean, sizes
from arvis.checks.mutants import forget_scales, ignore_order, ignore_text, of_system, zero_head
from arvis.data.emoji import load_emoji
from arvis.data.images import to_network
from arvis.nn.text import TextConfig, word_ids
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.state import Cond
from arvis.systems.infinity import PRESETS, CaptionConfig, Infinity, InfinityConfig, InfinitySampling, build
from arvis.tokenizers.bits import BitPyramidConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss

PARAMETERS = {"infinity-2b": 2_204_564_032, "infinity-8b": 8_375_791_824, "infinity-125m": 125_148_800}
"""Of the official transformers."""

PICTURES = 96
WORDS = TextConfig(words=12)
CHANNELS = 64


@dataclass
class World:
    """Pictures [n, 3, 64, 64] in [-1, 1] and the features of their captions [n, T, C], of which some are words."""

    images: Tensor
    features: Tensor
    visible: Tensor

    def request(self, rows: Tensor) -> dict[str, Any]:
        return {"text_features": self.features[rows], "text_visible": self.visible[rows]}


@dataclass
class Trained:
    """What is examined."""

    system: Infinity
    world: World


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage."""

    tokenizer: int = 1600
    transformer: int = 150


@cache
def world(pictures: int = PICTURES) -> World:
    """Emoji of the training split; a caption is read by a frozen encoder: fixed random vectors of pieces of words."""
    emoji = load_emoji(64).split("train")
    rows = Noise.of(0).uniform("pictures", 0, (len(emoji),))[0].argsort()[:pictures]
    ids = word_ids([emoji.rows[i].name for i in rows.tolist()], WORDS)
    table = torch.randn(WORDS.buckets, CHANNELS, generator=torch.Generator().manual_seed(0))
    features = (table[ids] * (ids > 0)[..., None]).sum(2)
    return World(to_network(emoji.all_images()[rows]), features, ids[..., 0] > 0)


def config() -> InfinityConfig:
    """64x64 pixels, 8x8 cells at the last of four scales: 85 tokens of 12 bits."""
    patch = PatchConfig(z_channels=12, width=128, encoder_depth=1, decoder_depth=1)
    return InfinityConfig(
        tokenizer=BitPyramidConfig(bits=12, scales=tuple((n, n) for n in (1, 2, 4, 8)), patch=patch),
        depth=4,
        width=128,
        heads=4,
        caption=CaptionConfig(channels=CHANNELS, length=WORDS.words),
        pool_heads=4,
        flip_strength=0.2,
        gate_init=0.1,
        modulation_init=0.5,
    )


def train(on_step: OnStep, length: Length = Length(), data: World | None = None) -> Trained:
    """Tokenizer, then transformer, in run folders that are gone afterwards."""
    data = world() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        _train_tokenizer(system, data, length.tokenizer, Path(folder) / "tokenizer", on_step)
        _train_transformer(system, data, length.transformer, Path(folder) / "transformer", on_step)
    return Trained(system.eval(), data)


def _train_tokenizer(system: Infinity, data: World, steps: int, run: Path, on_step: OnStep) -> None:
    tokenizer, terms = system.tokenizer, TokenizerLossConfig(l1=0.0, l2=4.0, revive_every=0)
    fit(
        tokenizer,
        lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms),
        lambda step: {"image": data.images[_rows(step, 16, data)]},
        FitConfig(
            steps=steps, batch=16, lr=3e-3, warmup=20, schedule="cosine", clip=1.0, muon=("grid",), precision="float32"
        ),
        run,
        on_step=lambda info: on_step(),
    )
    tokenizer.eval().requires_grad_(False)


def _train_transformer(system: Infinity, data: World, steps: int, run: Path, on_step: OnStep) -> None:
    stored = system.latents(data.images)["features"]

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(step, 32, data)
        return {"features": stored[rows], **data.request(rows)}

    fit(
        system.transformer,
        system.loss,
        batch,
        FitConfig(steps=steps, batch=32, lr=3e-3, warmup=20, schedule="cosine", muon=("trunk",), precision="float32"),
        run,
        on_step=lambda info: on_step(),
    )


def _rows(step: int, batch: int, data: World) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order."""
    system, data = trained.system, trained.world
    rows = torch.arange(min(64, len(data.images)))
    f = system.tokenizer.features(data.images[rows])
    cond = system.prepare(data.request(rows))
    return [
        *quantised(system, f),
        cached(system, cond),
        *masked(system, f[:8], {name: x[:8] for name, x in cond.items()}),
        corrected(system, f, data.images[rows]),
        captioned(system, f, cond),
        *parameters(),
    ]


def quantised(system: Infinity, f: Tensor) -> list[Claim]:
    """Codes code themselves; the features that are left get fewer from scale to scale."""
    tokenizer, layout = system.tokenizer, system.tokenizer.layout()
    tokens = tokenizer.corrected(f, layout)[0]
    code = tokenizer.quantize.codes(tokens[:, layout.span(3)])
    again = tokenizer.quantize.encode(code)
    left = torch.stack([(f - fhat).flatten(1).norm(dim=1) for fhat in tokenizer.fhats(tokens, layout)])
    left = torch.cat((f.flatten(1).norm(dim=1)[None], left))
    return [
        exactly("share of bits that are those of their own code", mean(again == tokens[:, layout.span(3)]), 1.0),
        at_least("share of scales that take something off what is left", mean(left[1:] < left[:-1]), 0.9),
    ]


def cached(system: Infinity, cond: Cond) -> Claim:
    """Logits of sampled bits, step by step over the cache, against one masked pass over the same bits."""
    items = len(cond["text"])
    s, logits = system.start(cond, InfinitySampling.plain(), Noise.of(2, items)), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise))
    gap = (torch.cat(logits, 1) - system.teacher(s.tokens, cond).logits).abs().max()
    return at_most("largest difference of cached and one-pass logits", float(gap), 1e-4)


def masked(system: Infinity, f: Tensor, cond: Cond) -> list[Claim]:
    """Other inputs of a scale change its logits and those of finer scales, and no coarser ones."""
    layout = system.tokenizer.layout()
    x = system.tokenizer.corrected(f, layout)[1]
    c = system.transformer.conditioner(cond, torch.zeros(len(f), dtype=torch.bool))
    scales = range(1, layout.K)
    before, coarser, finer = system.one_pass(x, c, layout, scales, system.see).logits, 0.0, []
    for k in range(1, layout.K):
        other = x.clone()
        other[:, layout.offsets[k] - 1 : layout.offsets[k + 1] - 1].neg_()
        moved = (system.one_pass(other, c, layout, scales, system.see).logits - before).abs().amax((0, 2, 3))
        coarser = max(coarser, float(moved[: layout.offsets[k]].max()))
        finer += [float(moved[layout.span(j)].max()) for j in range(k, layout.K)]
    return [
        exactly("change of coarser logits by the inputs of a scale", coarser, 0.0),
        at_least("least change of its own and finer logits", min(finer), 1e-3),
    ]


def corrected(system: Infinity, f: Tensor, images: Tensor) -> Claim:
    """Pictures of bits of which 20 % are flipped in the coarser half of the scales, the finer ones made anew or not."""
    tokenizer, layout = system.tokenizer, system.tokenizer.layout()
    flips = Noise.of(4, len(f)).uniform("flip", 0, (layout.n, system.space.S)) < 0.2
    flips[:, layout.offsets[layout.K // 2] :] = False
    anew, fixed = tokenizer.corrected(f, layout, flips)[0], tokenizer.corrected(f, layout)[0]
    shown = [_psnr(tokenizer.decode(bits ^ flips, layout), images) for bits in (anew, fixed)]
    return at_least("dB by which labels made anew after flips are better than fixed ones", shown[0] - shown[1], 3.0)


def captioned(system: Infinity, f: Tensor, cond: Cond) -> Claim:
    """How much less surprising bits are under their own caption than under another picture's."""
    tokens = system.tokenizer.corrected(f, system.tokenizer.layout())[0]
    shuffled = {name: x.roll(1, 0) for name, x in cond.items()}
    own, other = (-mean(system.teacher(tokens, c).log_prob(tokens)) for c in (cond, shuffled))
    return at_least("part of the nats of a wrong caption that the right one saves", 1 - own / other, 0.02)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


def _psnr(images: Tensor, wanted: Tensor) -> float:
    return mean(10 * (4 / (images - wanted).square().mean((1, 2, 3))).log10())


# -- broken on purpose ------------------------------------------------------------------------------------------------


def reverse_outcomes(trained: Trained) -> None:
    """The logit of bit 0 is taken for that of bit 1."""
    for name in ("weight", "bias"):
        head = trained.system.get_parameter(f"transformer.head.linear.{name}").data
        head.copy_(head.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))


def forget_scale(trained: Trained) -> None:
    """While sampling, every scale has the positions of the first cells."""
    system, trunk = trained.system, trained.system.transformer.trunk
    forward = trunk.forward

    def misplaced(x_RD: Tensor, call: Call, layers: Sequence[int] | None = None) -> Tensor:
        if call.cache is not None:
            call.table = system.transformer.table(system.tokenizer.layout())[:, : x_RD.shape[1]]
        return forward(x_RD, call, layers)

    trunk.forward = misplaced


def keep_labels(trained: Trained) -> None:
    """Labels are the tokens, whatever was flipped."""
    tokenizer = trained.system.tokenizer
    whole = tokenizer.corrected
    tokenizer.corrected = lambda f, layout, flips_BNS=None: whole(f, layout)


def drop_residual(trained: Trained) -> None:
    """Every scale codes the whole again."""
    tokenizer = trained.system.tokenizer
    tokenizer.accumulate = lambda f, tokens_BnS, k, layout: (
        f - type(tokenizer).accumulate(tokenizer, torch.zeros_like(f), tokens_BnS, k, layout)
    )


def invert_codes(trained: Trained) -> None:
    """A bit stands for the opposite sign."""
    quantize = trained.system.tokenizer.quantize
    quantize.codes = lambda tokens: -type(quantize).codes(quantize, tokens)


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "reversed outcomes": reverse_outcomes,
    "ignored text": of_system(ignore_text),
    "ignored mask": of_system(ignore_order),
    "forgotten cache": of_system(forget_scales),
    "forgotten scale": forget_scale,
    "kept labels": keep_labels,
    "no residual": drop_residual,
    "inverted codes": invert_codes,
}
