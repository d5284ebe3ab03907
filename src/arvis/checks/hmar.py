"""HMAR learns to draw digits: 1,500 real ones, both stages of it, some minutes on one core.

The claims: scales are independent of each other in one pass, and seeing no other scale costs nothing that can be
measured beside VAR; the passes of a schedule draw the least sure tokens again and no others; the branch predicts hidden
tokens the better, the fewer are hidden; nothing is cached; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean, sizes
from arvis.checks.digits import CLASSES, Digits, digits, drawn, learn_pictures, learn_tokens
from arvis.checks.mutants import ignore_class, ignore_rule, look, of_system, zero_head
from arvis.checks.var import config as plain_config
from arvis.dist import Categorical
from arvis.nn import neighbourhood
from arvis.nn.adaln import masked
from arvis.nn.attention import attend
from arvis.noise import Noise
from arvis.sampling import lowest
from arvis.state import State
from arvis.systems.hmar import HMAR, PRESETS, VAR, HMARConfig, HMARSampling, Refined, Schedule, build
from arvis.training.fit_config import FitConfig
from arvis.walk import finish, generate

PARAMETERS = {
    "hmar-d16": 467_691_904,
    "hmar-d20": 845_517_872,
    "hmar-d24": 1_384_328_960,
    "hmar-d30": 2_556_324_212,
}
"""Of the official transformers, both branches."""

SCHEDULE: Schedule = ((1,), (1, 3), (1, 3, 5), (4, 12))


@dataclass
class Trained:
    """What is examined, and the nats per token on unseen digits of a VAR that learned as long."""

    system: HMAR
    rival: float
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer and of each stage."""

    tokenizer: int = 300
    scales: int = 300
    mask: int = 300


def config() -> HMARConfig:
    """VAR's digits: 30 tokens in four scales; the last two of four layers once more."""
    return HMARConfig(scale=plain_config(), mask_layers=2)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """The tokenizer; on its tokens stage 1 and a VAR; then stage 2."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
        torch.manual_seed(0)
        other = build(config())
    learn_pictures(system.tokenizer, data, length.tokenizer, on_step)
    tokens = system.tokenizer.encode(data.images)
    settings = FitConfig(steps=length.scales, batch=64, lr=2e-3, schedule="constant", precision="float32")
    rival = VAR(system.tokenizer, other.transformer.scales)
    look(rival, masked)
    system.begin_()
    for learner in (system, rival):
        learn_tokens(learner.transformer, learner.loss, tokens, data, settings, on_step)
    system.learns = "mask"
    system.transformer.requires_grad_(True)
    system.begin_()
    learn_tokens(system.transformer, system.loss, tokens, data, replace(settings, steps=length.mask), on_step)
    return Trained(system.eval(), unseen(rival.eval(), data), data)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's conditions, in its order."""
    system, data = trained.system, trained.digits
    return [
        independent(system, data),
        at_once(system),
        *redrawn(system),
        told(system, data),
        at_most("nats per token of test digits, over those of VAR", unseen(system, data) / trained.rival, 1.03),
        *economical(system),
        recognised(system, data),
        *parameters(),
    ]


def independent(system: HMAR, data: Digits) -> Claim:
    """Logits of one pass over all scales, against a pass for each scale alone."""
    layout, tokens = system.tokenizer.layout(), system.tokenizer.encode(data.test_images[:32])
    cond, scales = system.prepare({"class_labels": data.test_labels[:32]}), system.scales
    s, logits = system.start(cond, HMARSampling.plain(), Noise.of(2, 32)), []
    for k in range(layout.K):
        c = system.transformer.scales.conditioner(cond, torch.zeros(32, dtype=torch.bool))
        logits.append(system.transformer.scales.head(scales.hidden(s), c.vector))
        system.commit(s, system.predict(s), tokens[:, layout.span(k)])
    gap = (torch.cat(logits, 1) - system.teacher(tokens, cond).logits[:, :, 0]).abs().max()
    return at_most("largest difference of one-pass and scale-by-scale logits", float(gap), 1e-4)


def at_once(system: HMAR) -> Claim:
    """Rows with one entry, under the same random numbers as next-scale prediction without a branch."""
    noise, cond = Noise.of(4, CLASSES), system.prepare({"class_labels": torch.arange(CLASSES)})
    rows = tuple((n,) for n in system.tokenizer.layout().sizes)
    mine = finish(generate(system, cond, HMARSampling(schedule=rows), noise)).tokens
    plain = finish(generate(system.scales, cond, HMARSampling(), noise)).tokens
    return exactly("share of tokens that one-entry rows draw as next-scale prediction does", mean(mine == plain), 1)


def redrawn(system: HMAR) -> list[Claim]:
    """Of every further pass: the tokens it hides against the least sure ones, the others against themselves."""
    cond = system.prepare({"class_labels": torch.arange(2 * CLASSES) % CLASSES})
    s, wrong, changed, kept = system.start(cond, HMARSampling(schedule=SCHEDULE), Noise.of(5, 2 * CLASSES)), 0, 0, 0
    while not bool(s.done.all()):
        k, d = s.at(), system.predict(s)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        if isinstance(d, Refined):
            d = replace(d, again=_noting(d, seen))
        out = d.sample(s.noise)
        before = torch.ones_like(out[..., 0], dtype=torch.bool)
        sure = d.logits.softmax(-1) if isinstance(d, Refined) else torch.empty(0)
        for i, (x, hidden, logits) in enumerate(seen):
            least = lowest(
                sure.gather(-1, x[..., None])[:, :, 0, 0].masked_fill(~before, 9.0), sum(SCHEDULE[k][i + 1 :])
            )
            following = seen[i + 1][0] if i + 1 < len(seen) else out
            wrong += int((hidden != least).sum())
            kept += int((following != x)[~hidden].sum())
            changed += int((following != x)[hidden].sum())
            before, sure = hidden, logits.softmax(-1)
        system.commit(s, d, out)
    return [
        exactly("tokens hidden that are not the least sure, or the other way round", wrong, 0),
        exactly("tokens changed that were not hidden", kept, 0),
        at_least("tokens changed by drawing them again", changed, 1),
    ]


def _noting(d: Refined, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    """The further passes of a distribution, with tokens, what is hidden and logits noted."""

    def again(x: Tensor, hidden: Tensor) -> Tensor:
        seen.append((x, hidden, d.again(x, hidden)))
        return seen[-1][2]

    return again


def told(system: HMAR, data: Digits, draws: int = 4) -> Claim:
    """Nats of the same hidden tokens of unseen digits, a quarter of each scale: where all others are hidden, too, minus
    where the others are told."""
    tokens, count = system.tokenizer.encode(data.test_images), len(data.test_images)
    cond = system.prepare({"class_labels": data.test_labels})
    c = system.transformer.scales.conditioner(cond, torch.zeros(count, dtype=torch.bool))
    alone, gain = system.masked_pass(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool), c), 0.0
    for draw in range(draws):
        hidden = system.hidden(Noise.of(6 + draw, count), torch.full((count,), 0.25))
        logits = system.masked_pass(tokens, hidden, c)
        without, within = (float(system.hidden_nats(x, tokens, hidden)[0]) for x in (alone, logits))
        gain += (without - within) / draws
    return at_least("nats that the other tokens of its scale take off a hidden one, a quarter being hidden", gain, 0.03)


def unseen(system: HMAR | VAR, data: Digits) -> float:
    """Nats per token of test digits under their labels, every scale drawn at once."""
    with torch.no_grad():
        tokens = system.tokenizer.encode(data.test_images)
        cond = system.prepare({"class_labels": data.test_labels})
        return -mean(system.teacher(tokens, cond).log_prob(tokens))


def economical(system: HMAR) -> list[Claim]:
    """Pairs of rows that are multiplied in a layer while sampling, and bytes of keys and values that are kept."""
    pairs, layout = [], system.tokenizer.layout()

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        pairs.append(q.shape[-2] * k.shape[-2])
        return attend(q, k, v, mask, scale)

    cond = system.prepare({"class_labels": [0]})
    with mock.patch.object(neighbourhood, "attend", counting):
        s = finish(generate(system, cond, HMARSampling(schedule=SCHEDULE), Noise.of(7, 1)))
    expected = sum(len(row) * n * n for row, n in zip(SCHEDULE, layout.sizes, strict=True))
    kept = sum(x.numel() * x.element_size() for c in s.cache.values() for x in (*c.k.values(), *c.v.values()))
    return [
        exactly("pairs of a layer", sum(pairs) / len(system.transformer.scales.trunk), expected),
        exactly("bytes kept from scale to scale", kept, 0),
    ]


def recognised(system: HMAR, data: Digits) -> Claim:
    """Digits drawn in passes are taken for their class by their nearest real neighbours."""
    sampling = HMARSampling(cfg_scale=2.0, top_k=0, top_p=0.95, schedule=SCHEDULE)
    return at_least("share of digits drawn in passes recognised as their class", drawn(system, data, sampling), 0.85)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def forget_learned_branch(trained: Trained) -> None:
    """The branch is what it was before its stage."""
    trained.system.transformer.copy_()


def tell_nothing(trained: Trained) -> None:
    """The branch is not told the tokens that are not hidden."""
    transformer = trained.system.transformer
    forward = transformer.forward
    transformer.forward = lambda c, x_BNC, own_BMC, hidden_BM, first, last: forward(
        c, x_BNC, own_BMC, torch.ones_like(hidden_BM), first, last
    )


def hide_all(trained: Trained) -> None:
    """Every further pass draws all tokens of the scale again."""
    system = trained.system
    predict = system.predict

    def hiding(s: State) -> Categorical | Refined:
        d = predict(s)
        return replace(d, left=torch.full_like(d.left, d.where.shape[1])) if isinstance(d, Refined) else d

    system.predict = hiding


MUTANTS = {
    "zeroed head": of_system(zero_head, "transformer.scales.head.linear"),
    "ignored condition": of_system(ignore_class, "transformer.scales.conditioner"),
    "ignored rule": lambda trained: ignore_rule(trained.system.transformer.scales),
    "untrained branch": forget_learned_branch,
    "branch told nothing": tell_nothing,
    "everything drawn again": hide_all,
}
