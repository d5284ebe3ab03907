"""VARiant learns to draw the late scales of digits with two of its eight layers, some minutes on one core.

The claims: all layers, or no late scale, is the base bit for bit; sampling with the cache is the model in one pass at a
depth; late scales never touch the layers that they skip, which keep nothing of them; the progressive training closes
much of the gap between two layers and eight, and its first stage leaves the whole network as good as it was.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly
from arvis.checks.digits import CLASSES, Digits, digits, learn_pictures, learn_tokens
from arvis.checks.mutants import ignore_class, of_system, zero_head
from arvis.checks.var import config as scale_config
from arvis.noise import Noise
from arvis.systems.variant import ProgressConfig, Variant, VariantConfig, build
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.training.fit_config import FitConfig

WHOLE, FULL, FEW = 8, 2, 2
"""Layers, scales that pass all of them, and layers that the others pass."""


@dataclass
class Trained:
    """The supernet; and nats per token of late scales of test digits on the way: of two layers and of the whole network
    before the progressive training, and of the whole network after its first stage."""

    system: Any
    digits: Digits
    few_before: float
    whole_before: float
    whole_joint: float


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer, of the whole network, and of the progressive training."""

    tokenizer: int = 400
    transformer: int = 250
    progressive: int = 200


def config() -> VariantConfig:
    """32x32 pixels, 4x4 cells at the last of four scales: 30 tokens, 25 of them late."""
    patch = PatchConfig(patch=8, grid=(4, 4), z_channels=16, width=64, encoder_depth=1, decoder_depth=1)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=128, z_channels=16, patch=patch)
    scale = replace(scale_config(), tokenizer=tokenizer, depth=WHOLE, width=96, adaln_init=0.1)
    return VariantConfig(scale=scale, full_scales=FULL, depth=FEW, progress=ProgressConfig(whole=0.3))


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, whole network, then whole and sub-networks in turn."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
    learn_pictures(system.base.tokenizer, data, length.tokenizer, on_step)
    tokens = system.base.tokenizer.encode(data.images)
    fit = FitConfig(steps=length.transformer, batch=64, lr=2e-3, schedule="constant", precision="float32")
    learn_tokens(system.base.transformer, system.base.loss, tokens, data, fit, on_step)
    out = Trained(system, data, late_nats(system, data, FEW), late_nats(system, data, 0), 0.0)
    joint, done = int(length.progressive * system.progress.joint), [0]

    def on_update() -> None:
        on_step()
        done[0] += 1
        if done[0] == joint:
            out.whole_joint = late_nats(system, data, 0)

    fit = replace(fit, steps=length.progressive, lr=1e-3)
    learn_tokens(system.base.transformer, system.loss, tokens, data, fit, on_update)
    system.eval()
    return out


@torch.no_grad()
def late_nats(system: Variant, data: Digits, depth: int) -> float:
    """Nats per token of the late scales of test digits at a depth."""
    tokens = system.base.tokenizer.encode(data.test_images)
    d = system.at(_settings(system, depth)).teacher(tokens, system.prepare({"class_labels": data.test_labels}))
    late = system.base.tokenizer.layout().offsets[FULL]
    return -float(d.log_prob(tokens)[:, late:].double().mean())


def _settings(system: Variant, depth: int, full_scales: int = FULL) -> Any:
    return replace(system.Sampling.plain(), depth=depth, full_scales=full_scales)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    system, data = trained.system, trained.digits
    return [
        *equal(system),
        cached(system),
        untouched(system),
        *kept(system),
        conditioned(system, data),
        *learned(trained),
    ]


def _walked(system: Any, sampling: Any, tokens: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits step by step along tokens, or those that are drawn; and the state at the end."""
    cond = system.prepare({"class_labels": torch.arange(CLASSES)})
    s, logits = system.start(cond, sampling, Noise.of(2, CLASSES)), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise) if tokens is None else tokens[:, s.layout.span(s.at())])
    return torch.cat(logits, 1), s


def equal(system: Variant) -> list[Claim]:
    """Largest differences from the base."""
    base, s = _walked(system.base, system.base.Sampling.plain())
    cases = {"with all layers": _settings(system, WHOLE), "without late scales": _settings(system, FEW, s.K)}
    return [
        exactly(f"largest difference from the base {name}", _gap(_walked(system, given, s.tokens)[0], base), 0)
        for name, given in cases.items()
    ]


def cached(system: Variant) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one pass over the same tokens."""
    sampling = _settings(system, FEW)
    logits, s = _walked(system, sampling)
    one_pass = system.at(sampling).teacher(s.tokens, s.cond).logits
    return at_most("largest difference of cached and one-pass logits at two layers", _gap(logits, one_pass), 1e-4)


def untouched(system: Variant) -> Claim:
    """Early scales run with clean weights; then the weights of the layers that late scales skip are no numbers."""
    system = copy.deepcopy(system)
    tokens = torch.zeros(CLASSES, system.base.tokenizer.layout().n, 1, dtype=torch.int64)
    s, lost = system.start(None, _settings(system, FEW), Noise.of(2, CLASSES)), 0
    while not bool(s.done.all()):
        if s.at() == FULL:
            for block in _blocks(system)[1:-1]:
                for p in block.parameters():
                    p.fill_(torch.nan)
        d: Any = system.predict(s)
        lost += int((~d.logits.isfinite()).sum())
        system.commit(s, d, tokens[:, s.layout.span(s.at())])
    return exactly("logits lost with the weights of skipped layers", lost, 0)


def kept(system: Variant) -> list[Claim]:
    """Keys and values of a guidance row after the last scale, whose rows nobody reads."""
    claims, layout, width = [], system.base.tokenizer.layout(), system.base.transformer.width
    early, rows = layout.offsets[FULL], layout.offsets[-2]
    for free, wanted in ((False, early * (WHOLE - FEW) + rows * FEW), (True, rows * FEW)):
        cache = _walked(system, replace(_settings(system, FEW), free=free))[1].cache["trunk"]
        held = sum(x[0].numel() for store in (cache.k, cache.v) for x in store.values())
        name = "keys and values that are held" + (", given up when they can be" if free else "")
        claims.append(exactly(name, held, 2 * width * wanted))
    return claims


def conditioned(system: Variant, data: Digits) -> Claim:
    """How much worse unseen digits are predicted under wrong labels, with few layers."""
    wrong = (data.test_labels + 1 + torch.arange(len(data.test_labels)) % (CLASSES - 1)) % CLASSES
    other = late_nats(system, data._replace(test_labels=wrong), FEW)
    return at_least(
        "nats per late token that a wrong class costs at two layers", other - late_nats(system, data, FEW), 0.5
    )


def learned(trained: Trained) -> list[Claim]:
    """What the progressive training gives few layers, and what it takes from the whole network."""
    few, gap = late_nats(trained.system, trained.digits, FEW), trained.few_before - trained.whole_before
    return [
        at_least("part of the gap between two layers and eight that is closed", (trained.few_before - few) / gap, 0.3),
        at_most(
            "nats per late token of the whole network after the first stage, as a part of those before",
            trained.whole_joint / trained.whole_before,
            1.05,
        ),
    ]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _blocks(system: Variant) -> list[nn.Module]:
    return list(system.base.transformer.trunk.blocks)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def ignore_depth(trained: Trained) -> None:
    """Late scales pass all layers, whatever is asked for."""
    system = trained.system
    system.layers = lambda sampling, scales: (tuple(range(WHOLE)),) * scales


def skip_early(trained: Trained) -> None:
    """Early scales skip the layers, too."""
    system = trained.system
    layers = system.layers
    system.layers = lambda sampling, scales: (layers(sampling, scales)[-1],) * scales


def keep_nothing(trained: Trained) -> None:
    """Early scales leave no keys where late ones look for them."""
    system = trained.system
    predict = system.predict

    def forgetful(s: Any) -> Any:
        d = predict(s)
        if s.at() < FULL:
            for store in (*s.cache["trunk"].k.values(), *s.cache["trunk"].v.values()):
                store.zero_()
        return d

    system.predict = forgetful


def hold_all(trained: Trained) -> None:
    """Every layer has room for all rows."""
    system = trained.system
    start = system.start

    def roomy(*given: Any) -> Any:
        s = start(*given)
        s.cache["trunk"].limits = {}
        return s

    system.start = roomy


def pass_neighbours(trained: Trained) -> None:
    """Late scales pass the first layers, not the first and the last."""
    system = trained.system
    layers = system.layers
    system.layers = lambda sampling, scales: tuple(tuple(range(len(kept))) for kept in layers(sampling, scales))


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "ignored condition": of_system(ignore_class),
    "ignored depth": ignore_depth,
    "early scales cut short": skip_early,
    "forgotten keys": keep_nothing,
    "room for everything": hold_all,
    "neighbouring layers": pass_neighbours,
}
