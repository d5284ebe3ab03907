"""MVAR: next-scale prediction where a scale sees itself alone, and in large scales a cell only its neighbourhood.

MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning, arXiv 2505.12742. Weights: MIT.

The input of a scale is the picture so far, so the scales before it need not be seen, and what a cell of a large scale
needs of it lies around the cell: rule `near`, O(N k^2) instead of O(N^2). Nothing is cached. Scales do not see each
other, so they can be learned apart: an update learns all small scales at once or one large one, in a fixed rotation,
and never holds more rows than the largest scale has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.neighbourhood import InsideScales, near
from arvis.nn.scales import ClassConditioner, ScaleTransformer
from arvis.noise import Source
from arvis.published import File, Preset, Result
from arvis.rows import See, same
from arvis.sampling import per_item
from arvis.state import Cond, State
from arvis.systems import var
from arvis.systems.var import (
    PATCH_NUMS_256,
    TOKENIZER_KEYS,
    TRANSFORMER_KEYS,
    VAR,
    VARConfig,
    adaln_block,
    assemble,
    scale_keys,
)
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig
from arvis.tokens import Layout, Pin, Space, pyramid
from arvis.weights import Key


@dataclass(frozen=True, kw_only=True)
class MVARSampling:
    """Official sampling settings; each may be one number or one per item. `cfg_scale` is t at the last scale; a scale
    of 1 turns guidance off, as 0 does (Compat: it is how the official code is told to leave it out)."""

    cfg_scale: float = 2.7
    top_k: int = 1200
    top_p: float = 0.99
    temperature: float = 1.0

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=0.0, top_k=0, top_p=0.0)


@dataclass(frozen=True, kw_only=True)
class MVARConfig:
    """The transformer over scales; scales from `refine_step` on are seen through windows of `kernel_size` cells.

    Of ratio_k + K - refine_step updates, `ratio_k` learn all scales before `refine_step`, then each other scale one.
    """

    scale: VARConfig
    kernel_size: int = 7
    refine_step: int = 8
    ratio_k: int = 8

    def __post_init__(self) -> None:
        scales = len(self.scale.tokenizer.patch_nums)
        if not 0 < self.refine_step <= scales or self.ratio_k < 1:
            raise ValueError(
                f"refine_step is 1..{scales} and ratio_k at least 1, got {self.refine_step=} {self.ratio_k=}"
            )


class MVAR(nn.Module):
    """VAR's three verbs under a Markov rule, and the loss of one segment of scales at a time."""

    Sampling: ClassVar[type] = MVARSampling

    def __init__(
        self,
        tokenizer: PyramidVQ,
        transformer: ScaleTransformer,
        see: See,
        *,
        refine: int,
        ratio: int,
        label_drop: float,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.see = tokenizer, transformer, see
        self.refine, self.ratio, self.label_drop = refine, ratio, label_drop
        self.space: Space = tokenizer.space

    @property
    def scales(self) -> VAR:
        """The verbs of next-scale prediction, over the same parts."""
        return VAR(self.tokenizer, self.transformer, self.see, self.label_drop)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return self.scales.parts()

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.scales.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.scales.prepare(request)

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        scale = per_item(sampling.cfg_scale, len(noise))
        return self.scales.start(
            cond, replace(sampling, cfg_scale=scale.masked_fill(scale == 1, 0)), noise, layout, given
        )

    def predict(self, s: State) -> Categorical:
        return self.scales.predict(s)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self.scales.commit(s, d, x_BnS)

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        """The distribution of every token given the true coarser scales, logits [B, N, 1, V], in one pass."""
        return self.scales.teacher(tokens, cond, layout)

    # -- training -------------------------------------------------------------------------------------------------

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What can be stored of pictures [B, 3, Y, X] for training: their tokens [B, N, 1]."""
        return self.scales.latents(image)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(first, last + 1) of the scales that are learned together: the small ones, then each of the others."""
        return ((0, self.refine), *((k, k + 1) for k in range(self.refine, self.transformer.layout.K)))

    def turn(self, step: int) -> tuple[int, int]:
        """The segment that update `step` learns."""
        at = step % (self.ratio + len(self.segments) - 1)
        return self.segments[max(0, at - self.ratio + 1)]

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """The sum of cross-entropies of a segment's tokens over the number of all tokens, in nats.

        batch: as VAR's, with "step", whose turn it is; without it (to measure a model) all segments are summed.
        ValueError for "levels": segments are what is learned apart here.
        """
        if "levels" in batch:
            raise ValueError(f"segments of scales take turns here, so levels={batch['levels']} means nothing; leave it")
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        null = noise.uniform("drop", 0, ()).to(tokens.device) < self.label_drop
        c, layout = self.transformer.conditioner(self.prepare(batch), null), self.transformer.layout
        segments = (self.turn(int(batch["step"])),) if "step" in batch else self.segments
        total, per_scale = torch.zeros((), device=tokens.device), {}
        for first, last in segments:
            x = self.tokenizer.inputs(tokens, layout, max(first, 1), last) if last > 1 else None
            logits = self.transformer.head(self.transformer(c, x, first, last, self.see), c.vector)
            part = tokens[:, layout.offsets[first] : layout.offsets[last], 0]
            nats = F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none").view(part.shape)
            total = total + nats.sum(1).mean() / layout.n
            for k, own in zip(range(first, last), nats.detach().split(layout.sizes[first:last], 1), strict=True):
                per_scale[f"nats_{k}"] = own.mean()
        return {"loss": total, **per_scale}


# -- assembly and presets -----------------------------------------------------------------------------------------


def build(config: MVARConfig) -> MVAR:
    """An MVAR with freshly initialised weights."""
    scale, layout = config.scale, pyramid(config.scale.tokenizer.patch_nums)
    look = InsideScales(layout, config.kernel_size, config.refine_step)
    blocks = [adaln_block(scale, i, look=look) for i in range(scale.depth)]
    base = assemble(scale, ClassConditioner(scale.num_classes, scale.width), blocks=blocks)
    return MVAR(
        base.tokenizer,
        base.transformer,
        near(layout, config.kernel_size, config.refine_step),
        refine=config.refine_step,
        ratio=config.ratio_k,
        label_drop=scale.label_drop,
    )


def preset(depth: int) -> MVARConfig:
    """VAR's scaling rule."""
    return MVARConfig(scale=var.preset(depth, PATCH_NUMS_256, False, 1e-3))


def emoji_64() -> MVARConfig:
    """The nine groups of the emoji world at 64x64 pixels; the 8x8 cells of the last of five scales see 5x5."""
    return MVARConfig(scale=var.emoji_64(), kernel_size=5, refine_step=4, ratio_k=2)


CONFIG = MVARConfig


def _preset(name: str, depth: int, batch: int, epochs: int, **sampling: float) -> Preset:
    base = var.PRESETS["var-d16"]
    steps = epochs * (1_281_167 // batch)
    schedule = {"steps": steps, "batch": batch, "lr": 1e-4 * batch / 256, "warmup": steps // 50}
    return Preset(
        config=lambda: preset(depth),
        files={
            "tokenizer": base.files["tokenizer"],
            "transformer": File(repo="CVLUESTC/MVAR", name=f"{name}.pth", inside="mvar_wo_ddp"),
        },
        licence="MIT",
        sampling=sampling,
        training={"generator": {**base.training["generator"], **schedule}},
    )


PRESETS = {
    "mvar-d16": _preset("mvar-d16", 16, 448, 300, cfg_scale=2.7, top_k=1200, top_p=0.99),
    "mvar-finetune-d16": _preset("mvar-finetune-d16", 16, 448, 80, cfg_scale=2.0, top_k=1200, top_p=0.99),
    "mvar-finetune-d20": _preset("mvar-finetune-d20", 20, 192, 80, cfg_scale=1.5, top_k=900, top_p=0.96),
    "mvar-finetune-d24": _preset("mvar-finetune-d24", 24, 448, 80, cfg_scale=1.4, top_k=900, top_p=0.96),
    "mvar-emoji-64": replace(var.PRESETS["var-emoji-64"], config=emoji_64),
}

RESULTS = tuple(
    Result(preset=name, metric=metric, value=value, settings="ImageNet 256", source="official README")
    for name, *values in (
        ("mvar-d16", 3.01, 285.17, 6.26, 0.85, 0.51),
        ("mvar-finetune-d16", 3.37, 295.35, 6.10, 0.86, 0.48),
        ("mvar-finetune-d20", 2.83, 294.31, 6.12, 0.85, 0.52),
        ("mvar-finetune-d24", 2.15, 298.85, 5.62, 0.84, 0.56),
    )
    for metric, value in zip(("FID", "IS", "sFID", "precision", "recall"), values, strict=True)
)


def keys(config: MVARConfig) -> dict[str, tuple[Key, ...]]:
    """VAR's names of every part. The mask in a finetuned file may be VAR's: it is made anew from the rule.

    The official buffer hides other scales alone; windows are no part of it.
    """
    scales = scale_keys(pyramid(config.scale.tokenizer.patch_nums), same)
    return {"tokenizer": TOKENIZER_KEYS, "transformer": (*TRANSFORMER_KEYS, *scales)}


def tiny() -> MVAR:
    """The smallest complete MVAR, for the laws."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 4),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0)
    return build(MVARConfig(scale=scale, kernel_size=3, refine_step=2, ratio_k=2))
