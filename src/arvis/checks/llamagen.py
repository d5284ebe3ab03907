"""LlamaGen learns to draw digits: 1,500 real ones, both stages, some minutes on one core.

The claims: sampling with the cache is the model that was trained; guidance is u + s (c - u), without a second row where
there is none; the row of the condition has no query and no key; the class is what is drawn, and without a class it is
not; codes survive being decoded and encoded; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean, sizes
from arvis.checks.digits import CLASSES, Digits, digits
from arvis.checks.mutants import ignore_class, ignore_order, of_system, zero_head
from arvis.next_token import NextToken
from arvis.nn.cache import Cache
from arvis.nn.llama import rotary_grid
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.systems.llamagen import PRESETS, LlamaGenConfig, LlamaGenSampling, build
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.grid import GridVQConfig
from arvis.tokens import at
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate

PARAMETERS = {
    "llamagen-b-384": 110_888_448,
    "llamagen-l-384": 342_910_976,
    "llamagen-xl-384": 774_699_520,
    "llamagen-xxl-384": 1_410_972_672,
    "llamagen-3b-384": 3_096_659_200,
    "llamagen-xl-t2i-512": 777_678_080,
}
"""Of the official transformers; the tokenizer has 71,883,403."""

SHOWN = 4
"""Classes whose logits are compared number by number."""


@dataclass
class Trained:
    """What is examined."""

    system: NextToken
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage; more of the second only learns the 1,500 digits by heart."""

    tokenizer: int = 300
    transformer: int = 300


def config() -> LlamaGenConfig:
    """32x32 pixels, 8x8 cells of 64 codes."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=32)
    tokenizer = GridVQConfig(grid=(8, 8), vocab_size=64, cnn=cnn)
    return LlamaGenConfig(tokenizer=tokenizer, depth=4, width=128, heads=4, num_classes=CLASSES, dropout=0.0)


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


def _train_tokenizer(system: NextToken, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokenizer = system.tokenizer
    with torch.no_grad():
        tokenizer.init_(tokenizer.features(data.images[:64]), tokenizer.layout(), Noise.of(0))
    terms = TokenizerLossConfig(l1=0.0, l2=1.0, revive_until=steps // 2)
    fit(
        tokenizer,
        lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms, updates=batch["step"]),
        lambda step: {"image": data.images[_rows(step, 16, data)]},
        FitConfig(steps=steps, batch=16, lr=1e-3, weight_decay=0.0, warmup=min(20, steps), precision="float32"),
        run,
        on_step=lambda info: on_step(),
    )
    tokenizer.eval().requires_grad_(False)


def _train_transformer(system: NextToken, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokens = torch.cat([system.latents(part)["tokens"] for part in data.images.split(100)])

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(step, 32, data)
        return {"tokens": tokens[rows], "class_labels": data.labels[rows]}

    fit(
        system.transformer,
        system.loss,
        batch,
        FitConfig(steps=steps, batch=32, lr=3e-3, muon=("trunk",), warmup=min(20, steps), precision="float32"),
        run,
        on_step=lambda info: on_step(),
    )


def _rows(step: int, batch: int, data: Digits) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order."""
    system, data = trained.system, trained.digits
    return [
        cached(system),
        *guided(system, data),
        *silent(system, data),
        *recognised(system, data),
        recovered(system, data),
        *parameters(),
    ]


def cached(system: NextToken) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one masked pass over the same tokens."""
    cond, plain = _some(system), LlamaGenSampling.plain()
    tokens = finish(generate(system, cond, plain, Noise.of(2, SHOWN))).tokens
    gap = _gap(_stepped(system, tokens, cond, plain), system.teacher(tokens, cond).logits[:, :, 0])
    return at_most("largest difference of cached and one-pass logits", gap, 1e-4)


def guided(system: NextToken, data: Digits) -> list[Claim]:
    """Guided logits along real tokens, in float64, against both halves by themselves."""
    try:
        return _guided(system.double(), data)
    finally:
        system.float()


def _guided(system: NextToken, data: Digits) -> list[Claim]:
    cond, tokens = _some(system), _tokens(system, data)
    c, u = system.teacher(tokens, cond).logits[:, :, 0], system.teacher(tokens, None).logits[:, :, 0]
    claims = []
    for scale in (1.5, 4.0):
        found = _stepped(system, tokens, cond, LlamaGenSampling(cfg_scale=scale, top_k=0))
        claims.append(
            at_most(
                f"largest difference of guided logits from u + {scale:g} (c - u)",
                _gap(found, u + scale * (c - u)),
                1e-5,
            )
        )
    s = system.start(cond, LlamaGenSampling(cfg_scale=1.0), Noise.of(0, SHOWN))
    system.predict(s)
    return [*claims, exactly("rows per picture at scale 1", s.cache["trunk"].k[0].shape[1], 1)]


def silent(system: NextToken, data: Digits) -> list[Claim]:
    """Random queries and keys in the row of the condition, and then random values."""
    cond, tokens = _some(system), _tokens(system, data)
    before, changed = system.teacher(tokens, cond).logits, []
    width = system.transformer.output.in_features
    for part in (slice(0, 2 * width), slice(2 * width, 3 * width)):

        def spoil(module: nn.Module, args: Any, out: Tensor, part: slice = part) -> Tensor:
            noise = Noise.of(7, len(out)).normal("spoil", 0, out[:, :1, part].shape[1:])
            return torch.cat((out[:, :1].slice_scatter(noise.to(out), 2, part.start, part.stop), out[:, 1:]), 1)

        hooks = [block.attn.qkv.register_forward_hook(spoil) for block in _blocks(system)]
        changed.append(_gap(system.teacher(tokens, cond).logits, before))
        for hook in hooks:
            hook.remove()
    return [
        at_most("change of logits by other queries and keys of the condition", changed[0], 0.0),
        at_least("change of logits by other values of the condition", changed[1], 0.1),
    ]


def recognised(system: NextToken, data: Digits, each: int = 20) -> list[Claim]:
    """Drawn digits are taken for their class by the nearest mean of real digits, and without a class are not."""
    labels = torch.arange(CLASSES).repeat(each)
    means = torch.stack([data.images[data.labels == y].mean(0) for y in range(CLASSES)]).flatten(1)
    found = []
    for given in (labels, torch.full_like(labels, CLASSES)):
        cond = system.prepare({"class_labels": given})
        s = finish(generate(system, cond, LlamaGenSampling(cfg_scale=2.0, top_k=0), Noise.of(3, len(labels))))
        nearest = torch.cdist(system.tokenizer.decode(s.tokens).flatten(1), means).argmin(1)
        found.append(mean(nearest == labels))
    return [
        at_least("share of drawn digits that are nearest to the mean of their class", found[0], 0.6),
        at_most("share nearest to that mean when no class was given", found[1], 0.25),
    ]


def recovered(system: NextToken, data: Digits) -> Claim:
    """Codes of training images that come back when their pictures are encoded again."""
    tokens = system.tokenizer.encode(data.images[:200])
    again = system.tokenizer.encode(system.tokenizer.decode(tokens))
    return at_least("share of codes that survive decoding and encoding", mean(again == tokens), 0.5)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


def _blocks(system: NextToken) -> Any:
    return system.transformer.trunk.blocks


def _some(system: NextToken) -> dict[str, Tensor]:
    return system.prepare({"class_labels": torch.arange(SHOWN)})


def _tokens(system: NextToken, data: Digits) -> Tensor:
    """Of a real test digit of each of these classes."""
    dtype = next(system.tokenizer.parameters()).dtype
    images = torch.stack([data.test_images[data.test_labels == y][0] for y in range(SHOWN)])
    return system.tokenizer.encode(images.to(dtype))


def _stepped(system: NextToken, tokens: Tensor, cond: dict[str, Tensor], sampling: LlamaGenSampling) -> Tensor:
    """Logits [B, N, V] step by step along given tokens."""
    s, logits = system.start(cond, sampling, Noise.of(0, len(tokens))), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    return torch.cat(logits, 1)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- broken on purpose ------------------------------------------------------------------------------------------------


def forget_cache(trained: Trained) -> None:
    """While sampling, a row sees itself alone."""
    transformer = trained.system.transformer
    forward = transformer.forward

    def forgetful(x_RD: Tensor, call: Call) -> Tensor:
        if not isinstance(call.cache, Cache):
            return forward(x_RD, call)
        own = torch.arange(call.cache.end) >= call.cache.end - x_RD.shape[1]
        return forward(x_RD, replace(call, mask=own.expand(1, 1, x_RD.shape[1], -1)))

    transformer.forward = forgetful


def still_condition(trained: Trained) -> None:
    """The row of the condition is not rotated, instead of switched off."""
    dim = _blocks(trained.system)[0].attn.head_dim
    trained.system.transformer.positions = lambda layout, prefix: rotary_grid(layout, prefix, dim, still=True)


def reverse_order(trained: Trained) -> None:
    """Codes are laid out from the end of the picture to its beginning."""
    tokenizer = trained.system.tokenizer
    codes = tokenizer.codes
    tokenizer.codes = lambda tokens, layout=None: codes(tokens.flip(1), layout)


def swap_guidance(trained: Trained) -> None:
    """Guidance leads away from the condition."""
    weigh = trained.system.weigh
    trained.system.weigh = lambda sampling, items, steps: weigh(sampling, items, steps).flip(-1)


def always_double(trained: Trained) -> None:
    """The null row is computed also where it has no weight."""
    weigh = trained.system.weigh

    def doubled(sampling: Any, items: int, steps: int) -> Tensor:
        found = weigh(sampling, items, steps)
        return torch.cat((found, torch.zeros_like(found)), -1) if found.shape[-1] == 1 else found

    trained.system.weigh = doubled


MUTANTS = {
    "zeroed head": of_system(zero_head, "transformer.output"),
    "ignored condition": of_system(ignore_class),
    "ignored mask": of_system(ignore_order),
    "forgotten cache": forget_cache,
    "condition not switched off": still_condition,
    "wrong order": reverse_order,
    "swapped guidance": swap_guidance,
    "always two rows": always_double,
}
