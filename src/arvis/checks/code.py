"""Two VARs of unequal size draw digits together: both learned on one tokenizer, then specialised, in some minutes.

The claims: a model that hands over to itself draws what it draws alone; the refiner's one pass over what was drafted is
its own walk there; the first scales follow the drafter's law and the last the refiner's; on the fine scales the small
model is nearly as good as the large one, with a fraction of its cache; classes are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean
from arvis.checks.digits import CLASSES, Digits, digits, learn_pictures, learn_tokens, recognised
from arvis.checks.mutants import forget_scales, ignore_class, ignore_order, zero_head
from arvis.noise import Noise
from arvis.state import State
from arvis.systems.code import (
    PRESETS,
    CodeSampling,
    Collaborative,
    build,
    collaborate,
    distilled,
    official,
)
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import Pin
from arvis.training.fit_config import FitConfig
from arvis.walk import finish, generate, walk

MODELS = official(8).drafter.module
"""The system of the published models."""

HANDOVER = 2
"""Of four scales: 5 tokens are drafted, 25 refined."""

PARAMETERS = {"drafter": 2_010_020_356, "refiner": 310_283_520}
"""Of the official transformers."""


@dataclass
class Trained:
    """The pair, and the large model as it was before it became a drafter."""

    pair: Collaborative
    large: Any
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer, of the large model, and of each of the three specialised trainings."""

    tokenizer: int = 450
    large: int = 300
    distilled: int = 260
    specialised: int = 60


def config() -> Any:
    """The large model: 32x32 pixels, 4x4 cells at the last of four scales: 30 tokens."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=16)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=64, z_channels=16, cnn=cnn)
    return MODELS.CONFIG(tokenizer=tokenizer, depth=4, width=128, heads=4, num_classes=CLASSES)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, large model; the small one by distillation, on all scales, then on its own; the drafter on its own."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = MODELS.build(config())
        small = MODELS.build(replace(config(), depth=2, width=96, heads=3))
    small.tokenizer = large.tokenizer
    learn_pictures(large.tokenizer, data, length.tokenizer, on_step)
    tokens, layout = large.tokenizer.encode(data.images), large.tokenizer.layout()

    def learn(model: Any, loss: Callable[[dict[str, Any], Noise], dict[str, Tensor]], steps: int, lr: float) -> None:
        fit = FitConfig(steps=steps, batch=64, lr=lr, schedule="constant", precision="float32")
        learn_tokens(model.transformer, loss, tokens, data, fit, on_step)
        model.eval()

    def distilling(first: int) -> Callable[[dict[str, Any], Noise], dict[str, Tensor]]:
        def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
            null_B = noise.uniform("drop", 0, ()) < large.label_drop
            cond = small.prepare(batch)
            return {"loss": distilled(small, large, batch["tokens"], cond, null_B, first, layout).mean()}

        return loss

    learn(large, large.loss, length.large, 2e-3)
    learn(small, distilling(0), length.distilled, 3e-3)
    learn(small, distilling(HANDOVER), length.specialised, 1e-3)
    drafter = copy.deepcopy(large)
    drafter.tokenizer = large.tokenizer
    learn(drafter, lambda b, noise: drafter.loss({**b, "levels": HANDOVER}, noise), length.specialised, 3e-4)
    return Trained(collaborate(drafter, small, HANDOVER).eval(), large, data)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's four conditions, in its order; then what is drawn, and the official sizes."""
    pair, data = trained.pair, trained.digits
    return [
        alone(trained.large),
        prefilled(pair),
        fine(trained),
        saved(trained),
        *followed(pair),
        *recognised(pair, data, CodeSampling(cfg_scale=2.0, top_k=(0,), top_p=0.95, temperature=(1.0,)), 0.85, seed=6),
        *parameters(),
    ]


def alone(large: Any) -> Claim:
    """Tokens of the large model with itself at every hand-over, greedy and drawn, against its own."""
    cond, equal = large.prepare({"class_labels": torch.arange(CLASSES)}), []
    for temperature in (0.0, 1.0):
        sampling = large.Sampling(cfg_scale=2.0, top_p=0.9, temperature=temperature)
        plain = finish(generate(large, cond, sampling, Noise.of(2, CLASSES))).tokens
        for n in range(1, large.tokenizer.layout().K):
            s = finish(generate(collaborate(large, large, n), cond, sampling, Noise.of(2, CLASSES)))
            equal.append(mean(s.tokens == plain))
    return exactly("least share of tokens that a model with itself draws as alone", min(equal), 1.0)


def prefilled(pair: Any) -> Claim:
    """Logits of the first refined scale after the hand-over, against the refiner's own walk there and its one pass."""
    cond, sampling = pair.prepare({"class_labels": torch.arange(2 * CLASSES) % CLASSES}), CodeSampling.plain()
    s, drawn = pair.start(cond, sampling, Noise.of(3, 2 * CLASSES)), []
    while s.at() < HANDOVER:
        d = pair.predict(s)
        drawn.append(d.sample(s.noise))
        pair.commit(s, d, drawn[-1])
    refiner = pair.models["refiner"]
    own = refiner.start(cond, refiner.Sampling.plain(), Noise.of(3, 2 * CLASSES))
    for x in drawn:
        refiner.commit(own, refiner.predict(own), x)
    found, span = pair.predict(s).logits, s.layout.span(HANDOVER)
    tokens = torch.cat((*drawn, s.tokens[:, s.layout.offsets[HANDOVER] :]), 1)
    others = refiner.predict(own).logits, refiner.teacher(tokens, cond).logits[:, span]
    gap = max(float((found - other).abs().max()) for other in others)
    return at_most("largest difference of logits after the hand-over, a walk and one pass of the refiner", gap, 1e-4)


def fine(trained: Trained) -> Claim:
    """Test digits' fine scales, given the true coarse ones, under the pair and under the large model."""
    pair, data, layout = trained.pair, trained.digits, trained.pair.tokenizer.layout()
    tokens = pair.tokenizer.encode(data.test_images)
    cond = pair.prepare({"class_labels": data.test_labels})
    small, large = (
        -mean(m.teacher(tokens, cond).log_prob(tokens)[:, layout.offsets[HANDOVER] :]) for m in (pair, trained.large)
    )
    return at_most("nats of the fine scales, as a part of the large model's", small / large, 1.1)


def saved(trained: Trained) -> Claim:
    """Peak bytes of keys and values while one picture is drawn, against the large model alone."""

    def peak(system: Any, sampling: Any) -> int:
        s, most = system.start(system.prepare({"class_labels": [0]}), sampling, Noise.of(0, 1)), 0
        for _ in walk(system, s):
            most = max(most, sum(x.nbytes for c in s.cache.values() for x in (*c.k.values(), *c.v.values())))
        return most

    pair, large = trained.pair, trained.large
    part = peak(pair, CodeSampling(cfg_scale=2.0, temperature=(1.0,))) / peak(large, large.Sampling(cfg_scale=2.0))
    return at_least("part of the large model's cache that is saved", 1 - part, 0.35)


def followed(pair: Collaborative, draws: int = 4000) -> list[Claim]:
    """p-values of chi-square: the first token under the drafter's law, one of the last scale under the refiner's."""
    layout, claims = pair.tokenizer.layout(), []
    cond, one = ({"class_labels": torch.full((n,), 3)} for n in (draws, 1))
    some = finish(generate(pair, one, CodeSampling.plain(), Noise.of(4, 1))).tokens
    for name, known in (("drafter", 0), ("refiner", layout.offsets[-2])):
        given = Pin(torch.arange(layout.n)[None].expand(draws, -1) < known, some.expand(draws, -1, -1))
        s = pair.start(cond, CodeSampling.plain(), Noise.of(5, draws), given=given)
        d: Any = pair.predict(s)
        counts = torch.bincount(d.sample(s.noise)[:, 0, 0], minlength=d.logits.shape[-1])
        probs = pair.models[name].teacher(some, one).probs[0, known, 0]
        claims.append(at_least(f"p-value of what is drawn under the {name}'s law", _chi_square(counts, probs), 0.001))
    return claims


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    with torch.device("meta"):
        parts = build(PRESETS["code-8"].config()).parts()
    counts = {name: sum(p.numel() for p in parts[name].parameters()) for name in PARAMETERS}
    return tuple(exactly(f"parameters of the {name}", counts[name], wanted) for name, wanted in PARAMETERS.items())


def _chi_square(counts: Tensor, probs: Tensor) -> float:
    """Pearson's test; codes of an expected count below 5 are one."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


# -- broken on purpose ------------------------------------------------------------------------------------------------


def ignore_classes(trained: Trained) -> None:
    """Neither model knows the class."""
    for name in ("drafter", "refiner"):
        ignore_class(trained.pair, f"{name}.conditioner")


def forget_draft(trained: Trained) -> None:
    """The refiner is told that every drafted code was the first."""
    pair = trained.pair
    whole = pair._handed_over

    def lost(s: State) -> State:
        if s.then is not None and s.at() >= HANDOVER:
            s.tokens = torch.zeros_like(s.tokens)
        return whole(s)

    pair._handed_over = lost


def never_hand_over(trained: Trained) -> None:
    """The drafter draws all scales."""

    def kept(s: State) -> State:
        s.then = None
        for held in s.cache.values():
            held.reserve(s.layout.offsets[-2])
        return s

    pair = trained.pair
    pair._handed_over = kept
    pair._turn = lambda s: 0


def swap(trained: Trained) -> None:
    """The small model drafts, the large one refines."""
    pair = trained.pair
    pair._models.reverse()
    pair._names = pair._names[::-1]


MUTANTS = {
    "zeroed refiner": lambda trained: zero_head(trained.pair, "refiner.head.linear"),
    "ignored condition": ignore_classes,
    "ignored mask": lambda trained: ignore_order(trained.pair.models["refiner"]),
    "forgotten cache": lambda trained: forget_scales(trained.pair.models["refiner"]),
    "forgotten draft": forget_draft,
    "no hand-over": never_hand_over,
    "swapped models": swap,
}
