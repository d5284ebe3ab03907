"""VAR against FoundationVision/VAR."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.systems.var import build, keys
from arvis.walk import finish, generate
from arvis.weights import load_official
from benchmarks.pairs import Pair, Sides, autocast, on_path, randomise, without_initialisation

LABEL, SCALE = 207, 4.0


def make(depth: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Greedy on both sides (`top_k=1`), so that the tokens can be compared; the work is that of any draw."""
    on_path(folder)
    without_initialisation()
    from models import build_vae_var  # pyright: ignore

    config = systems.preset(f"var-d{depth}")[2].config()
    vae, var = build_vae_var(
        V=4096,
        Cvae=32,
        ch=160,
        share_quant_resi=4,
        device="cpu",
        patch_nums=config.tokenizer.patch_nums,
        num_classes=1000,
        depth=depth,
        shared_aln=config.shared_aln,
    )
    for part in (vae, var):
        randomise(part)
        part.eval()
    system = build(config).eval()
    for name, part in (("tokenizer", vae), ("transformer", var)):
        load_official(system.parts()[name], keys(config)[name], part.state_dict())
    pack(system)
    sampling = replace(system.Sampling(), cfg_scale=SCALE, top_k=1, top_p=0.0)

    @torch.inference_mode()
    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            cond = system.prepare({"class_labels": [LABEL] * batch})
            s = finish(generate(system, cond, sampling, Noise.of(0, batch)))
            return (system.tokenizer.decode(s.tokens, s.layout).float() + 1) / 2

    @torch.inference_mode()
    def official(batch: int) -> Tensor:
        with autocast(dtype):
            labels = torch.full((batch,), LABEL)
            return var.autoregressive_infer_cfg(
                B=batch, label_B=labels, g_seed=0, cfg=SCALE, top_k=1, top_p=0.0
            ).float()

    return Sides(ours=ours, official=official)


def near_pixels(a: Tensor, b: Tensor) -> float:
    """The part of pixels within 1/50."""
    return float(((a - b).abs() < 0.02).float().mean())


PAIRS = {
    "var-d16": Pair(
        make=lambda folder, dtype: make(16, folder, dtype),
        batches=(1, 4),
        preset="var-d16",
        settings={"cfg_scale": SCALE},
        agreement=near_pixels,
        least={torch.float32: 0.99, torch.bfloat16: 0.0},
    ),
}
