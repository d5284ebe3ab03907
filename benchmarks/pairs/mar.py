"""MAR against LTH14/mar. Its transformer block comes from timm, which is not installed: `Block` computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Source
from arvis.systems.mar import MAR, build, hidden_count, keys
from arvis.walk import finish, generate
from arvis.weights import load_official
from benchmarks.pairs import (
    CLOSE,
    Pair,
    Sides,
    autocast,
    closeness,
    decode,
    encode,
    inference,
    on_path,
    pictures,
    randomise,
    same_update,
    stand_in,
    updated,
    without_initialisation,
)

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


@contextmanager
def still() -> Iterator[None]:
    """torch's normal numbers are zeros."""
    randn, randn_like = torch.randn, torch.randn_like
    torch.randn, torch.randn_like = lambda *shape, **more: torch.zeros(*shape), lambda x, **more: torch.zeros_like(x)
    try:
        yield
    finally:
        torch.randn, torch.randn_like = randn, randn_like


def both(folder: Path) -> tuple[MAR, Any, Any]:
    """Our system, and the official transformer and tokenizer, with the same random weights, without dropout; the
    official code asks for a GPU by name."""
    on_path(folder)
    without_initialisation()
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.vision_transformer", Block=Block)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    from models.mar import mar_base  # pyright: ignore
    from models.vae import AutoencoderKL  # pyright: ignore

    config = systems.preset("mar-b")[2].config()
    config = replace(config, attn_dropout=0.0, proj_dropout=0.0, label_drop=0.0)
    mar = mar_base(diffloss_d=6, diffloss_w=1024, label_drop_prob=0.0).eval()
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4)).eval()
    system = build(config).eval()
    for name, part in (("tokenizer", vae), ("transformer", mar)):
        randomise(part)
        load_official(system.parts()[name], keys(config)[name], part.state_dict())
    # an official order is drawn from its end: what stands first stays masked longest
    mar.sample_orders = lambda bsz: torch.arange(mar.seq_len).flip(0).expand(bsz, -1).clone()
    return system, mar, vae


def painting(steps: int, folder: Path, dtype: torch.dtype) -> Sides:
    """Without noise on both sides, where pictures can be compared."""
    system, mar, vae = both(folder)
    pack(system)
    sampling = replace(system.Sampling(), cfg_scale=SCALE, num_iter=steps, temperature=1.0)

    def ours(batch: int) -> Tensor:
        cond = system.prepare({"class_labels": [LABEL] * batch})
        s = finish(generate(system, cond, sampling, Zero(batch)))
        return system.tokenizer.decode(s.tokens, s.layout)

    def official(batch: int) -> Tensor:
        with still():
            labels = torch.full((batch,), LABEL)
            return vae.decode(mar.sample_tokens(batch, steps, SCALE, "linear", labels, temperature=1.0) / 0.2325)

    return inference(dtype, ours=ours, official=official)


def training(folder: Path, dtype: torch.dtype) -> Sides:
    """One update's loss and gradients on latents, with the same tokens hidden and the same times on both sides, no
    noise; the loss and a slice of a gradient are compared."""
    system, mar, _ = both(folder)
    system.train()
    mar.train()
    n, mul, config = mar.seq_len, mar.diffusion_batch_mul, system.config
    hidden = hidden_count(n, float(Zero(1).uniform("share", 0, ())), config.mask_ratio_min)
    mar.mask_ratio_generator = SimpleNamespace(rvs=lambda size: [hidden / n])
    times = torch.zeros(mul, n, dtype=torch.int64)  # of a token that is seen: any, it counts for nothing
    times[:, n - hidden :] = (Zero(1).uniform("time", 0, (mul, hidden))[0] * config.diffusion_steps).long()

    def ours(batch: int) -> Tensor:
        given = {"tokens": latents(batch), "class_labels": torch.arange(batch)}
        with autocast(dtype):
            loss = system.loss(given, Zero(batch))["loss"]
        return updated(loss, system, system.transformer.encoder.embed)

    def official(batch: int) -> Tensor:
        randint, tokens = torch.randint, latents(batch)
        torch.randint = lambda *given, **more: times[:, None].expand(-1, batch, -1).flatten()
        try:
            with still(), autocast(dtype):
                loss = mar(mar.unpatchify(tokens), torch.arange(batch))
        finally:
            torch.randint = randint
        return updated(loss, mar, mar.z_proj)

    return Sides(ours=ours, official=official)


def latents(batch: int) -> Tensor:
    """Random tokens [B, 256, 16] of about unit deviation."""
    return torch.randn(batch, 256, 16, generator=torch.Generator().manual_seed(3))


def encoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Pictures to the means of their latents."""
    system, mar, vae = both(folder)
    pack(system)
    return inference(
        dtype,
        ours=lambda batch: system.tokenizer.encode(pictures(batch)),
        official=lambda batch: mar.patchify(vae.encode(pictures(batch)).mean * 0.2325),
    )


def decoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Latents to pictures."""
    system, mar, vae = both(folder)
    pack(system)
    return inference(
        dtype,
        ours=lambda batch: system.tokenizer.decode(latents(batch)),
        official=lambda batch: vae.decode(mar.unpatchify(latents(batch)) / 0.2325).clamp(-1, 1),
    )


def _painting(steps: int) -> Pair:
    return Pair(
        make=lambda folder, dtype: painting(steps, folder, dtype),
        batches=(1, 4),
        preset="mar-b",
        settings={"cfg_scale": SCALE, "num_iter": steps},
        agreement=closeness,
        # a denoiser of random weights makes much of rounding: after 2 steps pictures are 0.99 alike, after 16 0.65
        least={torch.float32: 0.5, torch.bfloat16: 0.0},
    )


PAIRS = {
    "mar-b, 64 steps": _painting(64),
    "mar-b, 16 steps": _painting(16),
    "mar-b training": Pair(make=training, batches=(4,), agreement=same_update, least=CLOSE),
    "mar encoding": Pair(make=encoding, batches=(4,), preset="mar-b", part=encode, agreement=closeness, least=CLOSE),
    "mar decoding": Pair(make=decoding, batches=(4,), preset="mar-b", part=decode, agreement=closeness, least=CLOSE),
}
