"""VARiant against VAR's official blocks, run in the layers of its definition: no code of its own is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.parity.var import configured as scale_config
from arvis.parity.var import skeleton as scale_skeleton
from arvis.state import Cond
from arvis.systems.variant import VariantConfig, build, keys
from arvis.tokens import at
from arvis.walk import finish, generate
from arvis.weights import Key, load_official
from arvis.weights.quantizers import MULTISCALE


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes and depths; of the tokenizer it holds the quantiser alone."""
    config = configured(fixture.model("quantizer"), fixture.model("transformer"))
    system: Any = build(config).eval()
    source = str(fixture.folder)
    load_official(system.base.tokenizer.quantize, MULTISCALE, fixture.weights("quantizer"), source=source)
    table = keys(config)["transformer"]
    load_official(system.parts()["transformer"], table, fixture.weights("transformer"), source=source)
    cond = system.prepare({"class_labels": fixture.io["labels"]})
    for given in fixture.runs.values():
        for name, tensor in _mapped(system, cond, len(fixture.io["labels"]), given):
            yield f"{given['prefix']}{name}", tensor


def _mapped(system: Any, cond: Cond, items: int, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """One depth map: cached sampling, what it keeps, and one pass over what was drawn."""
    if given["guidance"] != "var_ramp" or given["sampling"] != "argmax":
        raise ValueError(f"sampling here is the most likely token under var_ramp, got {given}")
    settings = {"cfg_scale": given["cfg"], "top_k": 0, "top_p": 0.0, "full_scales": given["N"], "depth": given["d"]}
    sampling, noise = system.Sampling(**settings), Noise.of(0, items)
    layout = system.base.tokenizer.layout()
    yield "layers", torch.tensor(system.layers(sampling, max(layout.K, given["N"] + 1))[-1])
    s = finish(generate(system, cond, system.Sampling(**settings, temperature=0.0), noise))
    tokens = s.tokens
    yield "ar_tokens", tokens[..., 0]
    yield "ar_fhat", s.more["f"]
    s, logits = system.start(cond, sampling, noise), []
    s.cache["trunk"].reserve(layout.n)  # the rows of the last scale, too
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    yield "ar_logits_guided", torch.cat(logits, 1)
    held = s.cache["trunk"].k
    yield "cache_len_per_block", torch.tensor([int((held[i] != 0).any(-1)[0, 0, 0].sum()) for i in sorted(held)])
    yield "tf_logits_on_ar_tokens", system.at(sampling).teacher(tokens, cond).logits[:, :, 0]


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """VAR's: no weight is new."""
    return scale_skeleton(layout)


def configured(quantizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> VariantConfig:
    """Our configuration from official constructor values; absent ones are the official defaults, which are ours."""
    pyramid = {**quantizer, "z_channels": quantizer["Cvae"], "ch": 32, "ch_mult": [1]}  # of the smallest backbone
    return VariantConfig(scale=scale_config(pyramid, transformer), full_scales=1, depth=0)
