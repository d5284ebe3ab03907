"""VAR: class-conditional images by next-scale prediction over a multi-scale residual VQ pyramid.

Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction, arXiv 2404.02905. Weights: MIT.

One step draws all tokens of one scale, given every coarser scale (rule `upto`, block-causal). The input of scale k is
the reconstruction accumulated over scales < k, shrunk to the size of scale k; scale 0 starts from the condition. The
class embedding also modulates every block. Guidance grows with the scale: (1 + t) c - t u with t = cfg k / (K - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.adaln import (
    AdaLNBlock,
    CosineTemperature,
    CrossAttention,
    FeedForward,
    FixedTemperature,
    Look,
    OwnModulation,
    SelfAttention,
    SharedModulation,
    Temperature,
    masked,
)
from arvis.nn.cache import Cache
from arvis.nn.scales import ClassConditioner, Condition, Conditioner, ScaleTransformer, stacked, unstacked
from arvis.noise import Source
from arvis.orders import by_level
from arvis.published import File, Preset, Result
from arvis.quant.multiscale import Target, area_target
from arvis.rows import See, looks_back, upto
from arvis.sampling import mix, per_item, temper, top_k, top_p, var_cfg
from arvis.state import Cond, Lesson, State
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig
from arvis.tokens import Layout, Pin, Space, pyramid
from arvis.weights import SAME_NAMES, Constant, Key
from arvis.weights.families import ADALN_KEYS, mask_key

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True, kw_only=True)
class VARSampling:
    """Official sampling settings; each may be one number or one per item. `cfg_scale` is t at the last scale."""

    cfg_scale: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=0.0, top_k=0, top_p=0.0)


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of the transformer and its tokenizer."""

    tokenizer: PyramidVQConfig
    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    drop_path: float = 0.0
    label_drop: float = 0.1
    adaln_init: float = 1e-3


class VAR(nn.Module):
    """The three verbs over scales. `see` is the visibility between scales: `upto` for VAR."""

    Sampling: ClassVar[type] = VARSampling

    def __init__(
        self, tokenizer: PyramidVQ, transformer: ScaleTransformer, see: See = upto, label_drop: float = 0.1
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.see, self.label_drop = tokenizer, transformer, see, label_drop
        self.space: Space = tokenizer.space

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.transformer.conditioner.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.transformer.conditioner.prepare(request)

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        items, layout = len(noise), self._layout(layout)
        device = self.transformer.start_position.device
        scale = per_item(sampling.cfg_scale, items)
        ramp = torch.arange(layout.K) / max(layout.K - 1, 1)
        t = scale[:, None] * ramp  # t = cfg k / (K - 1): [B, K]
        guided = bool((scale != 0).any())
        null = torch.zeros(items, dtype=torch.bool, device=device)
        rows = [self.transformer.conditioner(cond, null | u) for u in ((False, True) if guided else (False,))]
        s = State(
            tokens=torch.zeros(items, layout.n, 1, dtype=torch.int64, device=device),
            group=by_level(layout).to(device).expand(items, -1).clone(),
            k=torch.zeros(items, dtype=torch.int64),
            K=layout.K,
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=torch.stack(var_cfg(t) if guided else (torch.ones_like(t),), -1),
            knobs={name: per_item(getattr(sampling, name), items) for name in ("top_k", "top_p", "temperature")},
            given=given,
            cache={"trunk": Cache(items, layout.offsets[-2])} if looks_back(self.see, layout.K) else {},
            more={"f": self.tokenizer.start(items, layout), **stacked([self.transformer.once(c) for c in rows])},
        )
        if given is not None:
            for k in range(s.given_groups()):  # the next predict feeds them in one pass
                span = torch.arange(layout.offsets[k], layout.offsets[k + 1])[None]
                self.commit(s, Categorical(span, torch.empty(0)), given.at(span).value)
        return s

    def predict(self, s: State) -> Categorical:
        return self.drawn(s, self.transformer.head(self.hidden(s), unstacked(s.more).vector), s.at())

    def hidden(self, s: State) -> Tensor:
        """Hidden rows [B*G, n, D] of the next scale, after those of the scales that are pending."""
        k, layout, cache = s.at(), s.layout, s.cache.get("trunk")
        first = k
        if cache is not None:
            cache.forget(k)
            first = layout.offsets.index(cache.end)  # scales first..k are pending
        if first == k:
            x = None if k == 0 else self.tokenizer.next_input(s.more["f"], k, layout)
        else:
            x = self.tokenizer.inputs(s.tokens, layout, first, k + 1)
        return self.transformer(unstacked(s.more), x, first, k + 1, self.see, cache)[:, -layout.sizes[k] :]

    def drawn(self, s: State, logits: Tensor, k: int) -> Categorical:
        """What is drawn by logits [B*G, n, V] of the next scale: guided as at step k, tempered and filtered."""
        logits = mix(logits.unflatten(0, (len(s), -1)), s.weight(k))[:, :, None]  # [B, n, 1, V]
        logits = top_p(top_k(temper(logits, s.knobs["temperature"]), s.knobs["top_k"]), s.knobs["top_p"])
        here = s.layout.span(s.at())
        return Categorical(torch.arange(here.start, here.stop, device=logits.device)[None], logits, at=s.at())

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        k = s.at()
        s.tokens[:, s.layout.span(k)] = x_BnS
        s.more["f"] = self.tokenizer.accumulate(s.more["f"], x_BnS, k, s.layout)
        s.k = s.k + 1

    # -- one pass over all scales ---------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        """The distribution of every token given the true coarser scales, logits [B, N, 1, V]."""
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        layout = self._layout(layout)
        return self._teacher(tokens, self.transformer.conditioner(cond, null), layout, layout.K)

    def _teacher(self, tokens: Tensor, c: Condition, layout: Layout, last: int) -> Categorical:
        x = self.tokenizer.inputs(tokens, layout, 0, last)
        h = self.transformer(c, x, 0, last, self.see)
        return Categorical(torch.arange(layout.offsets[last])[None], self.transformer.head(h, c.vector)[:, :, None])

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What can be stored of pictures [B, 3, Y, X] for training: their tokens [B, N, 1]."""
        return {"tokens": self.tokenizer.encode(image, self._layout(None))}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Mean cross-entropy over all tokens of all scales, in nats; conditions are dropped with `label_drop`.

        batch: "tokens" [B, N, 1], or "image" [B, 3, Y, X] in [-1, 1] to be encoded; and the conditions. With "levels"
        only so many coarse scales are learned, at a fraction of the cost (progressive training).
        """
        return self.lesson(batch, noise).losses

    def lesson(self, batch: dict[str, Any], noise: Source) -> Lesson:
        """The same step of teacher forcing with what it was about."""
        layout = self._layout(None)
        last = min(batch.get("levels") or layout.K, layout.K)
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        null, cond = noise.uniform("drop", 0, ()).to(tokens.device) < self.label_drop, self.prepare(batch)
        c = self.transformer.conditioner(cond, null)
        tokens = tokens[:, : layout.offsets[last]]
        d = self._teacher(tokens, c, layout, last)
        nats = F.cross_entropy(d.logits.flatten(0, 2), tokens.flatten(), reduction="none").view(len(tokens), -1)
        hit = (d.logits.detach().argmax(-1) == tokens)[..., 0].float()
        per_scale = {f"nats_{k}": nats[:, layout.span(k)].mean().detach() for k in range(last)}
        return Lesson(tokens, layout, cond, d, {"loss": nats.mean(), "accuracy": hit.mean(), **per_scale})

    def one_pass(self, x_BNC: Tensor, c: Condition, layout: Layout, scales: Sequence[int], see: See) -> Categorical:
        """The distributions of scale 0 and of `scales` alone under any inputs of these and any visibility."""
        layout = self._layout(layout)
        h = self.transformer.apart(c, x_BNC, scales, see)
        return Categorical(layout.where(0, *scales), self.transformer.head(h, c.vector)[:, :, None])

    def _layout(self, layout: Layout | None) -> Layout:
        own = self.transformer.layout
        if layout is not None and layout != own:
            raise ValueError(f"positions are learned for scales {own.levels}, got {layout.levels}; train with these")
        return own


def smooth(system: VAR, cond: Cond | None, sampling: Any, noise: Source) -> Tensor:
    """Pictures from soft codes (the official `more_smooth`): features [B, C, Y, X] for `tokenizer.decode_features`.

    Each position adds softmax((z (1 + r) + g) / tau) @ codebook with Gumbel noise g, r = k / (K - 1) and
    tau = max(0.27 (1 - 0.95 r), 0.005). For looking at, not for measuring: no token sequence is drawn.
    """
    codebook = system.tokenizer.quantize.embedding.weight
    s = system.start(cond, sampling, noise)
    while not bool(s.done.all()):
        k, d = s.at(), system.predict(s)
        z = d.logits[:, :, 0]
        r = k / max(s.K - 1, 1)
        g = -(-noise.uniform("gumbel", k, z.shape[1:]).to(z.device).log()).log()
        weight = ((z * (1 + r) + g) / max(0.27 * (1 - 0.95 * r), 0.005)).softmax(-1)
        f = s.more["f"]
        system.commit(s, d, z.argmax(-1, keepdim=True))
        s.more["f"] = system.tokenizer.accumulate_soft(f, weight.to(f.dtype) @ codebook, k, s.layout)
    return s.more["f"]


# -- assembly and presets -----------------------------------------------------------------------------------------


def adaln_block(config: VARConfig, layer: int, context_width: int = 0, look: Look = masked) -> AdaLNBlock:
    """Block `layer` of a configuration; stochastic depth grows linearly to `drop_path`."""
    width, heads = config.width, config.heads

    def temperature() -> Temperature:
        return CosineTemperature(heads) if config.attn_l2_norm else FixedTemperature(0.25 * (width // heads) ** -0.5)

    def cross() -> CrossAttention:
        return CrossAttention(width, heads, nn.Linear(context_width, 2 * width), temperature())

    return AdaLNBlock(
        width,
        modulation=SharedModulation(width) if config.shared_aln else OwnModulation(width),
        attn=SelfAttention(width, heads, temperature(), look),
        cross=cross() if context_width else None,
        ffn=FeedForward(width, round(width * config.mlp_ratio)),
        eps=config.norm_eps,
        drop_path=config.drop_path * layer / max(config.depth - 1, 1),
    )


def build(config: VARConfig) -> VAR:
    """A VAR with freshly initialised weights."""
    return assemble(config, ClassConditioner(config.num_classes, config.width))


def assemble(
    config: VARConfig,
    conditioner: Conditioner,
    context_width: int = 0,
    blocks: Sequence[nn.Module] = (),
    target: Target = area_target,
) -> VAR:
    """A freshly initialised model over scales with any conditioner; its blocks read a context if it has a width, or
    are those that are given. `target` is what a scale of the tokenizer codes."""
    transformer = ScaleTransformer(
        conditioner,
        blocks or [adaln_block(config, i, context_width) for i in range(config.depth)],
        layout=pyramid(config.tokenizer.patch_nums),
        channels=config.tokenizer.z_channels,
        codes=config.tokenizer.vocab_size,
        width=config.width,
        shared=config.shared_aln,
        eps=config.norm_eps,
    )
    transformer.init_weights(config.adaln_init)
    return VAR(PyramidVQ(config.tokenizer, target), transformer, label_drop=config.label_drop)


def tokenizer_config(patch_nums: tuple[int, ...] = PATCH_NUMS_256) -> PyramidVQConfig:
    """The published tokenizer: 4,096 codes of 32 channels, 16x down; one file serves 256 and 512 pixels."""
    return PyramidVQConfig(patch_nums=patch_nums, vocab_size=4096, z_channels=32, cnn=CNNConfig(ch=160))


def preset(depth: int, patch_nums: tuple[int, ...], shared: bool, adaln_init: float) -> VARConfig:
    """The scaling rule: width 64 per layer of depth, one head per layer of depth."""
    return VARConfig(
        tokenizer=tokenizer_config(patch_nums),
        depth=depth,
        width=64 * depth,
        heads=depth,
        shared_aln=shared,
        drop_path=0.1 * depth / 24,
        adaln_init=adaln_init,
    )


_REPO = "FoundationVision/var"
_TOKENIZER = File(repo=_REPO, name="vae_ch160v4096z32.pth")


NO_DECAY = ("start_position", "position", "level", "offset", "log_scale")
"""What the official optimiser does not decay, beside biases and other 1-d tensors."""


def _preset(
    depth: int,
    patch_nums: tuple[int, ...],
    adaln_init: float,
    *,
    epochs: int,
    batch: int,
    base_lr: float,
    final: float,
    decay_final: float | None = None,
    shared: bool = False,
) -> Preset:
    """A published size; `epochs` of ImageNet at lr `base_lr` per 256 rows make its official training schedule."""
    steps = epochs * (1_281_167 // batch)
    return Preset(
        config=lambda: preset(depth, patch_nums, shared, adaln_init),
        files={"tokenizer": _TOKENIZER, "transformer": File(repo=_REPO, name=f"var_d{depth}.pth")},
        licence="MIT",
        training={
            "generator": {
                "steps": steps,
                "batch": batch,
                "lr": base_lr * batch / 256,
                "warmup": steps // 50,
                "schedule": "lin0",
                "final": final,
                "weight_decay": 0.05,
                "weight_decay_final": decay_final,
                "clip": 2.0,
                "no_decay": NO_DECAY,
            }
        },
    )


def emoji_64() -> VARConfig:
    """The nine groups of the emoji world at 64x64 pixels, 8x8 cells at the last of five scales: 103 tokens."""
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=1024, z_channels=32, patch=PatchConfig())
    return VARConfig(tokenizer=tokenizer, depth=8, width=192, heads=6, num_classes=9, shared_aln=True, adaln_init=0.1)


CONFIG = VARConfig

PRESETS = {
    "var-d16": _preset(16, PATCH_NUMS_256, 1e-3, epochs=200, batch=768, base_lr=1e-4, final=0.1),
    "var-d20": _preset(20, PATCH_NUMS_256, 1e-3, epochs=250, batch=768, base_lr=1e-4, final=0.1),
    "var-d24": _preset(24, PATCH_NUMS_256, 1e-4, epochs=350, batch=768, base_lr=8e-5, final=0.01),
    "var-d30": _preset(30, PATCH_NUMS_256, 1e-5, epochs=350, batch=1024, base_lr=8e-5, final=0.01, decay_final=0.08),
    "var-d36": _preset(
        36, PATCH_NUMS_512, 5e-6, epochs=350, batch=768, base_lr=8e-5, final=0.01, decay_final=0.08, shared=True
    ),
    "var-emoji-64": Preset(
        config=emoji_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 2.0, "top_k": 200, "top_p": 0.9},
        training={
            "tokenizer": {
                "steps": 2000,
                "batch": 64,
                "lr": 1e-3,
                "warmup": 50,
                "schedule": "cosine",
                "final": 0.02,
                "ema": 0.995,
                "clip": 1.0,
                "weight_decay": 0.01,
            },
            "generator": {
                "steps": 2500,
                "batch": 64,
                "lr": 3e-3,
                "warmup": 50,
                "schedule": "cosine",
                "final": 0.02,
                "ema": 0.995,
                "muon": ("trunk",),
                "no_decay": NO_DECAY,
            },
        },
    ),
}

RESULTS = tuple(
    Result(
        preset=name, metric="FID", value=fid, settings="cfg 1.5, top_k 900, top_p 0.96, 50k", source="official README"
    )
    for name, fid in (("var-d16", 3.55), ("var-d20", 2.95), ("var-d24", 2.33), ("var-d30", 1.97), ("var-d36", 2.63))
)


# -- official names -----------------------------------------------------------------------------------------------

TOKENIZER_KEYS = (
    Key(  # of another list where K differs
        "quantize.ema_vocab_hit_SV", "quantize.ema_vocab_hit_SV", optional=True, initial=torch.zeros_like
    ),
    *SAME_NAMES,
)

TRANSFORMER_KEYS = (
    Key("conditioner.embedding.weight", "class_emb.weight"),
    Key("level.weight", "lvl_embed.weight"),
    *ADALN_KEYS,
)


def scale_keys(layout: Layout, see: See = upto) -> tuple[Key, ...]:
    """Two official buffers that hold what follows from the scales: the level of each token, and the additive mask."""

    def level(like: Tensor) -> Tensor:
        return layout.level_N[None].to(like.device, torch.int64)

    return Key((), "lvl_1L", Constant(level), like="position"), mask_key(layout, see)


def keys(config: VARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part of a VAR."""
    scales = scale_keys(pyramid(config.tokenizer.patch_nums))
    return {"tokenizer": TOKENIZER_KEYS, "transformer": (*TRANSFORMER_KEYS, *scales)}


def tiny_config() -> VARConfig:
    """The smallest complete VAR."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 3),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    return VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0)


def tiny() -> VAR:
    """The smallest complete VAR, for the laws."""
    return build(tiny_config())
