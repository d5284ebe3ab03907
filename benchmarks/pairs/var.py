"""VAR against FoundationVision/VAR."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.systems.var import VAR, build, keys
from arvis.walk import finish, generate
from arvis.weights import load_official
from benchmarks.pairs import (
    CLOSE,
    EXACT,
    Pair,
    Sides,
    autocast,
    closeness,
    decode,
    encode,
    equal_share,
    ids,
    inference,
    near_pixels,
    on_path,
    pictures,
    randomise,
    same_update,
    updated,
    without_initialisation,
)

CHECKOUT = "VAR"
LABEL, SCALE = 207, 4.0


def changed(depth: int) -> dict[str, Any]:
    """What is not the published model's: so many of its equal blocks; nothing is left to chance in training."""
    return {"depth": depth, "label_drop": 0.0, "drop_path": 0.0}


def both(preset: str, depth: int, folder: Path) -> tuple[VAR, Any, Any]:
    """Our system, and the official tokenizer and transformer, with the same random weights."""
    on_path(folder)
    without_initialisation()
    from models import VAR as Official  # pyright: ignore
    from models import VQVAE  # pyright: ignore

    config = replace(systems.preset(preset)[2].config(), **changed(depth))
    scales = config.tokenizer.patch_nums
    vae = VQVAE(vocab_size=4096, z_channels=32, ch=160, test_mode=True, share_quant_resi=4, v_patch_nums=scales)
    var = Official(
        vae_local=vae,
        depth=depth,
        embed_dim=config.width,
        num_heads=config.heads,
        shared_aln=config.shared_aln,
        attn_l2_norm=True,
        patch_nums=scales,
    )
    system = build(config).eval()
    for name, part in (("tokenizer", vae), ("transformer", var)):
        randomise(part.eval())
        load_official(system.parts()[name], keys(config)[name], part.state_dict())
    return system, vae, var


def painting(preset: str, depth: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Greedy on both sides (`top_k=1`), so that the pictures can be compared; the work is that of any draw."""
    system, _, var = both(preset, depth, folder)
    pack(system)
    sampling = replace(system.Sampling(), cfg_scale=SCALE, top_k=1, top_p=0.0)

    def ours(batch: int) -> Tensor:
        cond = system.prepare({"class_labels": [LABEL] * batch})
        s = finish(generate(system, cond, sampling, Noise.of(0, batch)))
        return (system.tokenizer.decode(s.tokens, s.layout).float() + 1) / 2

    def official(batch: int) -> Tensor:
        labels = torch.full((batch,), LABEL)
        return var.autoregressive_infer_cfg(batch, labels, g_seed=0, cfg=SCALE, top_k=1, top_p=0.0).float()

    return inference(dtype, ours=ours, official=official)


def training(folder: Path, dtype: torch.dtype) -> Sides:
    """One update's loss and gradients, nothing dropped; the loss and a slice of a gradient are compared."""
    system, vae, var = both("var-d16", 16, folder)
    layout = system.tokenizer.layout()
    system.train()
    var.train()
    var.cond_drop_rate = 0.0
    for block in var.blocks:
        block.drop_path = nn.Identity()

    def batch_of(batch: int) -> dict[str, Tensor]:
        return {"tokens": ids(batch, layout.n, 4096), "class_labels": torch.arange(batch)}

    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            loss = system.loss(batch_of(batch), Noise.of(0, batch))["loss"]
        return updated(loss, system, system.transformer.word)

    def official(batch: int) -> Tensor:
        given = batch_of(batch)
        levels = given["tokens"][..., 0].split(list(layout.sizes), 1)
        with autocast(dtype):
            x = vae.quantize.idxBl_to_var_input(levels)
            logits = var(given["class_labels"], x)
            loss = F.cross_entropy(logits.flatten(0, 1), given["tokens"].flatten())
        return updated(loss, var, var.word_embed)

    return Sides(ours=ours, official=official)


def encoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Pictures to the ids of all scales."""
    system, vae, _ = both("var-d16", 16, folder)
    pack(system)

    return inference(
        dtype,
        ours=lambda batch: system.tokenizer.encode(pictures(batch))[..., 0],
        official=lambda batch: torch.cat(vae.img_to_idxBl(pictures(batch)), 1),
    )


def decoding(folder: Path, dtype: torch.dtype) -> Sides:
    """The ids of all scales to pictures."""
    system, vae, _ = both("var-d16", 16, folder)
    pack(system)
    layout = system.tokenizer.layout()

    def official(batch: int) -> Tensor:
        levels = ids(batch, layout.n, 4096)[..., 0].split(list(layout.sizes), 1)
        return vae.idxBl_to_img(levels, same_shape=True, last_one=True)

    return inference(dtype, ours=lambda batch: system.tokenizer.decode(ids(batch, layout.n, 4096)), official=official)


def _painting(preset: str, depth: int, batches: tuple[int, ...]) -> Pair:
    return Pair(
        make=lambda folder, dtype: painting(preset, depth, folder, dtype),
        batches=batches,
        preset=preset,
        changed=changed(depth),
        settings={"cfg_scale": SCALE},
        agreement=near_pixels,
        least=EXACT,
    )


PAIRS = {
    "var-d16": _painting("var-d16", 16, (1, 4)),
    "var-d36 shapes, 4 of 36 blocks, 512 px": _painting("var-d36", 4, (1,)),
    "var-d16 training": Pair(make=training, batches=(2,), agreement=same_update, least=CLOSE),
    "var encoding": Pair(
        make=encoding, batches=(4,), preset="var-d16", part=encode, agreement=equal_share, least=EXACT
    ),
    "var decoding": Pair(make=decoding, batches=(4,), preset="var-d16", part=decode, agreement=closeness, least=CLOSE),
}
