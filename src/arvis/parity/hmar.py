"""HMAR against its official code, and full-size HMAR checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.parity.var import configured as as_var
from arvis.rows import Rows, render, same
from arvis.state import Cond, State
from arvis.systems.hmar import HMAR, HMARConfig, HMARSampling, Refined, build, keys, token_weights
from arvis.tokens import pyramid
from arvis.weights import Key, load_official


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    config = configured(fixture.model("quantizer"), fixture.model("hmar"))
    system = build(config).eval()
    table = keys(config)
    load_official(system.transformer, table["transformer"], fixture.weights("hmar"), source=f"{fixture.folder}: hmar")
    quantizer = {f"quantize.{name}": tensor for name, tensor in fixture.weights("quantizer").items()}
    own = {name: tensor for name, tensor in system.tokenizer.state_dict().items() if not name.startswith("quantize.")}
    load_official(system.tokenizer, table["tokenizer"], own | quantizer, source=f"{fixture.folder}: quantizer")
    runs, io = fixture.runs, fixture.io
    tokens, cond = io["gt_tokens"][..., None], system.prepare({"class_labels": io["labels"]})
    yield from _next_scale(system, tokens, cond)
    yield from _masked(system, tokens, cond, io["masked_positions_minus1"])
    levels = pyramid(tuple(runs["weights_list256"]["patch_nums"]))
    yield "lognorm_weight_256list_per_token", token_weights(levels, "lognorm")[list(levels.offsets[:-1])]
    yield from _at_once(system, cond, runs["ns_ar"])
    yield from _in_passes(system, cond, runs["mask_ar"])


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The transformer with both branches, and its table."""
    values = layout["constructor"]
    config = configured({**values, "v_patch_nums": values["patch_nums"]}, values)
    return build(config).parts()["transformer"], keys(config)["transformer"]


def configured(quantizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> HMARConfig:
    """Our configuration from official constructor values; the recordings know no more of the tokenizer."""
    renamed = {**quantizer, "z_channels": quantizer["Cvae"], "ch": 32, "ch_mult": (1,), "num_res_blocks": 1}
    return HMARConfig(scale=as_var(renamed, transformer), mask_layers=transformer["n_layers_train"], learns="mask")


def _next_scale(system: HMAR, tokens: Tensor, cond: Cond) -> Iterator[tuple[str, Tensor]]:
    layout = system.tokenizer.layout()
    yield "ns_input", system.tokenizer.inputs(tokens, layout, 1)
    yield "ns_tf_logits", system.teacher(tokens, cond).logits[:, :, 0]
    rows = Rows.of(layout.level_N)
    visible = render(same, rows, rows)
    yield "mask_visible", torch.ones(layout.n, layout.n) if visible is None else visible[0, 0]
    yield "loss_weight_lognorm", token_weights(layout, "lognorm")
    yield "loss_weight_equal", token_weights(layout, "equal")
    yield "ns_loss_lognorm", system.scale_loss({"tokens": tokens, **cond}, Noise.of(0, len(tokens)))["loss"][None]


def _masked(system: HMAR, tokens: Tensor, cond: Cond, positions: Tensor) -> Iterator[tuple[str, Tensor]]:
    layout = system.tokenizer.layout()
    added = [system.added(tokens[:, layout.span(k)], k, layout) for k in range(1, layout.K)]
    yield "mask_input", torch.cat(added, 1)
    hidden = torch.zeros(len(tokens), layout.n, dtype=torch.bool)
    hidden[:, positions + layout.sizes[0]] = True  # the recorded positions start at scale 1
    null = torch.zeros(len(tokens), dtype=torch.bool)
    logits = system.masked_pass(tokens, hidden, system.transformer.scales.conditioner(cond, null))
    yield "mask_tf_logits", logits
    yield "mask_loss", system.hidden_nats(logits, tokens, hidden)[0][None]


def _at_once(system: HMAR, cond: Cond, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    s, passes = _walked(system, cond, replace(_greedy(given), schedule=()))
    yield "ns_ar_tokens", s.tokens[..., 0]
    yield "ns_ar_fhat", s.more["f"]
    yield "ns_ar_logits_guided", torch.cat(passes, 1)


def _in_passes(system: HMAR, cond: Cond, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    schedule = tuple(tuple(row) for row in given["mask_schedule"]) if given["mask"] else ()
    s, passes = _walked(system, cond, replace(_greedy(given), schedule=schedule))
    yield "mask_ar_pass_sizes", torch.tensor([x.shape[1] for x in passes])
    yield "mask_ar_pass_logits", torch.cat(passes, 1)
    yield "mask_ar_pass_tokens", torch.cat(passes, 1).argmax(-1)
    yield "mask_ar_final_tokens", s.tokens[..., 0]
    yield "mask_ar_fhat", s.more["f"]


def _walked(system: HMAR, cond: Cond, sampling: HMARSampling) -> tuple[State, list[Tensor]]:
    """The state at the end, and the guided logits [B, n, V] of every pass on the way."""
    noise, passes = Noise.of(0, len(cond["class_labels"])), list[Tensor]()

    def noted(logits: Tensor) -> Tensor:
        passes.append(logits[:, :, 0])
        return logits

    s = system.start(cond, sampling, noise)
    while not bool(s.done.all()):
        warm = s.fork()  # the logits before they are made greedy
        warm.knobs["temperature"] = torch.ones_like(s.knobs["temperature"])
        noted(system.predict(warm).logits)
        d = system.predict(s)
        if isinstance(d, Refined):
            d = replace(d, again=lambda x, hidden, again=d.again: noted(again(x, hidden)))
        system.commit(s, d, d.sample(noise))
    return s, passes


def _greedy(given: Mapping[str, Any]) -> HMARSampling:
    """Recorded runs take the likeliest token of guided, unfiltered logits."""
    if given["guidance"] != "var_ramp" or given["sampling"] != "argmax":
        raise ValueError(f"recorded runs are guided by var_ramp and take the argmax, got {given}")
    return HMARSampling(cfg_scale=given["cfg"], top_k=0, top_p=0.0, temperature=0.0)
