"""FlexVAR against its official code, and full-size FlexVAR checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arvis.noise import Noise
from arvis.parity.harness import Fixture
from arvis.rows import Rows, render
from arvis.state import Cond, State
from arvis.systems.flexvar import (
    FlexVAR,
    FlexVARConfig,
    FlexVARSampling,
    build,
    kept_codes,
    keys,
    waves,
)
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.resized import ResizedVQConfig
from arvis.tokens import Layout, at, pyramid
from arvis.walk import walk
from arvis.weights import Key, load_official

_TOKENIZER = {
    "codebook_size": "vocab_size",
    "codebook_embed_dim": "code_width",
    "codebook_l2_norm": "l2_norm",
    "commit_loss_beta": "beta",
    "entropy_loss_ratio": "entropy_ratio",
}
_CNN = {"ch": "ch", "z_channels": "z_channels", "num_res_blocks": "num_res_blocks"}
_TRANSFORMER = {
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "heads",
    "num_classes": "num_classes",
    "pos_grid": "grid",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_aln",
    "attn_l2_norm": "attn_l2_norm",
}
_FIXED = {"norm_groups": 32, "norm_eps": 1e-6}
"""What no official tokenizer changes, and ours does not either."""


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    config = configured(fixture.model("tokenizer"), fixture.model("transformer"))
    system = build(config).eval()
    for part, table in keys(config).items():
        load_official(system.parts()[part], table, fixture.weights(part), source=f"{fixture.folder}: {part}")
    f = system.tokenizer.features(fixture.io["image"])
    yield "h", f
    yield from _single(system, f, fixture)
    for name, given in fixture.runs.items():
        outputs = {n: fixture.io[n] for n, about in fixture.tensors.items() if about["run"] == name}
        yield from _listed(system, f, fixture.io["labels"], given, outputs)


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    if "depth" in values:
        part, tokenizer = "transformer", {"codebook_size": values["V"], "codebook_embed_dim": values["Cvae"], "ch": 32}
        config = configured({**tokenizer, "ch_mult": [1]}, values)
    else:
        part, config = "tokenizer", configured(values, {"depth": 1, "embed_dim": 1, "num_heads": 1, "patch_nums": [1]})
    return build(config).parts()[part], keys(config)[part]


def configured(tokenizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> FlexVARConfig:
    """Our configuration from official constructor values; absent ones are the official defaults, which are ours."""
    for name, only in _FIXED.items():
        if tokenizer.get(name, only) != only:
            raise ValueError(f"group normalisation of the tokenizer has {name}={only}, got {tokenizer[name]}")
    down = tuple(tokenizer.get("encoder_ch_mult", tokenizer.get("ch_mult", (1, 1, 2, 2, 4))))
    up = tuple(tokenizer.get("decoder_ch_mult", down))
    cnn: dict[str, Any] = {"ch": 128, "z_channels": 256} | {
        ours: tokenizer[n] for n, ours in _CNN.items() if n in tokenizer
    }
    return FlexVARConfig(
        tokenizer=ResizedVQConfig(
            patch_nums=tuple(transformer["patch_nums"]),
            cnn=CNNConfig(ch_mult=down, decoder_ch_mult=() if up == down else up, **cnn),
            **{ours: tokenizer[name] for name, ours in _TOKENIZER.items() if name in tokenizer},
        ),
        label_drop=0.0,
        **{ours: transformer[name] for name, ours in _TRANSFORMER.items() if name in transformer},
    )


def sampling_of(given: Mapping[str, Any]) -> FlexVARSampling:
    """The settings of a recorded run, for which the most likely code counts as drawn."""
    if given["sampling"] != "argmax" or not given["constant_beyond_max_pn"]:
        raise ValueError(f"recorded runs take the most likely token and guide evenly beyond max_pn, got {given}")
    even = given["used_llamagen_cfg"]
    if given["guidance"] != ("constant" if even else "var_ramp"):
        raise ValueError(f"guidance is var_ramp, or constant with used_llamagen_cfg, got {given}")
    return FlexVARSampling(
        scales=tuple(given["patch_nums"]),
        cfg_scale=given["cfg"],
        guidance="constant" if even else "ramp",
        ramp_steps=given["ramp_steps_cap"],
        largest=given["max_pn"],
        top_k=given["top_k"],
        top_p=given["top_p"],
    )


def _single(system: FlexVAR, f: Tensor, fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """What belongs to no list: a map at its full size, and the positions before training."""
    tokenizer, layout = system.tokenizer, Layout((tuple(f.shape[2:]),))
    tokens = tokenizer.tokens(f, layout)
    items = len(fixture.io["single_map_recon"])
    yield "single_map_recon", tokenizer.reconstruct(tokenizer.codes(tokens[:items], layout, 0))
    channels, rows, columns = fixture.io["pos_init_first_channels"].shape
    position = waves(system.transformer.width, system.transformer.position.shape[-1])
    yield "pos_init_first_channels", position[0, :channels, :rows, :columns]


def _listed(
    system: FlexVAR, f: Tensor, labels: Tensor, given: Mapping[str, Any], outputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The outputs of one list of scales, named by their last words; their shapes say of how many items and tokens."""
    tokenizer, layout, cond = system.tokenizer, pyramid(tuple(given["patch_nums"])), _cond(system, labels)
    true, sampling = tokenizer.tokens(f, layout), sampling_of(given)
    drawn = _greedy(system, cond, sampling, len(labels))
    for name, wanted in outputs.items():
        items, n = len(wanted), wanted.shape[-2 if wanted.dim() == 3 else -1]
        first = {key: value[:items] for key, value in cond.items()}
        match name.partition("_")[2] if name.startswith("list") else name:
            case "gt_tokens":
                yield name, true[..., 0]
            case "tf_input":
                yield name, tokenizer.inputs(true, layout, 1)
            case "tf_logits":
                yield name, system.teacher(true[:items], first, layout).logits[:, :, 0]
            case "tf_loss":
                yield name, -system.teacher(true, cond, layout).log_prob(true).mean()[None]
            case "mask_visible":
                rows = Rows.of(layout.level_N)
                visible = render(system.see, rows, rows)
                yield name, torch.ones(layout.n, layout.n) if visible is None else visible[0, 0]
            case "decode_mid_scale_alone":
                rows = wanted.shape[2] // tokenizer.config.downsample
                k = min(range(layout.K), key=lambda k: (layout.levels[k][0] != rows, abs(k - layout.K // 2)))
                yield name, tokenizer.reconstruct(tokenizer.codes(true[:items], layout, k))
            case "ar_tokens" | "ar_tokens_constcfg":
                yield name, drawn[..., 0]
            case "ar_logits_guided":
                yield name, _follow(system, first, sampling, drawn[:items])[:, -n:]
            case "ar_image":
                yield name, tokenizer.reconstruct(tokenizer.codes(drawn[:items], layout, layout.K - 1))
            case "topk_passed":
                yield name, kept_codes(sampling, 1, layout)[0]


def _greedy(system: FlexVAR, cond: Cond, sampling: FlexVARSampling, items: int) -> Tensor:
    s = _unfiltered(system.start(cond, sampling, Noise.of(0, items)))
    s.knobs["temperature"] = torch.zeros_like(s.knobs["temperature"])
    for _ in walk(system, s):
        pass
    return s.tokens


def _follow(system: FlexVAR, cond: Cond, sampling: FlexVARSampling, tokens: Tensor) -> Tensor:
    """Guided logits [B, N, V] step by step along given tokens."""
    s, logits = _unfiltered(system.start(cond, sampling, Noise.of(0, len(tokens)))), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    return torch.cat(logits, 1)


def _unfiltered(s: State) -> State:
    """Without top-k and top-p, which leave the most likely code where it is."""
    s.knobs |= {name: torch.zeros_like(s.knobs[name]) for name in ("top_k", "top_p")}
    return s


def _cond(system: FlexVAR, labels: Tensor) -> Cond:
    return system.prepare({"class_labels": labels})
