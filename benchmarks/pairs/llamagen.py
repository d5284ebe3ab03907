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
from benchmarks.pairs import Pair, Sides, autocast, closeness, equal_share, on_path, randomise, without_initialisation

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
    """Greedy on both sides; the official sampler casts its transformer and decodes in float32."""
    system, gpt, vq, sampler = both(side, folder)
    pack(system)
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
        ids = Noise.of(1, batch).uniform("ids", 0, (side**2, 1)) * 16384
        return {"tokens": ids.long(), "class_labels": torch.arange(batch)}

    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            loss = system.loss(batch_of(batch), Noise.of(0, batch))["loss"]
        system.zero_grad()
        loss.backward()
        return torch.cat((loss.detach().view(1), system.transformer.output.weight.grad[:4].flatten()))

    def official(batch: int) -> Tensor:
        given = batch_of(batch)
        ids = given["tokens"][..., 0]
        with autocast(dtype):
            _, loss = gpt(cond_idx=given["class_labels"], idx=ids[:, :-1], targets=ids)
        gpt.zero_grad()
        loss.backward()
        return torch.cat((loss.detach().view(1), gpt.output.weight.grad[:4].flatten()))

    return Sides(ours=ours, official=official)


def decoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Ids to pictures."""
    system, _, vq, _ = both(16, folder)
    pack(system)

    def ids_of(batch: int) -> Tensor:
        return (Noise.of(1, batch).uniform("ids", 0, (256, 1)) * 16384).long()

    @torch.inference_mode()
    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            return system.tokenizer.decode(ids_of(batch))

    @torch.inference_mode()
    def official(batch: int) -> Tensor:
        with autocast(dtype):
            return vq.decode_code(ids_of(batch)[..., 0], [batch, 8, 16, 16]).clamp(-1, 1)

    return Sides(ours=ours, official=official)


PRESETS = {16: "llamagen-l-256", 24: "llamagen-l-384"}
EXACT = {torch.float32: 0.99, torch.bfloat16: 0.0}
"""Greedy paths part for good at the first near tie, so rounded ones are only told apart, not required to agree."""


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
        make=lambda folder, dtype: training(16, folder, dtype),
        batches=(4,),
        agreement=closeness,
        least={torch.float32: 0.99, torch.bfloat16: 0.9},
    ),
    "llamagen decoding": Pair(
        make=decoding, batches=(4,), agreement=closeness, least={torch.float32: 0.99, torch.bfloat16: 0.9}
    ),
}
