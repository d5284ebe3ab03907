"""VAR against its official code, and full-size VAR checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import pinned
from arvis.editing import box_mask, keep_tokens
from arvis.noise import Noise, Recorded
from arvis.parity.harness import Fixture
from arvis.rows import Rows, render
from arvis.sampling import top_k, top_p
from arvis.state import Cond, State
from arvis.systems.var import VAR, VARConfig, VARSampling, build, keys, smooth
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import Pin, at
from arvis.walk import walk
from arvis.weights import Key, load_official

_CNN = ("ch", "ch_mult", "num_res_blocks", "in_channels", "z_channels", "using_sa", "using_mid_sa")
_PYRAMID = ("vocab_size", "z_channels", "beta", "using_znorm", "quant_conv_ks", "quant_resi", "share_quant_resi")
_TRANSFORMER = {
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "heads",
    "num_classes": "num_classes",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_aln",
    "attn_l2_norm": "attn_l2_norm",
}


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    config = configured(fixture.model("tokenizer"), fixture.model("transformer"))
    system = build(config).eval()
    for part, table in keys(config).items():
        load_official(system.parts()[part], table, fixture.weights(part), source=f"{fixture.folder}: {part}")
    runs, io, layout = fixture.runs, fixture.io, system.tokenizer.layout()
    tokens = system.tokenizer.encode(io["image"], layout)
    yield from _tokenizer(system, io["image"], tokens, runs["tokenizer"])
    yield from _teacher(system, tokens, io["labels"], runs["teacher_forcing"]["null_class"])
    yield from _sampled(system, io["labels"], runs["ar"], runs["teacher_forcing"]["null_class"])
    yield from _filtered(io["filter_in"], runs["filter"])
    yield from _smooth(system, io["labels"], io["smooth_exp_noise"], runs["smooth"])
    yield from _edited(system, tokens, runs["edit"])


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    if "depth" in values:
        part = "transformer"
        named = {"vocab_size": "vocab_size", "z_channels": "Cvae", "v_patch_nums": "patch_nums"}
        config = configured({ours: values[theirs] for ours, theirs in named.items()}, values)
    else:
        part = "tokenizer"
        smallest = {"depth": 1, "embed_dim": 1, "num_heads": 1, "patch_nums": values["v_patch_nums"]}
        config = configured(values, smallest)
    return build(config).parts()[part], keys(config)[part]


def configured(tokenizer: Mapping[str, Any], transformer: Mapping[str, Any]) -> VARConfig:
    """Our configuration from official constructor values; absent ones are the official defaults, which are ours."""
    patch_nums = tuple(tokenizer["v_patch_nums"])
    if tuple(transformer["patch_nums"]) != patch_nums:
        raise ValueError(f"tokenizer and transformer differ in scales: {patch_nums} and {transformer['patch_nums']}")
    cnn = {name: tokenizer[name] for name in _CNN if name in tokenizer}
    if "ch_mult" in cnn:
        cnn["ch_mult"] = tuple(cnn["ch_mult"])
    pyramid = {name: tokenizer[name] for name in _PYRAMID if name in tokenizer}
    return VARConfig(
        tokenizer=PyramidVQConfig(patch_nums=patch_nums, cnn=CNNConfig(**cnn), **pyramid),
        label_drop=0.0,
        **{ours: transformer[name] for name, ours in _TRANSFORMER.items() if name in transformer},
    )


def _tokenizer(system: VAR, image: Tensor, tokens: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    tokenizer, layout = system.tokenizer, system.tokenizer.layout()
    f, fhats = tokenizer.features(image), tokenizer.fhats(tokens, layout)
    yield "f", f
    yield "idx_all_scales", tokens[..., 0]
    for k in given["fhat_scales"]:
        yield f"fhat_{k}", fhats[k]
    yield "fhat_mse_per_scale", torch.stack([F.mse_loss(fhat, f) for fhat in fhats])
    yield "var_input", tokenizer.inputs(tokens, layout, 1)
    yield "recon_from_idx", tokenizer.decode(tokens, layout)
    coarse = torch.arange(layout.n)[None] < layout.offsets[given["recon_scale"] + 1]
    yield "recon_scale_mid", tokenizer.decode(tokens[:1], layout, coarse)
    trained, quantized = tokenizer(image, layout)
    yield "train_forward_rec", trained[:1]
    yield "train_forward_vq_loss", quantized.losses["vq"][None]


def _teacher(system: VAR, tokens: Tensor, labels: Tensor, null_class: int) -> Iterator[tuple[str, Tensor]]:
    layout = system.tokenizer.layout()
    yield "tf_logits", system.teacher(tokens, _cond(system, labels)).logits[:, :, 0]
    yield "tf_logits_uncond", system.teacher(tokens[:1], _cond(system, [null_class])).logits[:, :, 0]
    batch = {"tokens": tokens, "class_labels": labels}
    yield "tf_loss", system.loss(batch, Noise.of(0, len(tokens)))["loss"][None]
    rows = Rows.of(layout.level_N)
    visible = render(system.see, rows, rows)
    yield "mask_visible", torch.ones(layout.n, layout.n) if visible is None else visible[0, 0]


def _sampled(system: VAR, labels: Tensor, given: Mapping[str, Any], null_class: int) -> Iterator[tuple[str, Tensor]]:
    cond, noise = _cond(system, labels), Noise.of(0, len(labels))
    s = system.start(cond, _greedy(given), noise)
    for _ in walk(system, s):
        pass
    tokens = s.tokens
    yield "ar_tokens", tokens[..., 0]
    yield "ar_image01", _image01(system, tokens)

    s = _roomy(system.start(cond, _unfiltered(given), noise))
    yield "ar_logits_guided", _follow(system, s, tokens)
    k, v = (_streams(store[0]) for store in (s.cache["trunk"].k, s.cache["trunk"].v))
    if given["cfg"] == 0:  # then nothing needs the null row here, but the official code computes it all the same
        null = _cond(system, torch.full_like(labels, null_class))
        s = _roomy(system.start(null, VARSampling.plain(), noise))
        _follow(system, s, tokens)
        k, v = (torch.cat((a, _streams(b[0]))) for a, b in ((k, s.cache["trunk"].k), (v, s.cache["trunk"].v)))
    yield "ar_block0_cached_k_lastpos", k[:, :, -given["cached_tail"] :]
    yield "ar_block0_cached_v_lastpos", v[:, :, -given["cached_tail"] :]
    yield "ar_block0_cache_shape", torch.tensor(k.shape)


def _filtered(logits: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    cases = [top_p(top_k(logits[:, :, None], case["top_k"]), case["top_p"])[:, :, 0] for case in given["cases"]]
    yield "filter_probs", torch.cat(cases).softmax(-1)


def _smooth(system: VAR, labels: Tensor, exponential: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    layout, items = system.tokenizer.layout(), given["batch"]
    uniform = (-exponential.double()).exp()  # Gumbel noise is -log E, and -log(-log u) here
    noise = Recorded({"gumbel": [uniform[:, layout.span(k)] for k in range(layout.K)]}, {}, items)
    sampling = VARSampling(cfg_scale=_ramp(given), top_k=given["top_k"], top_p=given["top_p"])
    yield "smooth_fhat", smooth(system, _cond(system, labels[:items]), sampling, noise)


def _edited(system: VAR, tokens: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    layout, items = system.tokenizer.layout(), len(tokens)
    y, x = layout.levels[-1]
    box = box_mask(tuple(given["box_y0x0y1x1"]), (y, x))
    keep = ~box if given["inpainting"] else box
    kept = keep_tokens(keep, layout)
    yield "edit_keep_mask", keep
    yield "edit_keep_per_token", kept[0]

    cond = _cond(system, [given["class_label"]] * items)
    pin, noise, sampling = Pin(kept.expand(items, -1), tokens), Noise.of(0, items), _greedy(given)
    s, raw = system.start(cond, sampling, noise), []
    while not bool(s.done.all()):
        d = system.predict(s)
        raw.append(d.sample(noise))
        system.commit(s, d, pinned(raw[-1], pin.at(d.where)))
    yield "edit_tokens_sampled", torch.cat(raw, 1)[..., 0]

    s = system.start(cond, sampling, noise, given=pin)
    for _ in walk(system, s):
        pass
    yield "edit_image01", _image01(system, s.tokens)


def _cond(system: VAR, labels: Any) -> Cond:
    return system.prepare({"class_labels": labels})


def _ramp(given: Mapping[str, Any]) -> float:
    if given["guidance"] != "var_ramp":
        raise ValueError(f"guidance here is var_ramp, got {given['guidance']!r}")
    return given["cfg"]


def _greedy(given: Mapping[str, Any]) -> VARSampling:
    if given["sampling"] != "argmax":
        raise ValueError(f"recorded runs take the most likely token (argmax), got {given['sampling']!r}")
    return VARSampling(cfg_scale=_ramp(given), top_k=0, top_p=0.0, temperature=0.0)


def _unfiltered(given: Mapping[str, Any]) -> VARSampling:
    return VARSampling(cfg_scale=_ramp(given), top_k=0, top_p=0.0)


def _roomy(s: State) -> State:
    """With room in the cache for the last scale, too, whose rows are then written there like any others."""
    s.cache["trunk"].reserve(s.layout.n)
    return s


def _follow(system: VAR, s: State, tokens: Tensor) -> Tensor:
    """Guided logits [B, N, V] step by step along given tokens."""
    logits = []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    return torch.cat(logits, 1)


def _streams(store: Tensor) -> Tensor:
    """[B, G, ...] as the official code has it: all conditional rows, then all null rows."""
    return store.transpose(0, 1).flatten(0, 1)


def _image01(system: VAR, tokens: Tensor) -> Tensor:
    return (system.tokenizer.decode(tokens, system.tokenizer.layout()) + 1) / 2
