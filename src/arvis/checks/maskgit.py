"""MaskGIT learns to draw digits: 1,500 real ones, both stages, some minutes on one core.

The claims: the order is the schedule's, and no code is decided twice; what is hidden is not seen and what is known is;
known codes and the class are what predictions go by; drawn digits are those that were asked for; parts of digits are
painted to fit the rest, which does not change; the official size has the official number of parameters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly
from arvis.checks.digits import CLASSES, Digits, digits, recognised
from arvis.checks.mutants import ignore_class, of_system, swap_guidance
from arvis.dist import Guess
from arvis.noise import Noise
from arvis.orders import cosine_counts
from arvis.state import State
from arvis.systems.maskgit import MaskGIT, MaskGITConfig, MaskGITSampling, build, maskgit_256
from arvis.tokenizers.grid import GridVQConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import NEVER, Pin
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate, walk

PARAMETERS = 172_456_192
"""Of a transformer of the published sizes: 24 layers of width 768, 1,024 codes, 1,000 classes."""


@dataclass
class Trained:
    """What is examined."""

    system: MaskGIT
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage."""

    tokenizer: int = 300
    transformer: int = 400


def config() -> MaskGITConfig:
    """32x32 pixels, 8x8 cells of 64 codes."""
    patch = PatchConfig(
        patch=4, grid=(8, 8), z_channels=16, width=64, heads=2, encoder_depth=1, decoder_depth=1, refine=8
    )
    tokenizer = GridVQConfig(grid=(8, 8), vocab_size=64, code_width=8, l2_norm=False, patch=patch)
    return MaskGITConfig(tokenizer=tokenizer, depth=3, width=96, heads=4, norm_eps=1e-6, num_classes=CLASSES)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, then transformer, in run folders that are gone afterwards."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
        with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
            _train_tokenizer(system, data, length.tokenizer, Path(folder) / "tokenizer", on_step)
            _train_transformer(system, data, length.transformer, Path(folder) / "transformer", on_step)
    return Trained(system.eval(), data)


def _train_tokenizer(system: MaskGIT, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokenizer = system.tokenizer
    with torch.no_grad():
        tokenizer.init_(tokenizer.features(data.images[:256]), tokenizer.layout(), Noise.of(0))
    terms = TokenizerLossConfig(l1=0.0, l2=1.0, vq=1.0, revive_every=50)
    fit(
        tokenizer,
        lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms, updates=batch["step"]),
        lambda step: {"image": data.images[_rows(step, 32, data)]},
        _fit(steps, batch=32, lr=1e-3),
        run,
        on_step=lambda info: on_step(),
    )
    tokenizer.eval().requires_grad_(False)


def _train_transformer(system: MaskGIT, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokens = system.tokenizer.encode(data.images)

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(step, 64, data)
        return {"tokens": tokens[rows], "class_labels": data.labels[rows]}

    fit(
        system.transformer,
        system.loss,
        batch,
        _fit(steps, batch=64, lr=1e-3),
        run,
        on_step=lambda info: on_step(),
    )


def _fit(steps: int, batch: int, lr: float) -> FitConfig:
    return FitConfig(
        steps=steps, batch=batch, lr=lr, warmup=min(50, steps - 1), schedule="constant", precision="float32"
    )


def _rows(step: int, batch: int, data: Digits) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    system, data = trained.system, trained.digits
    return [
        *ordered(system),
        *visible(system, data),
        *informed(system, data),
        *recognised(system, data, MaskGITSampling(steps=8, cfg_scale=2.0), 0.85, each=15),
        *edited(system, data),
        parameters(),
    ]


def ordered(system: MaskGIT) -> list[Claim]:
    """What is decided at each step, for few steps and many, against the schedule; and which guesses those are."""
    wrong, surest = 0, []
    for steps in (1, 4, 16, 64):
        s = _start(system, [1, 2], steps=steps)
        sizes = torch.stack([step.fresh.sum(1) for step in walk(system, s)], 1)
        wrong += int((sizes != torch.tensor(cosine_counts(64, steps))).sum()) + int((~s.known).sum())
    for step in range(3):
        s = _start(system, [1, 2], steps=4, choice_temperature=0.0)
        for _ in walk(system, s, until=step):
            pass
        d = system.predict(s)
        x, before = d.sample(s.noise), s.group == NEVER
        system.commit(s, d, x)
        kept, sure = s.group == step, d.marginal(x)
        limit = sure.masked_fill(~before | kept, -torch.inf).amax(1, keepdim=True)
        surest.append((sure >= limit)[kept].float())
    return [
        exactly("steps whose set has not the schedule's size, and codes left over", wrong, 0),
        exactly("share of kept guesses that are at least as sure as all others", float(torch.cat(surest).mean()), 1),
    ]


def visible(system: MaskGIT, data: Digits) -> list[Claim]:
    """How far logits move when codes change that are hidden, and when one changes that is known."""
    tokens = system.tokenizer.encode(data.test_images[:8])
    known = Noise.of(4, 8).uniform("known", 0, (64,)) < 0.5
    other = (tokens + 1) % 64
    hidden = tokens.where(known[..., None], other)
    one = tokens.clone()
    first = known.int().argmax(1, keepdim=True)[..., None]
    one.scatter_(1, first, other.gather(1, first))
    base, blind, seen = (_logits(system, x, known, data.test_labels[:8]) for x in (tokens, hidden, one))
    return [
        exactly("largest change of logits when hidden codes change", float((blind - base).abs().max()), 0),
        at_least(
            "smallest change of logits, over items, when one known code changes",
            float((seen - base).abs().amax((1, 2)).min()),
            1e-3,
        ),
    ]


def informed(system: MaskGIT, data: Digits) -> list[Claim]:
    """Nats of the codes of test digits: all hidden or half, with their class or a wrong one."""
    tokens, labels = system.tokenizer.encode(data.test_images), data.test_labels
    wrong = (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES
    half = Noise.of(5, len(labels)).uniform("known", 0, (64,)) < 0.5

    def nats(known: Tensor, labels: Tensor) -> float:
        """Of the codes that `half` hides."""
        log_p = _logits(system, tokens, known, labels).log_softmax(-1).gather(-1, tokens)[..., 0]
        return -float(log_p[~half].double().mean())

    nothing = torch.zeros_like(half)
    return [
        at_least(
            "nats per code that knowing half of the others saves", nats(nothing, labels) - nats(half, labels), 0.1
        ),
        at_least("nats per code that a wrong class costs", nats(nothing, wrong) - nats(nothing, labels), 0.3),
    ]


def edited(system: MaskGIT, data: Digits, count: int = 100) -> list[Claim]:
    """Right halves of test digits painted anew."""
    tokens, labels = system.tokenizer.encode(data.test_images[:count]), data.test_labels[:count]
    left = (torch.arange(64) % 8 < 4).expand(count, -1)
    cond, sampling = system.prepare({"class_labels": labels}), MaskGITSampling(steps=8, cfg_scale=2.0)
    s = finish(generate(system, cond, sampling, Noise.of(6, count), given=Pin(left, tokens)))
    changed = int((s.tokens != tokens)[left].sum())
    same = float((s.tokens == tokens)[~left].float().mean())
    return [
        exactly("kept codes that painting the right halves changed", changed, 0),
        at_most("share of the painted codes that are the picture's own", same, 0.9),
        at_least(
            "share of digits recognised with their right halves painted",
            data.recognised(system.tokenizer.decode(s.tokens), labels),
            0.85,
        ),
    ]


@cache
def parameters() -> Claim:
    """The published sizes, counted without memory for them."""
    with torch.device("meta"):
        transformer = build(maskgit_256()).transformer
    return exactly("parameters of maskgit-256", sum(p.numel() for p in transformer.parameters()), PARAMETERS)


def _start(system: MaskGIT, labels: list[int], **settings: Any) -> State:
    cond = system.prepare({"class_labels": labels})
    return system.start(cond, MaskGITSampling(**settings), Noise.of(3, len(labels)))


def _logits(system: MaskGIT, tokens: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    null = torch.zeros(len(labels), dtype=torch.bool)
    prefix = system.transformer.conditioner(system.prepare({"class_labels": labels}), null).rows
    return system.transformer(tokens, known, prefix)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def zero_head(trained: Trained) -> None:
    """Every code is as likely as any other."""
    for name in ("head_norm.weight", "head_norm.bias", "bias"):
        trained.system.transformer.get_parameter(name).data.zero_()


def see_hidden(trained: Trained) -> None:
    """The network reads hidden codes."""
    _replace_known(trained.system.transformer, torch.ones_like)


def see_nothing(trained: Trained) -> None:
    """The network reads no code."""
    _replace_known(trained.system.transformer, torch.zeros_like)


def _replace_known(transformer: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    forward = transformer.forward
    transformer.forward = lambda tokens, known, prefix: forward(tokens, other(known), prefix)


def keep_all(trained: Trained) -> None:
    """The first step keeps every guess."""
    trained.system.masked_again = lambda s, d, x_BnS: torch.zeros_like(s.group, dtype=torch.bool)


def keep_the_least_sure(trained: Trained) -> None:
    """Confidence is taken for doubt."""
    again = trained.system.masked_again
    trained.system.masked_again = lambda s, d, x_BnS: again(s, Guess(d.where, -d.logits, d.at), x_BnS)


def forget_the_given(trained: Trained) -> None:
    """Given codes are not looked at."""
    start = trained.system.start
    trained.system.start = lambda cond, sampling, noise, layout=None, given=None: start(cond, sampling, noise, layout)


MUTANTS = {
    "zeroed head": zero_head,
    "ignored condition": of_system(ignore_class),
    "hidden codes seen": see_hidden,
    "known codes not seen": see_nothing,
    "everything kept at once": keep_all,
    "wrong order": keep_the_least_sure,
    "given codes forgotten": forget_the_given,
    "swapped guidance": of_system(swap_guidance),
}
