"""M-VAR against its official code and the public Mamba-2 module; full-size checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from arvis.nn.mamba import Mamba2Config
from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.parity.var import configured as scale_config
from arvis.systems.m_var import DecoupledBlock, MVarConfig, build, keys
from arvis.tokens import at
from arvis.walk import finish, generate
from arvis.weights import Key, load_official
from arvis.weights.quantizers import MULTISCALE

_MAMBA = ("d_state", "headdim", "d_conv", "expand", "ngroups", "norm_eps")


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes; of the tokenizer it holds the quantiser alone."""
    config = configured(fixture.model("quantizer"), fixture.model("transformer"))
    system, runs, io = build(config).eval(), fixture.runs, fixture.io
    source = str(fixture.folder)
    load_official(system.tokenizer.quantize, MULTISCALE, fixture.weights("quantizer"), source=source)
    # the mask follows from the scales and was left out
    load_official(system.transformer, keys(config)["transformer"], fixture.weights("transformer"), source=source)
    layout, cond = system.tokenizer.layout(), system.prepare({"class_labels": io["labels"]})

    tokens = io["gt_tokens"][..., None]
    yield "var_input", system.tokenizer.inputs(tokens, layout, 1)
    yield "tf_logits", system.teacher(tokens, cond).logits[:, :, 0]
    noise = Noise.of(0, len(tokens))
    yield "tf_loss", system.loss({"tokens": tokens, "class_labels": io["labels"]}, noise)["loss"][None]

    block = cast(DecoupledBlock, system.transformer.trunk.blocks[runs["mamba0"]["block"]])
    yield "mamba0_out", block.mamba(io["mamba0_in"])[0]

    given = runs["ar"]
    if given["guidance"] != "var_ramp" or given["sampling"] != "argmax":
        raise ValueError(f"sampling here is the most likely token under var_ramp, got {given}")
    greedy = system.Sampling(cfg_scale=given["cfg"], top_k=0, top_p=0.0, temperature=0.0)
    s = finish(generate(system, cond, greedy, noise))
    yield "ar_tokens", s.tokens[..., 0]
    yield "ar_fhat", s.more["f"]
    drawn, logits = s.tokens, []
    s = system.start(cond, system.Sampling(cfg_scale=given["cfg"], top_k=0, top_p=0.0), noise)
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(drawn, d.where))
    yield "ar_logits_guided", torch.cat(logits, 1)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The transformer that a key layout is of, and its table."""
    values = layout["constructor"]
    quantizer = {"vocab_size": values["vocab_size"], "Cvae": values["Cvae"], "v_patch_nums": values["patch_nums"]}
    config = configured(quantizer, values)
    return build(config).parts()["transformer"], keys(config)["transformer"]


def configured(quantizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> MVarConfig:
    """Our configuration from official constructor values; absent ones are the official defaults, which are ours."""
    mamba = transformer.get("mamba", {})
    if mamba.get("norm_before_gate"):
        raise ValueError("the gate comes before the norm here, got norm_before_gate=True")
    pyramid = {**quantizer, "z_channels": quantizer["Cvae"], "ch": 32, "ch_mult": [1]}  # of the smallest backbone
    return MVarConfig(
        scale=scale_config(pyramid, transformer),
        mamba=Mamba2Config(**{name: mamba[name] for name in _MAMBA if name in mamba}),
    )
