"""LlamaGen against FoundationVision/LlamaGen."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.systems.llamagen import build, keys
from arvis.walk import finish, generate
from arvis.weights import load_official
from benchmarks.pairs import Pair, Sides, autocast, equal_share, on_path, randomise, without_initialisation

LABEL, SCALE = 207, 4.0


def make(side: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Greedy on both sides; the official sampler casts its transformer and decodes in float32."""
    on_path(folder)
    without_initialisation()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from autoregressive.models.generate import generate as official_generate  # pyright: ignore
    from autoregressive.models.gpt import GPT_models  # pyright: ignore
    from tokenizer.tokenizer_image.vq_model import VQ_models  # pyright: ignore

    preset = "llamagen-l-256" if side == 16 else "llamagen-l-384"
    config = systems.preset(preset)[2].config()
    gpt = GPT_models["GPT-L"](
        vocab_size=16384, block_size=side**2, num_classes=1000, cls_token_num=1, model_type="c2i"
    ).eval()
    vq = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8).eval()
    for part in (gpt, vq):
        randomise(part)
    system = build(config).eval()
    for name, part in (("tokenizer", vq), ("transformer", gpt)):
        load_official(system.parts()[name], keys(config)[name], part.state_dict(), strict=False)
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
        tokens = official_generate(
            gpt, labels, side**2, cfg_scale=SCALE, cfg_interval=-1, temperature=1.0, top_k=1, top_p=1.0
        )
        vq.decode_code(tokens, [batch, 8, side, side])
        return tokens.long()

    return Sides(ours=ours, official=official)


def _pair(side: int, batches: tuple[int, ...]) -> Pair:
    return Pair(
        make=lambda folder, dtype: make(side, folder, dtype),
        batches=batches,
        preset="llamagen-l-256" if side == 16 else "llamagen-l-384",
        settings={"cfg_scale": SCALE},
        agreement=equal_share,
        least={torch.float32: 0.99, torch.bfloat16: 0.0},
    )


PAIRS = {"llamagen-l-256": _pair(16, (1, 4, 16)), "llamagen-l-384": _pair(24, (1, 8))}
