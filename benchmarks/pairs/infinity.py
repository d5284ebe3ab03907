"""Infinity against FoundationVision/Infinity: the sizes of its 2B model, of whose equal blocks a few are built.

Texts are random features, so that no encoder is needed. What its classes ask for and what is not installed has plain
stand-ins: flash-attn's kernel for packed texts, timm's layers (not used at these settings), and names alone of
torchvision and pytz. Its normalisations are compiled, as its own sampler has them. A number format that it fixes for a
GPU by name holds on the CPU as well: its heads and its encoder stay in float32.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis import systems
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.systems.infinity import CaptionConfig, Infinity, build, keys, tokenizer_config
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
    inference,
    near_pixels,
    on_path,
    pictures,
    randomise,
    same_update,
    stand_in,
    updated,
    without_initialisation,
)

CHECKOUT = "Infinity"
SCALE, TAU, WORDS, BITS = 4.0, 0.5, 64, 32
SIZES = {"0.06M": 256, "1M": 1024}
"""Pixels along a side of the square sizes that are compared, by their official names."""


def changed(depth: int, size: str) -> dict[str, Any]:
    """What is not the 2B model's: blocks, picture size, length of texts; nothing is left to chance in training."""
    return {
        "depth": depth,
        "chunks": 2,
        "tokenizer": tokenizer_config(BITS, size),
        "caption": CaptionConfig(length=WORDS),
        "drop_path": 0.0,
        "label_drop": 0.0,
        "flip_strength": 0.0,
    }


# -- stand-ins ----------------------------------------------------------------------------------------------------


def packed_attention(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, **rest: Any
) -> Tensor:
    """Attention of texts that lie one after another: rows of q [N, H, c] and kv [M, 2, H, c] from end to end."""
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    parts = []
    for (a, b), (c, d) in spans:
        rows, seen, values = (x.transpose(0, 1)[None] for x in (q[a:b], *kv[c:d].unbind(1)))
        parts.append(F.scaled_dot_product_attention(rows, seen, values, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(parts)


def for_the_cpu(device: str = "cuda", dtype: torch.dtype | None = None, enabled: bool = True, **rest: Any) -> Any:
    """The autocast of a GPU, taken on the CPU; that to float32 is none."""
    return torch.autocast("cpu", torch.bfloat16, enabled and dtype != torch.float32)


def stand_ins() -> None:
    stand_in("flash_attn", flash_attn_func=lambda q, k, v: None, flash_attn_varlen_kvpacked_func=packed_attention)
    stand_in("timm")
    stand_in("timm.loss", SoftTargetCrossEntropy=type("SoftTargetCrossEntropy", (nn.Module,), {}))
    stand_in("timm.models", register_model=lambda build: build)
    stand_in("timm.models.layers", DropPath=type("DropPath", (nn.Module,), {}), drop_path=None)
    stand_in("torchvision", transforms=None)
    stand_in("pytz")
    torch.amp.autocast = for_the_cpu  # type: ignore[assignment,misc]
    torch.cuda.amp.autocast = partial(for_the_cpu, "cuda")  # type: ignore[assignment,misc]
    torch._dynamo.config.recompile_limit = 64  # each scale is another shape


def wide_kernel() -> None:
    """In float32 the official cross-attention rounds its operands, because its kernel has to; ours does not."""
    from infinity.models import basic  # pyright: ignore

    same = ModuleType("torch")
    vars(same).update(vars(torch), bfloat16=torch.float32)
    basic.torch = same


# -- both sides ---------------------------------------------------------------------------------------------------


def both(depth: int, size: str, folder: Path, dtype: torch.dtype) -> tuple[Infinity, Any, Any]:
    """Our system, and the official transformer and tokenizer, with the same random weights."""
    on_path(folder)
    without_initialisation()
    stand_ins()
    with redirect_stdout(sys.stderr):
        from infinity.models import Infinity as Official  # pyright: ignore
        from infinity.models.bsq_vae.vae import vae_model  # pyright: ignore

        config = replace(systems.preset("infinity-2b")[2].config(), **changed(depth, size))
        vae = vae_model(None, "dynamic", BITS, 2**BITS)
        transformer = Official(
            vae_local=vae,
            text_channels=2048,
            text_maxlen=WORDS,
            embed_dim=config.width,
            depth=depth,
            num_heads=config.heads,
            block_chunks=config.chunks,
            shared_aln=True,
            cond_drop_rate=0.0,
            fused_norm=True,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
            pn=size,
        )
    if dtype == torch.float32:
        wide_kernel()
    system = build(config).eval()
    for name, part in (("tokenizer", vae), ("transformer", transformer)):
        randomise(part.eval())
        load_official(system.parts()[name], keys(config)[name], part.state_dict())
    return system, transformer, vae


def schedule(system: Infinity) -> list[tuple[int, int, int]]:
    """Scales (t, h, w) of one picture."""
    return [(1, h, w) for h, w in system.tokenizer.layout().levels]


def texts(batch: int) -> Tensor:
    """Features [B, WORDS, 2048]."""
    return torch.randn(batch, WORDS, 2048, generator=torch.Generator().manual_seed(1))


def packed(features: Tensor) -> tuple[Tensor, list[int], Tensor, int]:
    """Features as the official code takes them: one after another, their lengths, their ends, the longest."""
    items, length = features.shape[:2]
    ends = torch.arange(items + 1, dtype=torch.int32) * length
    return features.flatten(0, 1), [length] * items, ends, length


def painting(depth: int, size: str, folder: Path, dtype: torch.dtype) -> Sides:
    """Greedy on both sides. In bfloat16 the official sampler casts its blocks; norms with weights take no such mixture
    on a CPU and keep float32, in which a GPU computes them."""
    system, official_, vae = both(depth, size, folder, dtype)
    pack(system)
    official_.requires_grad_(False)
    for block in official_.unregistered_blocks:
        block.to(dtype).ca_norm.float()
    sampling = replace(system.Sampling(), cfg_scale=SCALE, temperature=TAU, top_k=1, top_p=0.0)
    scales = schedule(system)

    def ours(batch: int) -> Tensor:
        cond = system.prepare({"text_features": texts(batch)})
        s = finish(generate(system, cond, sampling, Noise.of(0, batch)))
        return (system.tokenizer.decode(s.tokens, s.layout).float() + 1) / 2

    def official(batch: int) -> Tensor:
        *_, painted = official_.autoregressive_infer_cfg(
            vae=vae,
            scale_schedule=scales,
            label_B_or_BLT=packed(texts(batch)),
            B=batch,
            g_seed=0,
            cfg_list=[SCALE] * len(scales),
            tau_list=[TAU] * len(scales),
            top_k=1,
            cfg_insertion_layer=[0],
            vae_type=BITS,
            returns_vemb=1,
            ret_img=True,
            inference_mode=True,
        )
        return painted.flip(-1).permute(0, 3, 1, 2) / 255

    return inference(dtype, ours=ours, official=official)


def training(depth: int, size: str, folder: Path, dtype: torch.dtype) -> Sides:
    """One update's loss and gradients from features of pictures, without flips; the loss and a slice of a gradient are
    compared."""
    system, official_, vae = both(depth, size, folder, dtype)
    from infinity.models.bitwise_self_correction import BitwiseSelfCorrection  # pyright: ignore

    scales, side = schedule(system), SIZES[size] // 16
    correct = BitwiseSelfCorrection(
        vae,
        Namespace(
            noise_apply_layers=13,
            noise_apply_requant=1,
            noise_apply_strength=0,
            apply_spatial_patchify=0,
            debug_bsc=0,
        ),
    )
    weight = torch.cat([torch.full((h * w,), (h * w) ** -0.5) for _, h, w in scales])
    system.train()
    official_.train()

    def features(batch: int) -> Tensor:
        return torch.randn(batch, BITS, side, side, generator=torch.Generator().manual_seed(2))

    def ours(batch: int) -> Tensor:
        with autocast(dtype):
            given = {"features": features(batch), "text_features": texts(batch)}
            loss = system.loss(given, Noise.of(0, batch))["loss"]
        return updated(loss, system, system.transformer.word)

    def official(batch: int) -> Tensor:
        with autocast(dtype):
            with torch.no_grad():
                x, bits = correct.flip_requant(scales, None, features(batch), "cpu")
            logits = official_(packed(texts(batch)), x, scales).unflatten(-1, (-1, 2))
            nats = F.cross_entropy(logits.movedim(-1, 1), torch.cat(bits, 1).long(), reduction="none").mean(-1)
            loss = (nats * weight / weight.sum()).sum(1).mean()
        return updated(loss, official_, official_.word_embed)

    return Sides(ours=ours, official=official)


def encoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Pictures to the bits of all scales."""
    system, _, vae = both(2, "0.06M", folder, dtype)
    pack(system)
    scales = schedule(system)

    def official(batch: int) -> Tensor:
        _, _, _, bits, _, _ = vae.encode(pictures(batch), scales)
        return torch.cat([x.flatten(1, 3) for x in bits], 1)

    return inference(dtype, ours=lambda batch: system.tokenizer.encode(pictures(batch)), official=official)


def decoding(folder: Path, dtype: torch.dtype) -> Sides:
    """Bits of all scales to pictures."""
    system, _, vae = both(2, "0.06M", folder, dtype)
    pack(system)
    layout, scales = system.tokenizer.layout(), schedule(system)

    def bits(batch: int) -> Tensor:
        return (Noise.of(1, batch).uniform("bits", 0, (layout.n, BITS)) < 0.5).long()

    def official(batch: int) -> Tensor:
        levels: Sequence[Tensor] = bits(batch).split(list(layout.sizes), 1)
        cells = [x.unflatten(1, scale) for x, scale in zip(levels, scales, strict=True)]
        return vae.decode_from_indices(cells, scales, "bit_label")[1]

    return inference(dtype, ours=lambda batch: system.tokenizer.decode(bits(batch)), official=official)


def _painting(depth: int, size: str, batches: tuple[int, ...]) -> Pair:
    return Pair(
        make=lambda folder, dtype: painting(depth, size, folder, dtype),
        batches=batches,
        preset="infinity-2b",
        changed=changed(depth, size),
        settings={"cfg_scale": SCALE, "temperature": TAU},
        agreement=near_pixels,
        least=EXACT,
    )


def _coding(make: Callable[[Path, torch.dtype], Sides], part: Callable[[Any, int], Callable[[], Any]]) -> Pair:
    return Pair(
        make=make,
        batches=(4,),
        preset="infinity-2b",
        changed=changed(2, "0.06M"),
        part=part,
        agreement=closeness,
        least=CLOSE,
    )


NAME = "infinity-2b shapes, 4 of 32 blocks"

PAIRS = {
    f"{NAME}, 256 px": _painting(4, "0.06M", (1, 4)),
    f"{NAME}, 1024 px": _painting(4, "1M", (1,)),
    f"{NAME}, 256 px training": Pair(
        make=lambda folder, dtype: training(4, "0.06M", folder, dtype), batches=(2,), agreement=same_update, least=CLOSE
    ),
    "infinity encoding": replace(_coding(encoding, encode), agreement=equal_share, least=EXACT),
    "infinity decoding": _coding(decoding, decode),
}
