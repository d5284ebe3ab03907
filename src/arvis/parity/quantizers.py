"""The quantisers against public implementations of each: look-ups, losses, gradients, and one step of the averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arvis.parity.harness import Fixture, ParityError
from arvis.quant import (
    BSQ,
    EMAVQ,
    FSQ,
    LFQ,
    VQ,
    BSQConfig,
    EMAVQConfig,
    FSQConfig,
    LFQConfig,
    MultiScaleVQ,
    MultiScaleVQConfig,
    Residual,
    SimVQ,
    SimVQConfig,
    VQConfig,
    rotate_to,
    straight_through,
)
from arvis.quant.entropy import choice_entropies
from arvis.quant.multiscale import area, to_rows
from arvis.tokens import pyramid
from arvis.weights import Key, load_official
from arvis.weights.quantizers import MULTISCALE

Outputs = Iterator[tuple[str, Tensor]]


def run(fixture: Fixture) -> Outputs:
    """Every output of a recording, whatever its sizes: the runs that it has, each by the code below."""
    for name, given in fixture.runs.items():
        if name not in RUNS:
            raise ParityError(f"no quantiser here has the run {name!r}; known: {', '.join(RUNS)}")
        for field, tensor in RUNS[name](fixture, name, given):
            yield f"{name}.{field}", tensor


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """There are no full-size key layouts of quantisers alone: they are parts of the tokenizers of systems."""
    raise ParityError(
        "quantisers have no checkpoints of their own, so no key layout either; map the system whose tokenizer has one"
    )


def _averages(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    """A table that follows moving averages: one training step, then a look-up with the table it leaves."""
    config = EMAVQConfig(
        size=fixture.model("vector")["codebook_size"],
        width=fixture.model("vector")["dim"],
        decay=given["decay"],
        epsilon=given["eps"],
        beta=given["commitment_weight"],
        cosine=given["use_cosine_sim"],
    )
    quantizer, io = EMAVQ(config, _estimator(given)), fixture.io
    load_official(quantizer, BEFORE, {key: io[f"{name}.{key}"] for key in ("embed0", "embed_avg0", "cluster_size0")})
    if given["mode"] == "train":
        out = quantizer(io["x"])
        yield "out", out.values
        yield "ids", out.tokens[..., 0]
        yield "loss", out.losses["vq"][None]
        quantizer.update_(io["x"], out.tokens)
        rare = int((quantizer.cluster_size < given["threshold_ema_dead_code"]).sum())
        if rare:  # a random choice among vectors, by another generator
            raise ParityError(f"{rare} codes of {name} died in the recorded step; record it without revival")
        for field in ("embed", "cluster_size", "embed_avg"):
            yield f"{field}1", getattr(quantizer, field)
    yield "eval_out", quantizer.codes(quantizer.encode(io["x"]))
    yield "eval_ids", quantizer.encode(io["x"])[..., 0]


BEFORE = tuple(Key(name, f"{name}0") for name in ("embed", "embed_avg", "cluster_size"))


def _residual(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    vector = fixture.model("vector")
    stages = [VQ(VQConfig(size=vector["codebook_size"], width=vector["dim"])) for _ in range(given["num_quantizers"])]
    for i, stage in enumerate(stages):
        stage.embedding.weight.copy_(fixture.io[f"{name}.embed{i}"])
    quantizer = Residual(stages)
    tokens = quantizer.encode(fixture.io["x"])
    yield "out", quantizer.codes(tokens)
    yield "ids", tokens


def _simvq(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    vector, io = fixture.model("vector"), fixture.io
    config = SimVQConfig(
        size=vector["codebook_size"], width=vector["dim"], beta=given["input_to_quantize_commit_weight"]
    )
    quantizer = SimVQ(config, estimator=_estimator(given))
    load_official(quantizer, FROZEN, {key: io[f"{name}.{key}"] for key in ("frozen", "W")})
    with torch.enable_grad():
        x = io["x"].clone().requires_grad_()
        out = quantizer(x)
        (grad,) = torch.autograd.grad((out.values * io[f"{name}.upstream"]).sum(), x)
    yield "out", out.values.detach()
    yield "ids", out.tokens[..., 0]
    yield "loss", out.losses["vq"].detach()
    yield "grad_x", grad


FROZEN = (Key("frozen_codebook", "frozen"), Key("code_transform.weight", "W"))


def _fsq(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    quantizer = FSQ(FSQConfig(levels=tuple(given["levels"]), epsilon=given["eps"]))
    out = quantizer(fixture.io[f"{name}.x"])
    yield "out", out.values
    yield "ids", out.tokens[..., 0]
    yield "all_codes", quantizer.codes(torch.arange(given["codes_listed"])[:, None])


def _lfq(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    """All codes in one group: the official entropies are those of a softmax over all of them, with a floor of 1e-5."""
    config = LFQConfig(
        bits=given["bits"],
        entropy=given["entropy_loss_weight"],
        commit=given["commitment_loss_weight"],
        diversity=given["diversity_gamma"],
        inverse_temperature=given["inv_temperature"],
        group=given["bits"],
        floor=1e-5,
    )
    out = LFQ(config)(fixture.io[f"{name}.x"])
    yield "ids", out.tokens[..., 0]
    yield "out", out.values
    trained = 1.0 if given["mode"] == "train" else 0.0  # the official losses are zero elsewhere
    for field, loss in LOSSES.items():
        yield field, out.losses[loss] * trained


LOSSES = {"aux_loss": "vq", "sample_entropy": "entropy_sample", "batch_entropy": "entropy_batch", "commit": "commit"}


def _bsq(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    """`new_quant` is about the gradient alone: the older form scales it by 1 / sqrt(d), the values are the same."""
    quantizer = BSQ(BSQConfig(bits=given["bits"], inverse_temperature=given["inv_temperature"]))
    out = quantizer(fixture.io[f"{name}.x"])
    yield "out", out.values
    yield "bits", out.tokens
    yield "sample_entropy", out.losses["entropy_sample"]
    yield "batch_entropy", out.losses["entropy_batch"]


def _multiscale(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    model = fixture.model("multiscale")
    layout = pyramid(tuple(model["v_patch_nums"]))
    if given["num_scales"] != layout.K:
        raise ParityError(f"{name} was recorded with {given['num_scales']} scales, its model has {layout.K}")
    config = MultiScaleVQConfig(
        size=model["vocab_size"],
        width=model["Cvae"],
        levels=layout.K,
        beta=model["beta"],
        cosine=model["using_znorm"],
        ratio=model["quant_resi"],
        shares=model["share_quant_resi"],
    )
    quantizer = MultiScaleVQ(config)
    load_official(quantizer, MULTISCALE, fixture.weights("multiscale"), source=f"{fixture.folder}: multiscale")
    out = quantizer(fixture.io[f"{name}.f"], layout)
    yield "fhat", out.values
    yield "loss", out.losses["vq"]
    fhat, inputs = torch.zeros_like(out.values), []
    for k in range(layout.K):
        ids = out.tokens[:, layout.span(k)]
        yield f"ids{k}", ids[..., 0]
        fhat = fhat + quantizer.spread(quantizer.embedding(ids[..., 0]), k, layout)
        if k + 1 < layout.K:
            inputs.append(to_rows(area(fhat, layout.levels[k + 1])))
    if inputs:
        yield "var_input", torch.cat(inputs, 1)


def _choices(fixture: Fixture, name: str, given: Mapping[str, Any]) -> Outputs:
    sample, batch = choice_entropies(fixture.io[f"{name}.d"], given["temperature"], given["eps"])
    yield "loss", sample - batch


def _estimator(given: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    return rotate_to if given["rotation_trick"] else straight_through


RUNS: dict[str, Callable[[Fixture, str, Mapping[str, Any]], Outputs]] = {
    "euclid_ema": _averages,
    "cosine_ema": _averages,
    "residual": _residual,
    "simvq": _simvq,
    "fsq": _fsq,
    "lfq": _lfq,
    "bsq": _bsq,
    "multiscale": _multiscale,
    "dist_entropy": _choices,
}
