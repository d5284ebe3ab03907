"""MAR against LTH14/mar. Its transformer block comes from timm, which is not installed: `Block` computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Source
from arvis.systems.mar import build, keys
from arvis.walk import finish, generate
from arvis.weights import load_official
from benchmarks.pairs import Pair, Sides, autocast, closeness, on_path, randomise, stand_in, without_initialisation

CHECKOUT = "mar"
LABEL, SCALE = 207, 2.9


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """The pre-norm block under the names and arguments that the official code uses."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Any, **rest: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Zero:
    """Noise that is none, so that both sides draw the same; orders are those of equal numbers, which is the raster."""

    def __init__(self, items: int) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def uniform(self, what: str, at: Any, shape: Any) -> Tensor:
        ramp = torch.linspace(0.1, 0.9, max(1, torch.Size(shape).numel()), dtype=torch.float64)
        return ramp.reshape(shape).expand(self.items, *shape)

    def normal(self, what: str, at: Any, shape: Any) -> Tensor:
        return torch.zeros(self.items, *shape, dtype=torch.float64)

    def take(self, rows: Tensor) -> Source:
        return Zero(len(rows))


def make(steps: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Without noise on both sides, where the latents can be compared; the official code asks for a GPU by name."""
    on_path(folder)
    without_initialisation()
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.vision_transformer", Block=Block)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    from models.mar import mar_base  # pyright: ignore
    from models.vae import AutoencoderKL  # pyright: ignore

    config = systems.preset("mar-b")[2].config()
    mar = mar_base(diffloss_d=6, diffloss_w=1024).eval()
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4)).eval()
    for part in (mar, vae):
        randomise(part)
    system = build(config).eval()
    for name, part in (("tokenizer", vae), ("transformer", mar)):
        load_official(system.parts()[name], keys(config)[name], part.state_dict())
    pack(system)
    sampling = replace(system.Sampling(), cfg_scale=SCALE, num_iter=steps, temperature=1.0)
    # an official order is drawn from its end: what stands first stays masked longest
    mar.sample_orders = lambda batch: torch.arange(mar.seq_len).flip(0).expand(batch, -1).clone()

    @torch.inference_mode()
    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            cond = system.prepare({"class_labels": [LABEL] * batch})
            s = finish(generate(system, cond, sampling, Zero(batch)))
            return system.tokenizer.decode(s.tokens, s.layout)

    @torch.inference_mode()
    def official(batch: int) -> Tensor:
        randn, randn_like = torch.randn, torch.randn_like
        torch.randn = lambda *shape, **more: torch.zeros(*shape)
        torch.randn_like = lambda x, **more: torch.zeros_like(x)
        try:
            with autocast(dtype):
                labels = torch.full((batch,), LABEL)
                latents = mar.sample_tokens(batch, steps, SCALE, "linear", labels, temperature=1.0)
                return vae.decode(latents / 0.2325)
        finally:
            torch.randn, torch.randn_like = randn, randn_like

    return Sides(ours=ours, official=official)


def _pair(steps: int) -> Pair:
    return Pair(
        make=lambda folder, dtype: make(steps, folder, dtype),
        batches=(1, 4),
        preset="mar-b",
        settings={"cfg_scale": SCALE, "num_iter": steps},
        agreement=closeness,
        # a denoiser of random weights makes much of rounding: after 2 steps pictures are 0.99 alike, after 16 0.65
        least={torch.float32: 0.5, torch.bfloat16: 0.0},
    )


PAIRS = {"mar-b, 64 steps": _pair(64), "mar-b, 16 steps": _pair(16)}
