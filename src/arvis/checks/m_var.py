"""M-VAR learns digits whose last scale is told nothing of the others but by its state space, minutes on one core.

The claims: the scan is the same row by row, scale by scale and all at once; sampling with the cache is the model that
was trained; attention stays inside a scale and only the scan leaves it; with the scan the last scale is better
predicted than without it, where its own input is hidden; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, sizes
from arvis.checks.digits import Digits, digits, learn_pictures, learn_tokens
from arvis.checks.mutants import ignore_class, of_system, zero_head
from arvis.checks.var import cached, conditioned
from arvis.checks.var import config as scale_config
from arvis.nn.adaln import masked
from arvis.nn.mamba import Mamba2, Mamba2Config
from arvis.systems.m_var import PRESETS, DecoupledBlock, MVarConfig, build
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.training.fit_config import FitConfig

PARAMETERS = {
    "m-var-d12": 198_435_424,
    "m-var-d16": 464_157_184,
    "m-var-d20": 900_528_736,
    "m-var-d24": 1_550_067_136,
    "m-var-d30": 3_017_065_756,
    "m-var-d32": 3_658_707_968,
}
"""Of the official transformers."""


@dataclass
class Trained:
    """A model whose last scale has no input of its own, and its twin, trained with the scan switched off."""

    system: Any
    without: Any
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each stage, and the digits of one of the transformers'."""

    tokenizer: int = 400
    transformer: int = 170
    batch: int = 64


def config() -> MVarConfig:
    """32x32 pixels, 4x4 cells at the last of four scales: 30 tokens. Every other digit comes without its class."""
    patch = PatchConfig(patch=8, grid=(4, 4), z_channels=16, width=64, encoder_depth=1, decoder_depth=1)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4), vocab_size=128, z_channels=16, patch=patch)
    scale = replace(scale_config(), tokenizer=tokenizer, adaln_init=0.1, label_drop=0.5)
    return MVarConfig(scale=scale, mamba=Mamba2Config(d_state=16, headdim=32))


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """One tokenizer, then two transformers from the same weights on the same batches."""
    data = digits() if data is None else data
    pair = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            system = build(config())
        if not pair:
            learn_pictures(system.tokenizer, data, length.tokenizer, on_step)
        else:
            system.tokenizer = pair[0].tokenizer
            _without_scan(system)
        pair.append(system)
        tokens = system.tokenizer.encode(data.images)
        fit = FitConfig(steps=length.transformer, batch=length.batch, lr=2e-3, schedule="constant", precision="float32")
        with _hidden(system):
            learn_tokens(system.transformer, system.loss, tokens, data, fit, on_step)
    return Trained(pair[0].eval(), pair[1].eval(), data)


@contextmanager
def _hidden(system: Any) -> Iterator[None]:
    """The last scale's input is zero: only class, level and position are left of it, and what the scan carries over."""
    tokenizer = system.tokenizer
    inputs, next_input = tokenizer.inputs, tokenizer.next_input

    def hidden_inputs(tokens: Tensor, layout: Any, first: int = 0, last: int | None = None) -> Tensor:
        x = inputs(tokens, layout, first, last)
        if last in (None, layout.K):
            x[:, -layout.sizes[-1] :] = 0
        return x

    def hidden_next(f: Tensor, k: int, layout: Any) -> Tensor:
        return next_input(f, k, layout) * (k < layout.K - 1)

    tokenizer.inputs, tokenizer.next_input = hidden_inputs, hidden_next
    try:
        yield
    finally:
        del tokenizer.inputs, tokenizer.next_input


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    system, data = trained.system, trained.digits
    with _hidden(system):
        return [
            *scanned(system),
            cached(system),
            *reached(trained),
            conditioned(system, data),
            informed(trained),
            *parameters(),
        ]


def scanned(system: Any) -> list[Claim]:
    """The first mixer on rows of the sizes that it meets: each row by itself, each scale, and everything at once."""
    mixer, sizes = _blocks(system)[0].mamba, system.tokenizer.layout().sizes
    x = torch.randn(4, sum(sizes), system.transformer.width, generator=torch.Generator().manual_seed(0))
    whole = mixer(x)[0]
    return [
        at_most(f"largest difference of the scan {name} and all at once", _gap(_in_parts(mixer, x, parts), whole), 1e-4)
        for name, parts in (("row by row", (1,) * sum(sizes)), ("scale by scale", sizes))
    ]


def _in_parts(mixer: Mamba2, x: Tensor, parts: tuple[int, ...]) -> Tensor:
    memory, out = (), []
    for part in x.split(parts, 1):
        y, memory = mixer(part, memory)
        out.append(y)
    return torch.cat(out, 1)


def reached(trained: Trained) -> list[Claim]:
    """Pairs of scales of which the input of one moves the output of the other, or not, against what should be."""
    layout = trained.system.tokenizer.layout()
    every = torch.ones(layout.K, layout.K, dtype=torch.bool).tril()
    own = torch.eye(layout.K, dtype=torch.bool)
    wrong = {
        "wrong pairs of scales in what the inputs move": (_reach(trained.system) != every)[:, 1:],
        "wrong pairs of scales in what they move without the scan": (_reach(trained.without) != own)[:, 1:],
    }
    return [exactly(name, int(pairs.sum()), 0) for name, pairs in wrong.items()]


def _reach(system: Any) -> Tensor:
    """bool [K, K]: whether the first row of input scale j moves any row of output scale k; column 0 means nothing."""
    layout = system.tokenizer.layout()
    label = torch.zeros(1, dtype=torch.int64)
    c = system.transformer.conditioner({"class_labels": label}, label > 0)
    x = torch.randn(1, layout.n - layout.sizes[0], 16, generator=torch.Generator().manual_seed(0))
    out, base = torch.zeros(layout.K, layout.K, dtype=torch.bool), system.transformer(c, x, 0, layout.K, system.see)
    for j in range(1, layout.K):
        bumped = x.clone()
        bumped[:, layout.offsets[j] - layout.sizes[0]] += 1
        moved = (system.transformer(c, bumped, 0, layout.K, system.see) - base).abs().amax((0, 2)) > 0
        out[:, j] = torch.stack([moved[layout.span(k)].any() for k in range(layout.K)])
    return out


def informed(trained: Trained) -> Claim:
    """How much worse the last scale of unseen digits is predicted by the twin that was trained without a scan, when
    not even the class is told."""
    with_scan, without = (_last_nats(x, trained.digits) for x in (trained.system, trained.without))
    return at_least("nats per token of the last scale that the scan saves on test digits", without - with_scan, 0.02)


def _last_nats(system: Any, data: Digits) -> float:
    tokens = system.tokenizer.encode(data.test_images)
    span = slice(-system.tokenizer.layout().sizes[-1], None)
    d = system.teacher(tokens, None)
    return -float(d.log_prob(tokens)[:, span].double().mean())


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _blocks(system: Any) -> list[DecoupledBlock]:
    return [cast(DecoupledBlock, block) for block in system.transformer.trunk.blocks]


# -- broken on purpose ------------------------------------------------------------------------------------------------


def _without_scan(system: Any) -> None:
    for block in _blocks(system):
        block.mamba.forward = _nothing


def _nothing(u_RTD: Tensor, memory: Any = ()) -> tuple[Tensor, list[Tensor]]:
    return torch.zeros_like(u_RTD), []


def drop_scan(trained: Trained) -> None:
    """The mixer gives nothing, in the model that was trained with it."""
    _without_scan(trained.system)


def forget_state(trained: Trained) -> None:
    """While sampling, the scan starts anew at every scale."""
    for block in _blocks(trained.system):
        mix = block.mamba.forward
        block.across = lambda x, call, layer, mix=mix: mix(x)[0]


def forget_convolution(trained: Trained) -> None:
    """The state goes on from call to call, but the last rows before it are gone."""
    for block in _blocks(trained.system):
        block.mamba.forward = _without_past(block.mamba)


def _without_past(mixer: Mamba2) -> Any:
    mix = mixer.forward

    def forward(u_RTD: Tensor, memory: Any = ()) -> tuple[Tensor, list[Tensor]]:
        return mix(u_RTD, [memory[0], torch.zeros_like(memory[1])] if memory else ())

    return forward


def scan_backward(trained: Trained) -> None:
    """The scan runs from fine to coarse."""
    for block in _blocks(trained.system):
        mix = block.mamba.forward
        block.mamba.forward = lambda u_RTD, memory=(), mix=mix: (mix(u_RTD.flip(1))[0].flip(1), [])


def look_everywhere(trained: Trained) -> None:
    """Attention sees coarser scales, as VAR's does."""
    for system in (trained.system, trained.without):
        for block in _blocks(system):
            block.attn.look = masked


MUTANTS = {
    "no scan": drop_scan,
    "forgotten state": forget_state,
    "forgotten convolution": forget_convolution,
    "scan from fine to coarse": scan_backward,
    "attention across scales": look_everywhere,
    "ignored condition": of_system(ignore_class),
    "zeroed head": of_system(zero_head),
}
