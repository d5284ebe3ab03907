"""LlamaGen against FoundationVision/LlamaGen."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.systems.llamagen import build, keys
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
    on_path,
    pictures,
    randomise,
    same_update,
    updated,
    without_initialisation,
)

CHECKOUT = "LlamaGen"
LABEL, SCALE = 207, 4.0


def both(side: int, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Our system, the official transformer, tokenizer and sampler, with the same random weights."""
    on_path(folder)
    without_initialisation()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from autoregressive.models.generate import generate as sampler  # pyright: ignore
    from autoregressive.models.gpt import GPT_models  # pyright: ignore
    from tokenizer.tokenizer_image.vq_model import VQ_models  # pyright: ignore

    config = replace(systems.preset(PRESETS[side])[2].config(), drop=0.0, dropout=0.0)
    sizes = {"vocab_size": 16384, "block_size": side**2, "num_classes": 1000, "cls_token_num": 1, "model_type": "c2i"}
    gpt = GPT_models["GPT-L"](**sizes, resid_dropout_p=0.0, ffn_dropout_p=0.0, token_dropout_p=0.0)
    gpt.cls_embedding.dropout_prob = 0.0
    vq = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8)
    system = build(config).eval()
    for name, part in (("tokenizer", vq), ("transformer", gpt)):
        randomise(part.eval())
        load_official(system.parts()[name], keys(config)[name], part.state_dict(), strict=False)
    return system, gpt, vq, sampler


def painting(side: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Greedy on both sides, our steps compiled; the official sampler casts its transformer and decodes in float32."""
    system, gpt, vq, sampler = both(side, folder)
    pack(system)
    system.compile_step()
    gpt.to(dtype)
    sampling = replace(system.Sampling(), cfg_scale=SCALE, cfg_interval=-1, top_k=1, top_p=1.0, temperature=1.0)

    @torch.inference_mode()
    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            cond = system.prepare({"class_labels": [LABEL] * batch})
            s = finish(generate(system, cond, sampling, Noise.of(0, batch)))
            system.tokenizer.decode(s.tokens, s.layout)
            return s.tokens[..., 0]

    @torch.inference_mode()
    def official(batch: int) -> Tensor:
        labels = torch.full((batch,), LABEL)
        tokens = sampler(gpt, labels, side**2, cfg_scale=SCALE, cfg_interval=-1, temperature=1.0, top_k=1, top_p=1.0)
        vq.decode_code(tokens, [batch, 8, side, side])
        return tokens.long()

    return Sides(ours=ours, official=official)


def training(side: int, folder: Path, dtype: torch.dtype) -> Sides:
    """One update's loss and gradients without dropout; the loss and a slice of a gradient are compared."""
    system, gpt, _, _ = both(side, folder)
    system.train()
    gpt.train()

    def batch_of(batch: int) -> dict[str, Tensor]:
        return {"tokens": ids(batch, side**2, 16384), "class_labels": torch.arange(batch)}

    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            loss = system.loss(batch_of(batch), Noise.of(0, batch))["loss"]
        return updated(loss, system, system.transformer.output)

    def official(batch: int) -> Tensor:
        given = batch_of(batch)
        codes = given["tokens"][..., 0]
        with autocast(dtype):
            _, loss = gpt(cond_idx=given["class_labels"], idx=codes[:, :-1], targets=codes)
        return updated(loss, gpt, gpt.output)

    return Sides(ours=ours, official=official)


def encoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Pictures to ids."""
    system, _, vq, _ = both(16, folder)
    pack(system)
    return inference(
        dtype,
        ours=lambda batch: system.tokenizer.encode(pictures(batch))[..., 0],
        official=lambda batch: vq.encode(pictures(batch))[2][2].view(batch, -1),
    )


def decoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Ids to pictures."""
    system, _, vq, _ = both(16, folder)
    pack(system)

    def official(batch: int) -> Tensor:
        return vq.decode_code(ids(batch, 256, 16384)[..., 0], [batch, 8, 16, 16]).clamp(-1, 1)

    return inference(dtype, ours=lambda batch: system.tokenizer.decode(ids(batch, 256, 16384)), official=official)


PRESETS = {16: "llamagen-l-256", 24: "llamagen-l-384"}


def _painting(side: int, batches: tuple[int, ...]) -> Pair:
    return Pair(
        make=lambda folder, dtype: painting(side, folder, dtype),
        batches=batches,
        preset=PRESETS[side],
        settings={"cfg_scale": SCALE},
        agreement=equal_share,
        least=EXACT,
    )


PAIRS = {
    "llamagen-l-256": _painting(16, (1, 4, 16)),
    "llamagen-l-384": _painting(24, (1, 8)),
    "llamagen-l-256 training": Pair(
        make=lambda folder, dtype: training(16, folder, dtype), batches=(4,), agreement=same_update, least=CLOSE
    ),
    "llamagen encoding": Pair(
        make=encoding, batches=(4,), preset="llamagen-l-256", part=encode, agreement=equal_share, least=EXACT
    ),
    "llamagen decoding": Pair(
        make=decoding, batches=(4,), preset="llamagen-l-256", part=decode, agreement=closeness, least=CLOSE
    ),
}
