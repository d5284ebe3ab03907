"""STAR: text to images by next-scale prediction up to 1024 pixels, with causal sampling inside the large scales.

Scale-wise Text-conditioned AutoRegressive image generation, arXiv 2406.10797. Weights: MIT.

VAR's scales, tokenizer and walk. Text takes the place of classes: its summary starts the sequence, its words are read
by cross-attention in every block, nothing is modulated. Positions are rotations, and every scale spans the same range
of angles, so that equal places of two scales have equal positions. Tokens of one scale that are drawn at once know
nothing of each other: for the large scales a small network draws a few, sees them, draws more (`StableSampler`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Dist
from arvis.nn.adaln import (
    CosineTemperature,
    CrossAttention,
    FeedForward,
    FixedTemperature,
    KeyValue,
    SelfAttention,
    Temperature,
)
from arvis.nn.clip import ClipConditioner, CLIPConfig
from arvis.nn.plain import PlainBlock, PlainHead
from arvis.nn.rotary_scales import normalised_table
from arvis.nn.scales import Condition, unstacked
from arvis.nn.stable import StableSampler
from arvis.nn.text import TextConfig, TextEncoder
from arvis.nn.text_scales import TextScaleTransformer
from arvis.nn.trunk import Call
from arvis.noise import Source
from arvis.published import File, Preset, Result
from arvis.reveal import Plan, Revealed
from arvis.state import Cond, State
from arvis.systems.var import PATCH_NUMS_256, PATCH_NUMS_512, TOKENIZER_KEYS, VAR, tokenizer_config
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig
from arvis.tokens import Layout, Pin, pyramid
from arvis.weights import Constant, Key, Rearrange

PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

Inside = Literal["independent", "stable", "mixed"]
"""How the tokens of one scale are drawn: all at once; in steps of the sampler; or in longer steps for the largest
scales, the first ones of the others without the sampler (the released script's choice)."""


@dataclass(frozen=True, kw_only=True)
class STARSampling:
    """Official sampling settings; those of VAR may be one number or one per item.

    `inside` says how tokens of one scale are drawn from where the sampler begins, in `steps` steps, of which the first
    `random` reveal at random places and the others where the sampler is surest. Guidance grows with the scale but is
    whole in the sampler.
    """

    cfg_scale: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    temperature: float = 1.0
    inside: Inside = "independent"
    steps: int = 8
    random: int = 5

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=0.0, top_k=0, top_p=0.0)


@dataclass(frozen=True, kw_only=True)
class STARConfig:
    """Sizes of the transformer and its tokenizer; prompts are read by a frozen encoder (`clip`), or by one that is
    trained along (`text`).

    `cross` says whose result of cross-attention a guidance row takes: its own, or that of its item's first row (see
    `FirstRow`). `rope_theta` and `rope_norm` are base and range of positions (-1: cells are counted). With
    `sampler_from` a sampler of `sampler_blocks` blocks draws the scales from that one on. Of the last scale training
    keeps so many random rows that `keep_tokens` are left in all (0: all).
    """

    tokenizer: PyramidVQConfig
    depth: int
    width: int
    heads: int
    clip: CLIPConfig | None = None
    text: TextConfig | None = None
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    attn_l2_norm: bool = True
    cross: Literal["own", "first"] = "own"
    rope_theta: float = 10000.0
    rope_norm: float = 64.0
    level_rows: bool = True
    logit_norm: bool = True
    class_rows: int = 0
    sampler_from: int | None = None
    sampler_blocks: int = 3
    drop_path: float = 0.0
    label_drop: float = 0.1
    keep_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.clip is None) == (self.text is None):
            raise ValueError(f"exactly one of clip and text reads the prompts, got {self.clip=} {self.text=}")
        if self.sampler_from is not None and not 0 < self.sampler_from < len(self.tokenizer.patch_nums):
            raise ValueError(
                f"sampler_from is one of scales 1..{len(self.tokenizer.patch_nums) - 1}, got {self.sampler_from}"
            )
        if self.sampler_from is not None and self.keep_tokens:
            raise ValueError(f"the sampler learns from whole scales: keep_tokens must be 0, got {self.keep_tokens}")

    @property
    def channels(self) -> int:
        """Of text features."""
        if self.clip is not None:
            return self.clip.channels
        assert self.text is not None
        return self.text.width


# -- text ---------------------------------------------------------------------------------------------------------


class WordConditioner(nn.Module):
    """Prompts as rows of an encoder that is trained along, the first of which is the summary."""

    conditions = ("prompt",)

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.encoder = TextEncoder(config)
        self.project = nn.Linear(config.width, width)

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.encoder.prepare(request)

    def forward(self, cond: Cond | None, null_B: Tensor) -> Condition:
        rows, visible = self.encoder.read(cond, null_B)
        return Condition(self.project(rows[:, 0]), rows[:, 0], (rows, visible))


class FirstRow(nn.Module):
    """Compat: the first guidance row of an item speaks for its others in cross-attention.

    The released block adds the result of row 0 of its batch to all rows, also to the one without a prompt. The batch is
    an item here, which for one picture at a time is the same, so that items know nothing of each other.
    """

    def __init__(self, cross: CrossAttention) -> None:
        super().__init__()
        self.cross = cross

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if call.context is None:
            raise ValueError("a cross-attention block needs a context in its call, got None")
        each = 1 if call.cache is None else len(x) // len(call.cache.step)
        text, visible = call.context
        context = text[::each], visible if visible is None else visible[::each]
        return self.cross(x[::each], replace(call, context=context)).repeat_interleave(each, 0)


# -- the system ---------------------------------------------------------------------------------------------------


def plan(inside: Inside, steps: int, random: int, k: int) -> Plan | None:
    """How scale k is drawn by the sampler."""
    if inside == "independent":
        return None
    if inside == "stable":
        return Plan(steps, 0, random)
    return Plan(15, 0, random) if k > 12 else Plan(steps, 5, random)


class STAR(nn.Module):
    """The three verbs: VAR's walk over scales, with another transformer, and another law inside the large scales."""

    Sampling: ClassVar[type] = STARSampling

    def __init__(self, tokenizer: PyramidVQ, transformer: TextScaleTransformer, config: STARConfig) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.config = tokenizer, transformer, config
        self.space = tokenizer.space
        self._scales = [VAR(tokenizer, transformer, label_drop=config.label_drop)]  # in a list: no second names

    @property
    def scales(self) -> VAR:
        """The walk over scales without the sampler."""
        return self._scales[0]

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return self.scales.parts()

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.scales.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.scales.prepare(request)

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        if sampling.inside != "independent" and self.transformer.sampler is None:
            raise ValueError(f'this model has no sampler: inside must be "independent", got {sampling.inside!r}')
        if sampling.steps < 1:
            raise ValueError(f"steps inside a scale are at least 1, got {sampling.steps}")
        s = self.scales.start(cond, sampling, noise, layout, given)
        s.key = sampling.inside, sampling.steps, sampling.random
        return s

    def predict(self, s: State) -> Dist:
        k, first = s.at(), self.config.sampler_from
        inside = None if first is None or k < first else plan(*s.key, k)  # type: ignore[misc]
        if inside is None:
            return self.scales.predict(s)
        h, c = self.scales.hidden(s), unstacked(s.more)
        alone = self.scales.drawn(s, self.transformer.head(h), k)

        def law(x: Tensor, known: Tensor, step: int) -> Tensor:
            if step < inside.plain:
                return alone.probs[:, :, 0]
            placed = self.tokenizer.embed(x) * known[..., None]
            logits = self.transformer.stable(h, placed, c.vector, k, k + 1)
            return self.scales.drawn(s, logits, s.K - 1).probs[:, :, 0]  # guidance as at the last scale: whole

        return Revealed(alone.where, law, inside, len(s), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self.scales.commit(s, d, x_BnS)

    # -- training -------------------------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Dist:
        """The distribution of every token given the true coarser scales, logits [B, N, 1, V]."""
        return self.scales.teacher(tokens, cond, layout)

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What can be stored of pictures [B, 3, Y, X] for training: their tokens [B, N, 1]."""
        return self.scales.latents(image)

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Mean cross-entropy over the tokens of all scales, in nats, and that of the sampler where there is one.

        batch: "tokens" [B, N, 1], or "image" [B, 3, Y, X] in [-1, 1] to be encoded; and the conditions. With "levels"
        only so many coarse scales are learned. The sampler learns from hidden rows without a gradient for them, so
        that both are trained at once as one after the other; the official order is to freeze all but
        `transformer.sampler`.
        """
        layout, t = self.transformer.layout, self.transformer
        last = min(batch.get("levels") or layout.K, layout.K)
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
            tokens = tokens[:, : layout.offsets[last]]
            x = self.tokenizer.inputs(tokens, layout, 0, last)
        null = noise.uniform("drop", 0, ()).to(tokens.device) < self.config.label_drop
        c = t.conditioner(self.prepare(batch), null)
        kept = self._kept(noise, tokens) if self.config.keep_tokens and last == layout.K else None
        h = t(c, x, 0, last, self.scales.see, kept=kept)
        target, level = tokens[..., 0], layout.level_N[: layout.offsets[last]].expand(len(tokens), -1)
        if kept is not None:
            target, level = target.gather(1, kept), level.gather(1, kept.cpu())
        logits = t.head(h)
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        out = {"loss": nats.mean(), "accuracy": (logits.detach().argmax(-1) == target).float().mean()}
        out |= {f"nats_{k}": nats.detach()[level.to(nats.device) == k].mean() for k in range(last)}
        if self.config.sampler_from is not None and last > self.config.sampler_from:
            out["sampler"] = self.sampler_loss(h.detach(), tokens, c.vector.detach(), noise, last)
            out["loss"] = out["loss"] + out["sampler"]
        return out

    def _kept(self, noise: Source, tokens: Tensor) -> Tensor:
        """Positions [B, keep_tokens], ascending: all of the coarser scales and random ones of the last."""
        coarse, n = self.transformer.layout.offsets[-2:]
        most = self.config.keep_tokens - coarse
        if not 0 < most <= n - coarse:
            raise ValueError(f"keep_tokens must lie in {coarse + 1}..{n}, got {self.config.keep_tokens}")
        fine = noise.uniform("keep", 0, (n - coarse,)).argsort(1)[:, :most].sort(1).values
        whole = torch.arange(coarse).expand(len(fine), -1).to(fine.device)
        return torch.cat((whole, coarse + fine), 1).to(tokens.device)

    def sampler_loss(self, h: Tensor, tokens: Tensor, pooled: Tensor, noise: Source, last: int) -> Tensor:
        """Cross-entropy of the tokens that are hidden, over the number of all; each item shows each of its tokens with
        the same probability arccos(r) / (pi / 2), r uniform."""
        span = slice(self.transformer.layout.offsets[self.config.sampler_from or 0], tokens.shape[1])
        r, u = noise.uniform("share", 0, ()), noise.uniform("shown", 0, (span.stop - span.start,))
        shown = (u < r.arccos()[:, None] / (torch.pi / 2)).to(tokens.device)
        with torch.no_grad():
            placed = self.tokenizer.embed(tokens[:, span]) * shown[..., None]
        logits = self.transformer.stable(h[:, span], placed, pooled, self.config.sampler_from or 0, last)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, span].flatten(), reduction="none").view(shown.shape)
        return (nats * ~shown).mean()


# -- assembly and presets -----------------------------------------------------------------------------------------


def block(config: STARConfig, layer: int, text: bool) -> PlainBlock:
    """Block `layer` of a configuration; stochastic depth grows linearly to `drop_path`."""
    width, heads = config.width, config.heads

    def temperature() -> Temperature:
        return CosineTemperature(heads) if config.attn_l2_norm else FixedTemperature(0.25 * (width // heads) ** -0.5)

    cross = CrossAttention(width, heads, KeyValue(config.channels, width), temperature()) if text else None
    return PlainBlock(
        width,
        attn=SelfAttention(width, heads, temperature()),
        cross=FirstRow(cross) if cross is not None and config.cross == "first" else cross,
        ffn=FeedForward(width, round(width * config.mlp_ratio)),
        eps=config.norm_eps,
        drop_path=config.drop_path * layer / max(config.depth - 1, 1),
    )


def build(config: STARConfig) -> STAR:
    """A STAR with freshly initialised weights."""
    width, codes, layout = config.width, config.tokenizer.vocab_size, pyramid(config.tokenizer.patch_nums)

    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(width, config.norm_eps, elementwise_affine=False)

    if config.clip is not None:
        conditioner = ClipConditioner(config.clip, width)
    else:
        assert config.text is not None
        conditioner = WordConditioner(config.text, width)
    sampler = None
    if config.sampler_from is not None:
        sampler = StableSampler(
            [block(config, i, text=False) for i in range(config.sampler_blocks)],
            PlainHead(width, codes, norm()),
            channels=config.tokenizer.z_channels,
            text=config.channels,
            width=width,
            K=layout.K,
        )
    with torch.device("cpu"):  # positions are known numbers, also of a model that is only shapes
        table = normalised_table(layout, width // config.heads, config.rope_theta, config.rope_norm)
    transformer = TextScaleTransformer(
        conditioner,
        [block(config, i, text=True) for i in range(config.depth)],
        PlainHead(width, codes, norm() if config.logit_norm else nn.Identity()),
        sampler,
        layout=layout,
        channels=config.tokenizer.z_channels,
        width=width,
        table=table,
        level_rows=config.level_rows,
        class_rows=config.class_rows,
    )
    transformer.init_weights()
    if isinstance(conditioner, WordConditioner):
        conditioner.encoder.init_weights()
    return STAR(PyramidVQ(config.tokenizer), transformer, config)


def preset(depth: int, patch_nums: tuple[int, ...], sampler: bool = False, keep_tokens: int = 0) -> STARConfig:
    """The scaling rule of VAR: width 64 per layer of depth, one head per layer of depth."""
    return STARConfig(
        tokenizer=tokenizer_config(patch_nums),
        depth=depth,
        width=64 * depth,
        heads=depth,
        clip=CLIPConfig(),
        cross="first",
        class_rows=1001,
        sampler_from=9 if sampler else None,
        drop_path=0.1 * depth / 24,
        keep_tokens=keep_tokens,
    )


NO_DECAY = ("start_position", "level", "classes", "log_scale")
"""What the official optimiser does not decay, beside biases and other 1-d tensors."""


def _preset(
    file: str,
    depth: int,
    patch_nums: tuple[int, ...],
    *,
    lr: float,
    batch: int,
    sampler: bool = False,
    keep_tokens: int = 0,
    **sampling: Any,
) -> Preset:
    """A published size. The pictures of its training are not public, so how many steps its epochs are is not known.

    The official page links the repository and names no file. Those of three models are known from their users; of the
    smallest one and the sampler they are not, and the names here stand for files that are given by hand.
    """
    files = {"tokenizer": _TOKENIZER, "transformer": File(repo=_REPO, name=file, inside=_INSIDE)}
    generator = {
        "steps": 100_000,
        "batch": batch,
        "lr": lr,
        "schedule": "lin0",
        "final": 0.01,
        "weight_decay": 0.05,
        "clip": 2.0,
        "no_decay": NO_DECAY,
    }
    return Preset(
        config=lambda: preset(depth, patch_nums, sampler, keep_tokens),
        files=files,
        licence="MIT",
        text=CLIPConfig().repo,
        sampling=sampling,
        training={"generator": generator},
    )


_REPO = "taocrayon/STAR"
_INSIDE = "trainer.var_wo_ddp"
_TOKENIZER = File(repo="FoundationVision/var", name="vae_ch160v4096z32.pth")


def emoji_64() -> STARConfig:
    """64x64 pixels, 8x8 cells at the last of five scales: 103 tokens; the sampler draws the last two scales."""
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=1024, z_channels=32, patch=PatchConfig())
    return STARConfig(
        tokenizer=tokenizer, depth=8, width=192, heads=6, text=TextConfig(), sampler_from=3, sampler_blocks=2
    )


CONFIG = STARConfig

_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}

PRESETS = {
    "star-256-d16": _preset("star-256-d16.pth", 16, PATCH_NUMS_256, lr=1e-4, batch=512),
    "star-256-d30": _preset("star_rope_d30_256-ar-ckpt-ep3-iter20000.pth", 30, PATCH_NUMS_256, lr=5e-5, batch=480),
    "star-512-d30": _preset("star_rope_d30_512-ar-ckpt-ep1-iter30000.pth", 30, PATCH_NUMS_512, lr=5e-5, batch=192),
    "star-1024-d30": _preset(
        "star_rope_d30_1024_drop_3-ar-ckpt-ep1-iter21000.pth", 30, PATCH_NUMS_1024, lr=2e-5, batch=64, keep_tokens=8800
    ),
    "star-1024-d30-sampler": _preset(
        "star-1024-d30-sampler.pth",
        30,
        PATCH_NUMS_1024,
        lr=1e-5,
        batch=192,
        sampler=True,
        inside="mixed",
        cfg_scale=4.5,
    ),
    "star-emoji-64": Preset(
        config=emoji_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 2.0, "top_k": 200, "top_p": 0.9, "inside": "stable", "steps": 6, "random": 3},
        training={
            "tokenizer": {"steps": 2000, "batch": 64, "lr": 1e-3, **_SCHEDULE, "clip": 1.0, "weight_decay": 0.01},
            "generator": {
                "steps": 2500,
                "batch": 64,
                "lr": 3e-3,
                **_SCHEDULE,
                "muon": ("trunk",),
                "no_decay": NO_DECAY,
            },
        },
    ),
}

RESULTS = (
    Result(
        preset="star-1024-d30-sampler",
        metric="seconds",
        value=2.21,
        settings="one picture of 1024 pixels, on one A100",
        source="abstract",
    ),
)


# -- official names -----------------------------------------------------------------------------------------------


def _attention(ours: str, theirs: str) -> tuple[Key, ...]:
    return (
        Key(f"{ours}.temperature.log_scale", f"{theirs}.scale_mul_1H11", Rearrange("1 h 1 1 -> h 1 1")),
        Key(f"{ours}.out.{{p}}", f"{theirs}.proj.{{p}}"),
    )


def _block(ours: str, theirs: str) -> tuple[Key, ...]:
    zeros = Constant(torch.zeros_like)
    attn, cross = f"{theirs}.attn", f"{theirs}.cross_attn"
    rows = [
        *_attention(f"{ours}.attn", attn),
        Key(f"{ours}.attn.qkv.weight", f"{attn}.mat_qkv.weight"),
        Key(f"{ours}.attn.q_bias", f"{attn}.q_bias"),
        Key(f"{ours}.attn.v_bias", f"{attn}.v_bias"),
        Key((), f"{attn}.zero_k_bias", zeros, like=f"{ours}.attn.q_bias"),
        Key(f"{ours}.ffn.up.{{p}}", f"{theirs}.ffn.fc1.{{p}}"),
        Key(f"{ours}.ffn.down.{{p}}", f"{theirs}.ffn.fc2.{{p}}"),
    ]
    for inside in ("cross", "cross.cross"):  # the second under FirstRow
        rows += [
            *_attention(f"{ours}.{inside}", cross),
            Key(f"{ours}.{inside}.q.weight", f"{cross}.mat_q.weight"),
            Key(f"{ours}.{inside}.q.bias", f"{cross}.q_bias"),
            Key(f"{ours}.{inside}.kv.linear.weight", f"{cross}.mat_kv.weight"),
            Key(f"{ours}.{inside}.kv.v_bias", f"{cross}.v_bias"),
            Key((), f"{cross}.zero_k_bias", zeros, like=f"{ours}.{inside}.kv.v_bias"),
        ]
    return tuple(rows)


TRANSFORMER_KEYS = (
    Key("conditioner.project.{p}", "encoder_proj.{p}"),
    Key("conditioner.encoder.{name*}", "conditioner.encoder.{name*}"),  # trained along, in no official file
    Key("word.{p}", "word_embed.{p}"),
    Key("start_position", "pos_start"),
    Key("level.weight", "lvl_embed.weight"),
    Key("classes.weight", "class_emb.weight"),
    *_block("trunk.blocks.{i}", "blocks.{i}"),
    Key("head.linear.{p}", "head_logits.{p}"),
    Key("sampler.word.{p}", "word_embed_head.{p}"),
    Key("sampler.level.weight", "lvl_embed_2.weight"),
    Key("sampler.start_position", "pos_start_last"),
    Key("sampler.project.{p}", "encoder_proj2.{p}"),
    Key("sampler.join.{p}", "head_proj.{p}"),
    *_block("sampler.trunk.blocks.{i}", "feat_extract_blocks.{i}"),
    Key("sampler.head.linear.{p}", "head_logits2.{p}"),
)


def keys(config: STARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of both parts; the tokenizer is VAR's."""
    return {"tokenizer": TOKENIZER_KEYS, "transformer": TRANSFORMER_KEYS}


def tiny() -> STAR:
    """The smallest complete STAR, for the laws."""
    patch = PatchConfig(grid=(3, 3), z_channels=4, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)
    system = build(
        STARConfig(
            tokenizer=PyramidVQConfig(patch_nums=(1, 2, 3), vocab_size=5, z_channels=4, patch=patch),
            depth=2,
            width=16,
            heads=2,
            text=TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2),
            sampler_from=2,
            sampler_blocks=1,
        )
    )
    for name in ("head", "sampler.head"):  # as after some training, so that everything matters
        nn.init.normal_(system.transformer.get_submodule(name).linear.weight, std=0.3)
    return system
