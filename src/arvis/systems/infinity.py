"""Infinity: text to images by next-scale prediction, where a token is a vector of independent bits.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis, arXiv 2412.04431. Weights: MIT.

One step draws all bits of one scale, given every coarser scale (rule `upto`). The vocabulary is endless: d bits are d
softmaxes over two outcomes. Scales are lists (h, w) that depend on the shape of the picture, so positions are
rotations. In training random bits of the inputs are flipped and all finer labels are made anew from what is left of the
picture: the model learns to make good for mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.adaln import (
    AdaLNBlock,
    AdaLNHead,
    CosineTemperature,
    CrossAttention,
    FeedForward,
    FixedTemperature,
    KeyValue,
    OwnModulation,
    SelfAttention,
    SharedModulation,
)
from arvis.nn.cache import Cache
from arvis.nn.captions import CaptionConditioner, CaptionConfig, WordConditioner, longest, null_rows
from arvis.nn.plain import PlainHead
from arvis.nn.rotary_scales import RotaryScaleTransformer, Style, Tap
from arvis.nn.scales import Condition, stacked, unstacked
from arvis.nn.text import TextConfig
from arvis.noise import Source
from arvis.orders import by_level
from arvis.published import File, Preset, Result
from arvis.quant.lookup_free import pack_bits, unpack_bits
from arvis.rows import See, upto
from arvis.sampling import cfg, mix, per_item, temper, top_k, top_p
from arvis.state import Cond, Lesson, State
from arvis.tokenizers.bits import BitPyramid, BitPyramidConfig
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.ratios import scales_for, whole
from arvis.tokens import Layout, Pin
from arvis.walk import Watch
from arvis.weights import SAME_NAMES, Constant, Either, Key, Rearrange, fetch, load_official, read


@dataclass(frozen=True, kw_only=True)
class InfinitySampling:
    """Official sampling settings of the 2B model; scale, temperature and filters may be one number or one per item.

    Logits are divided by the temperature (tau). `cfg_list` and `temperature_list` give one number per scale in place of
    one for all. u + scale (c - u) is formed at the places `guide_after`: 0 is the logits, -m the hidden rows after
    block depth - m, which then go on as both halves. The filters see the two outcomes of one bit, so a top_p of 0.97
    forces bits that are at least so sure, and any top_k but 1 does nothing.
    """

    cfg_scale: float = 4.0
    cfg_list: tuple[float, ...] = ()
    temperature: float = 0.5
    temperature_list: tuple[float, ...] = ()
    top_k: int = 900
    top_p: float = 0.97
    guide_after: tuple[int, ...] = (0,)

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=1.0, temperature=1.0, top_k=0, top_p=0.0)


@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Sizes of the transformer and its tokenizer.

    Prompts are read by a frozen encoder (`caption`), or by one that is trained along (`text`). Blocks come in `chunks`,
    which official names count; a row per level is added before the first, or before each (`level_each_chunk`; with one
    chunk, before each block). `rope` says where cells lie. `labels` are bits, or the codes of the ordinary classifier.

    In training each bit of the first `flip_levels` scales is flipped with a probability of up to `flip_strength`, and
    tokens count by 1 / sqrt(h w) of their scale (`reweight`) or all alike.
    """

    tokenizer: BitPyramidConfig
    depth: int
    width: int
    heads: int
    caption: CaptionConfig | None = None
    text: TextConfig | None = None
    pool_heads: int = 16
    chunks: int = 1
    level_each_chunk: bool = False
    levels: int = 15
    rope: Style = "grid"
    labels: Literal["bits", "codes"] = "bits"
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = True
    head_aln: bool = True
    attn_l2_norm: bool = True
    drop_path: float = 0.0
    label_drop: float = 0.1
    flip_strength: float = 0.3
    flip_levels: int = 13
    reweight: bool = True
    gate_init: float = 5e-6
    modulation_init: float = 1e-3
    head_init: float = 0.02

    def __post_init__(self) -> None:
        if (self.caption is None) == (self.text is None):
            raise ValueError(f"exactly one of caption and text reads the prompts, got {self.caption=} {self.text=}")
        if self.depth % self.chunks:
            raise ValueError(f"{self.depth} blocks do not divide into {self.chunks} chunks")
        if self.labels == "codes" and (self.tokenizer.patchify > 1 or self.tokenizer.bits > 24):
            raise ValueError(f"codes are those of one cell of at most 24 bits, got {self.tokenizer}")

    @property
    def per_chunk(self) -> int:
        """Blocks of a chunk."""
        return self.depth // self.chunks

    @property
    def told_before(self) -> tuple[int, ...]:
        """The blocks before which the rows of the levels are added."""
        every = self.per_chunk if self.chunks > 1 else 1
        return tuple(range(0, self.depth, every)) if self.level_each_chunk else (0,)

    @property
    def ffn_width(self) -> int:
        return round(self.width * self.mlp_ratio / 256) * 256 or round(self.width * self.mlp_ratio)


# -- codes in place of bits ---------------------------------------------------------------------------------------


@dataclass
class Coded:
    """Bits drawn together, as one code of 2^S: logits [B, n, 1, 2^S]. The ordinary classifier, for comparison."""

    where: Tensor
    logits: Tensor
    at: int | Tensor = 0

    @property
    def _codes(self) -> Categorical:
        return Categorical(self.where, self.logits, self.at)

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        pin = None if pin is None else Pin(pin.mask, pack_bits(pin.value))
        return unpack_bits(self._codes.sample(noise, pin), self.logits.shape[-1].bit_length() - 1)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        return self._codes.log_prob(pack_bits(x_BnS))


# -- the system ---------------------------------------------------------------------------------------------------


class Infinity(nn.Module):
    """The three verbs over scales of bits. `see` is the visibility between scales."""

    Sampling: ClassVar[type] = InfinitySampling

    def __init__(
        self, tokenizer: BitPyramid, transformer: RotaryScaleTransformer, config: InfinityConfig, see: See = upto
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.config, self.see = tokenizer, transformer, config, see
        self.space, self.label_drop = tokenizer.space, config.label_drop

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
        items, layout = len(noise), layout or self.tokenizer.layout()
        device, depth = self.transformer.start_position.device, len(self.transformer.trunk)
        wrong = [place for place in sampling.guide_after if not -depth <= place <= 0]
        if wrong:
            raise ValueError(f"guide_after is 0 for the logits or -1..-{depth} for blocks from the end, got {wrong[0]}")
        scale = _per_scale(sampling.cfg_scale, sampling.cfg_list, "cfg_list", items, layout.K)
        tau = _per_scale(sampling.temperature, sampling.temperature_list, "temperature_list", items, layout.K)
        guided = bool((scale != 1).any())
        null = torch.zeros(items, dtype=torch.bool, device=device)
        rows = [self.transformer.conditioner(cond, null | u) for u in ((False, True) if guided else (False,))]
        s = State(
            tokens=torch.zeros(items, layout.n, self.space.S, dtype=torch.int64, device=device),
            group=by_level(layout).to(device).expand(items, -1).clone(),
            k=torch.zeros(items, dtype=torch.int64),
            K=layout.K,
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=torch.stack(cfg(scale) if guided else (torch.ones_like(scale),), -1),
            knobs={
                "temperature": tau,
                **{name: per_item(getattr(sampling, name), items) for name in ("top_k", "top_p")},
            },
            given=given,
            cache={"trunk": Cache(items, layout.offsets[-2])},
            more={"f": self.tokenizer.start(items, layout), **stacked([self.transformer.once(c) for c in rows])},
            key=tuple(sampling.guide_after),
        )
        if given is not None:
            for k in range(s.given_groups()):  # the next predict feeds them in one pass
                span = torch.arange(layout.offsets[k], layout.offsets[k + 1])[None]
                self.commit(s, Categorical(span, torch.empty(0)), given.at(span).value)
        return s

    def predict(self, s: State) -> Categorical | Coded:
        k, layout, cache, places = s.at(), s.layout, s.cache["trunk"], s.key
        cache.forget(k)
        first = layout.offsets.index(cache.end)  # scales first..k are pending
        if first == k:
            x = None if k == 0 else self.tokenizer.next_input(s.more["f"], k, layout)
        else:
            x = self.tokenizer.inputs(s.tokens, layout, first, k + 1)
        c = unstacked(s.more)
        steps = layout.level_N[layout.offsets[first] : layout.offsets[k + 1]].expand(len(s), -1)
        guide = _guide(s.weight(steps.long()))
        taps = {len(self.transformer.trunk) + place: guide for place in places if place < 0}
        h = self.transformer(c, x, layout, first, k + 1, self.see, cache, taps)[:, -layout.sizes[k] :]
        logits = self.transformer.head(h, c.vector).unflatten(0, (len(s), -1))  # [B, G, n, 2 S]
        # mixed before the division by tau, which is the same for both halves: tau may be 0
        logits = mix(logits, s.weight(k)) if 0 in places else logits[:, 0]
        where = torch.arange(layout.offsets[k], layout.offsets[k + 1], device=logits.device)[None]
        logits = temper(self._outcomes(logits), s.knobs["temperature"][:, k])
        return self._dist(where, top_p(top_k(logits, s.knobs["top_k"]), s.knobs["top_p"]), at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        k = s.at()
        s.tokens[:, s.layout.span(k)] = x_BnS
        s.more["f"] = self.tokenizer.accumulate(s.more["f"], x_BnS, k, s.layout)
        s.k = s.k + 1

    def _outcomes(self, logits: Tensor) -> Tensor:
        """[..., 2 S] -> [..., S, 2], index 0 for bit 0; codes [..., V] -> [..., 1, V]."""
        return logits.unflatten(-1, (-1, 2)) if self.config.labels == "bits" else logits.unsqueeze(-2)

    def _dist(self, where: Tensor, logits: Tensor, at: int = 0) -> Categorical | Coded:
        return (Categorical if self.config.labels == "bits" else Coded)(where, logits, at)

    # -- one pass over all scales ---------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical | Coded:
        """The distribution of every token given the true coarser scales, logits [B, N, S, 2]."""
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        layout = layout or self.tokenizer.layout()
        x = self.tokenizer.inputs(tokens, layout)
        return self.one_pass(x, self.transformer.conditioner(cond, null), layout, range(1, layout.K), self.see)

    def one_pass(
        self, x_BNC: Tensor, c: Condition, layout: Layout, scales: Sequence[int], see: See
    ) -> Categorical | Coded:
        """The distributions of scale 0 and of `scales` alone under any inputs of these and any visibility."""
        h = self.transformer.apart(c, x_BNC if scales else None, layout, scales, see)
        return self._dist(layout.where(0, *scales), self._outcomes(self.transformer.head(h, c.vector)))

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What of pictures can be stored for training: their features, which flips need."""
        with torch.no_grad():
            return {"features": self.tokenizer.features(image)}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Mean cross-entropy of a bit in nats under bitwise self-correction; conditions are dropped with `label_drop`.

        batch: "image" [B, 3, Y, X] in [-1, 1], its "features", or "tokens" [B, N, S], of which nothing can be made anew
        (teacher forcing without flips); and the conditions. With "levels" only so many coarse scales are learned.

        Deviation: each item draws flip probabilities of its own, where the official code draws them for the batch.
        """
        return self._step(batch, noise, self.config.flip_strength).losses

    def lesson(self, batch: dict[str, Any], noise: Source) -> Lesson:
        """A step of teacher forcing without flips, with what it was about: who learns on its own predictions has these
        for mistakes. ValueError where labels are codes."""
        if self.config.labels != "bits":
            raise ValueError(f"predictions are put back as bits, and this model has labels={self.config.labels!r}")
        return self._step(batch, noise, 0.0)

    def _step(self, batch: dict[str, Any], noise: Source, strength: float) -> Lesson:
        labels, x, layout = self._targets(batch, noise, strength)
        last = min(batch.get("levels") or layout.K, layout.K)
        n, cond = layout.offsets[last], longest(self.prepare(batch))
        null = noise.uniform("drop", 0, ()).to(labels.device) < self.label_drop
        c = self.transformer.conditioner(cond, null)
        labels, d = labels[:, :n], self.one_pass(x[:, : n - layout.sizes[0]], c, layout, range(1, last), self.see)
        bits = labels.shape[-1] if self.config.labels == "bits" else 1
        nats = -d.log_prob(labels) / bits
        weight = self.token_weights(layout, last).to(nats)
        out = {"loss": (nats * weight).sum(1).mean()}
        if self.config.labels == "bits":
            out["accuracy"] = (d.logits.detach().argmax(-1) == labels).float().mean()
        out |= {f"nats_{k}": nats[:, layout.span(k)].mean().detach() for k in range(last)}
        return Lesson(labels, layout, cond, d, out)

    def token_weights(self, layout: Layout, last: int) -> Tensor:
        """What the tokens of the first scales count [n], sum 1."""
        size = torch.tensor([size for size in layout.sizes[:last] for _ in range(size)], dtype=torch.float64)
        weight = size**-0.5 if self.config.reweight else torch.ones_like(size)
        return weight / weight.sum()

    @torch.no_grad()
    def _targets(self, batch: Mapping[str, Any], noise: Source, strength: float) -> tuple[Tensor, Tensor, Layout]:
        """(labels [B, N, S], inputs without scale 0, layout) under flips with probabilities of up to `strength`."""
        if "tokens" in batch:
            layout = self.tokenizer.layout()
            return batch["tokens"], self.tokenizer.inputs(batch["tokens"], layout), layout
        f = batch["features"] if "features" in batch else self.tokenizer.features(batch["image"])
        cell = self.tokenizer.config.backbone.downsample
        layout = self.tokenizer.layout(tuple(side * cell for side in f.shape[2:]))
        if strength == 0 or self.config.flip_levels == 0:
            return *self.tokenizer.corrected(f, layout), layout
        p_BK = (noise.uniform("strength", 0, (layout.K,)) * (100 * strength + 1)).floor() / 100
        p_BK = p_BK.clamp_max(strength) * (torch.arange(layout.K, device=p_BK.device) < self.config.flip_levels)
        flips = noise.uniform("flip", 0, (layout.n, self.space.S)) < p_BK[:, layout.level_N.long(), None]
        return *self.tokenizer.corrected(f, layout, flips), layout


def _per_scale(one: float | Tensor, each: Sequence[float], name: str, items: int, scales: int) -> Tensor:
    """A setting [B, K]: the list where there is one, else one number (or one per item) for all scales."""
    if not each:
        return per_item(one, items)[:, None].expand(-1, scales).clone()
    if len(each) < scales:
        raise ValueError(f"{name} has one number for each of {scales} scales, got {len(each)}")
    return torch.tensor(each[:scales], dtype=torch.float64).expand(items, -1).clone()


def _guide(weight_BGR: Tensor) -> Tap:
    """Guidance of hidden rows: the mixture takes the place of all halves, but for rows whose scale is 1."""

    def guided(x: Tensor) -> Tensor:
        h_BGRD = x.unflatten(0, (len(weight_BGR), -1))
        mixed = mix(h_BGRD, weight_BGR)[:, None].expand_as(h_BGRD)
        alone = (weight_BGR[:, :1, :, None] == 1).to(x.device)
        return torch.where(alone, h_BGRD, mixed).flatten(0, 1)

    return guided


# -- assembly and presets -----------------------------------------------------------------------------------------


def block(config: InfinityConfig, layer: int) -> AdaLNBlock:
    """Block `layer` of a configuration; stochastic depth grows linearly to `drop_path`."""
    width, heads = config.width, config.heads
    plain = FixedTemperature((width // heads) ** -0.5)
    return AdaLNBlock(
        width,
        modulation=SharedModulation(width) if config.shared_aln else OwnModulation(width),
        attn=SelfAttention(width, heads, CosineTemperature(heads) if config.attn_l2_norm else plain),
        cross=CrossAttention(width, heads, KeyValue(width, width), plain),
        cross_norm=nn.LayerNorm(width, config.norm_eps),
        ffn=FeedForward(width, config.ffn_width),
        eps=config.norm_eps,
        drop_path=config.drop_path * layer / max(config.depth - 1, 1),
    )


def grid(layout: Layout) -> tuple[int, int]:
    """The fine grid of a list of scales: the last scale of its official list at the largest size, else its own last."""
    y, x = (whole(layout) or layout).levels[-1]
    return y, x


def build(config: InfinityConfig) -> Infinity:
    """An Infinity with freshly initialised weights."""
    tokenizer, width, eps = BitPyramid(config.tokenizer), config.width, config.norm_eps
    if config.caption is not None:
        conditioner = CaptionConditioner(config.caption, width, config.pool_heads, eps)
    else:
        assert config.text is not None
        conditioner = WordConditioner(config.text, width, config.pool_heads, eps)
    outputs = 2 * tokenizer.channels if config.labels == "bits" else 2**tokenizer.channels
    transformer = RotaryScaleTransformer(
        conditioner,
        [block(config, i) for i in range(config.depth)],
        AdaLNHead(width, outputs, eps) if config.head_aln else PlainHead(width, outputs, nn.LayerNorm(width, eps)),
        channels=tokenizer.channels,
        width=width,
        head_dim=width // config.heads,
        grid=grid,
        style=config.rope,
        levels=config.levels,
        told_before=config.told_before,
        shared=config.shared_aln,
    )
    transformer.init_weights(gate=config.gate_init, modulation=config.modulation_init, head=config.head_init)
    if config.text is not None:
        transformer.conditioner.encoder.init_weights()
    return Infinity(tokenizer, transformer, config)


def tokenizer_config(bits: int, size: str = "1M", patchify: int = 1) -> BitPyramidConfig:
    """A published tokenizer: 16 pixels per token along each axis."""
    ch_mult = (1, 2, 4, 4, 4) if patchify == 1 else (1, 2, 4, 4)
    cnn = CNNConfig(ch=128, ch_mult=ch_mult, z_channels=bits, using_sa=False, using_mid_sa=False)
    return BitPyramidConfig(bits=bits, scales=_square(size), patchify=patchify, cnn=cnn)


def _square(size: str) -> tuple[tuple[int, int], ...]:
    return tuple((h, w) for h, w in scales_for(1.0, size).levels)


_REPO = "FoundationVision/Infinity"


def _tokenizer_file(name: str) -> File:
    return File(repo=_REPO, name=f"infinity_vae_{name}.pth", inside="vae|")


def _transformer_file(name: str) -> File:
    return File(repo=_REPO, name=name, inside="trainer.gpt_fsdp|")  # the former in checkpoints of a training


TOKENIZERS = {
    "d16": (tokenizer_config(16), _tokenizer_file("d16")),
    "d24": (tokenizer_config(24), _tokenizer_file("d24")),
    "d32": (tokenizer_config(32), _tokenizer_file("d32")),
    "d32reg": (tokenizer_config(32), _tokenizer_file("d32reg")),
    "d64": (tokenizer_config(64), _tokenizer_file("d64")),
    "d56-f8": (tokenizer_config(14, patchify=2), _tokenizer_file("d56_f8_14_patchify")),
}
"""The published tokenizers and their files. A transformer works with the one that it was trained on alone."""


def published_tokenizer(name: str, path: str | Path | None = None) -> BitPyramid:
    """A published tokenizer with its weights, from the hub or a file on disk; KeyError naming the known ones."""
    if name not in TOKENIZERS:
        raise KeyError(f"published tokenizers are {', '.join(TOKENIZERS)}, got {name!r}")
    config, file = TOKENIZERS[name]
    found = fetch(file.repo, file.name, file.revision, sha256=file.sha256) if path is None else Path(path)
    with torch.device("meta"):
        tokenizer = BitPyramid(config)
    load_official(tokenizer, TOKENIZER_KEYS, read(found, file.inside), source=str(found))
    return tokenizer.eval()


NO_DECAY = ("null", "start_position", "level", "offset", "log_scale", "query")
"""What the official optimiser does not decay, beside biases and other 1-d tensors."""


def preset(
    depth: int, width: int, heads: int, chunks: int, tokenizer: str, size: str, drop_path: float = 0.1
) -> InfinityConfig:
    """A size of the official code with one of the published tokenizers."""
    return InfinityConfig(
        tokenizer=replace(TOKENIZERS[tokenizer][0], scales=_square(size)),
        depth=depth,
        width=width,
        heads=heads,
        caption=CaptionConfig(),
        chunks=chunks,
        drop_path=drop_path,
    )


_TRAINING = {
    "generator": {
        "steps": 100_000,
        "batch": 256,
        "lr": 6e-3,  # per 256 pictures of a batch
        "betas": (0.9, 0.97),
        "schedule": "lin0",
        "final": 1.0,
        "weight_decay": 0.005,
        "weight_decay_final": 0.0,
        "clip": 5.0,
        "no_decay": NO_DECAY,
    }
}


def _preset(
    sizes: tuple[int, int, int, int], tokenizer: str, size: str, transformer: str = "", **sampling: float
) -> Preset:
    """A size of the official code; published where `transformer` names a file or a folder of shards."""
    files = {"tokenizer": TOKENIZERS[tokenizer][1], "transformer": _transformer_file(transformer)}
    return Preset(
        config=lambda: preset(*sizes, tokenizer, size),
        files=files if transformer else {},
        licence="MIT" if transformer else "",
        text=CaptionConfig().repo,
        sampling=sampling,
        training=_TRAINING,
    )


CONFIG = InfinityConfig

_2B, _8B = (32, 2048, 16, 8), (40, 3584, 28, 8)

_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}

PRESETS = {
    "infinity-2b": _preset(_2B, "d32reg", "1M", "infinity_2b_reg.pth", cfg_scale=4.0, temperature=0.5),
    "infinity-8b": _preset(_8B, "d56-f8", "1M", "infinity_8b_weights/", cfg_scale=3.0, temperature=1.0),
    "infinity-8b-512": _preset(_8B, "d56-f8", "0.25M", "infinity_8b_512x512_weights/", cfg_scale=3.0, temperature=1.0),
    "infinity-125m": _preset((12, 768, 8, 4), "d16", "0.06M"),
}


def emoji_64() -> InfinityConfig:
    """64x64 pixels, 8x8 cells at the last of five scales: 103 tokens of 16 bits; words are read by an own encoder."""
    bits = 16
    return InfinityConfig(
        tokenizer=BitPyramidConfig(
            bits=bits, scales=tuple((n, n) for n in (1, 2, 3, 5, 8)), patch=PatchConfig(z_channels=bits)
        ),
        depth=6,
        width=192,
        heads=6,
        text=TextConfig(),
        pool_heads=4,
        flip_strength=0.2,
        gate_init=0.1,
        modulation_init=0.5,
    )


PRESETS["infinity-emoji-64"] = Preset(
    config=emoji_64,
    licence="Apache-2.0",
    sampling={"cfg_scale": 3.0, "temperature": 0.5, "top_p": 0.97},
    training={
        "tokenizer": {
            "steps": 2500,
            "batch": 32,
            "lr": 3e-3,
            **_SCHEDULE,
            "clip": 1.0,
            "weight_decay": 0.01,
            "muon": ("grid",),
        },
        "generator": {"steps": 2500, "batch": 64, "lr": 3e-3, **_SCHEDULE, "muon": ("trunk",)},
    },
)

RESULTS = (
    Result(preset="infinity-2b", metric="GenEval", value=0.69, settings="1024 pixels", source="official README"),
    Result(
        preset="infinity-2b", metric="GenEval", value=0.73, settings="with prompt rewriting", source="official README"
    ),
    Result(preset="infinity-2b", metric="DPG", value=83.5, settings="1024 pixels", source="official README"),
    Result(preset="infinity-2b", metric="HPSv2.1", value=32.2, settings="1024 pixels", source="official README"),
    Result(
        preset="infinity-8b", metric="GenEval", value=0.79, settings="with prompt rewriting", source="official README"
    ),
    Result(preset="infinity-8b", metric="DPG", value=86.6, settings="1024 pixels", source="official README"),
)


# -- official names -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NullRows:
    """The features of "no prompt" of another length: cropped, or continued with the initial ones."""

    def to_ours(self, official: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        theirs, (length, channels) = official[0][: len(own[0])], own[0].shape
        if len(theirs) == length or theirs.shape[1:] != own[0].shape[1:]:
            return [theirs]
        rest = null_rows(length, channels)[len(theirs) :] if own[0].is_meta else own[0][len(theirs) :]
        return [torch.cat((theirs, rest.to(theirs)))]

    def to_official(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours


def _bit_weights(like: Tensor) -> Tensor:
    """The official buffer of powers of two; the highest of 64 bits wraps."""
    return 2 ** torch.arange(len(like) - 1, -1, -1, device=like.device)


def _wrapped(ours: str, inside: str) -> Key:
    """A layer that the official class wraps in a module of one layer; files may have the plain name."""
    return Key(f"{ours}.{{p}}", f"{ours}.{inside}.{{p}}", spellings=(f"{ours}.{{p}}",))


TOKENIZER_KEYS = (
    *(
        _wrapped(f"{{path*}}.{layer}", "conv")
        for layer in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut", "downsample.conv", "upsample.conv")
    ),
    *(_wrapped(f"{{path*}}.{layer}", "norm") for layer in ("norm1", "norm2", "norm_out")),
    *(
        Key((), f"{name}.lfq.mask", Constant(_bit_weights), like="encoder.conv_out.bias")
        for name in ("quantizer", "quantize")
    ),
    *SAME_NAMES,  # of other backbones
    Key((), "{rest*}"),  # discriminators and the like
)

_TEXT_KEYS = (
    Key("conditioner.null", "cfg_uncond", NullRows()),
    Key("conditioner.path.norm.{p}", "text_norm.{p}"),
    Key("conditioner.path.pool.query", "text_proj_for_sos.ca.mat_q", Rearrange("1 h d -> h d")),
    Key("conditioner.path.pool.kv.linear.weight", "text_proj_for_sos.ca.mat_kv.weight"),
    Key("conditioner.path.pool.kv.v_bias", "text_proj_for_sos.ca.v_bias"),
    Key(
        (),
        "text_proj_for_sos.ca.zero_k_bias",
        Constant(torch.zeros_like),
        like="conditioner.path.pool.kv.v_bias",
    ),
    Key("conditioner.path.pool.out.{p}", "text_proj_for_sos.ca.proj.{p}"),
    Key("conditioner.path.project.{i}.{p}", "text_proj_for_ca.{i}.{p}"),
)

_BLOCK_KEYS = (
    ("modulation.offset", "ada_gss", Rearrange("1 1 six c -> 1 six c")),
    ("modulation.project.{p}", "ada_lin.1.{p}", None),
    ("attn.qkv.weight", "sa.mat_qkv.weight", None),
    ("attn.q_bias", "sa.q_bias", None),
    ("attn.v_bias", "sa.v_bias", None),
    (
        "attn.temperature.log_scale",  # of one attention kernel or the other
        "sa.scale_mul_1H11",
        Either((Rearrange("1 h 1 1 -> h 1 1"), Rearrange("1 1 h 1 -> h 1 1"))),
    ),
    ("attn.out.{p}", "sa.proj.{p}", None),
    ("cross_norm.{p}", "ca_norm.{p}", None),
    ("cross.q.{p}", "ca.mat_q.{p}", None),
    ("cross.kv.linear.weight", "ca.mat_kv.weight", None),
    ("cross.kv.v_bias", "ca.v_bias", None),
    ("cross.out.{p}", "ca.proj.{p}", None),
    ("ffn.up.{p}", "ffn.fc1.{p}", None),
    ("ffn.down.{p}", "ffn.fc2.{p}", None),
)

_HEAD_KEYS = (
    Key("head.project.{p}", "head_nm.ada_lin.1.{p}"),
    Key("head.norm.{p}", "head.0.{p}"),
)

_LEFT_OUT = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Official buffers that follow from the scales."""


def _block_keys(config: InfinityConfig, i: int) -> list[Key]:
    """The rows of block i, whose official place depends on the chunks; files may have it without."""
    ours, theirs = f"trunk.blocks.{i}", f"blocks.{i}"
    if config.chunks > 1:
        theirs = f"block_chunks.{i // config.per_chunk}.module.{i % config.per_chunk}"

    def names(name: str) -> dict[str, Any]:
        return {"official": f"{theirs}.{name}", "spellings": (f"blocks.{i}.{name}",)}

    rows = [
        Key(f"{ours}.{own}", **names(official), **({"transform": transform} if transform else {}))
        for own, official, transform in _BLOCK_KEYS
    ]
    zeros = Constant(torch.zeros_like)
    rows += [
        Key((), **names(f"{part}.zero_k_bias"), transform=zeros, like=f"{ours}.{like}")
        for part, like in (("sa", "attn.q_bias"), ("ca", "cross.kv.v_bias"))
    ]
    return rows


def keys(config: InfinityConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of both parts."""
    head = Key("head.linear.{p}", "head.{p}" if config.head_aln else "head.1.{p}")
    transformer = (
        *_TEXT_KEYS,
        Key("word.{p}", "word_embed.{p}"),
        Key("start_position", "pos_start"),
        Key("level.weight", "lvl_embed.weight"),
        Key("shared.{p}", "shared_ada_lin.1.{p}"),
        *(row for i in range(config.depth) for row in _block_keys(config, i)),
        *_HEAD_KEYS,
        head,
        Key("conditioner.encoder.{name*}", "conditioner.encoder.{name*}"),  # trained along, in no official file
        *(Key((), name) for name in _LEFT_OUT),
    )
    return {"tokenizer": TOKENIZER_KEYS, "transformer": transformer}


def tiny() -> Infinity:
    """The smallest complete Infinity, for the laws."""
    patch = PatchConfig(grid=(2, 2), z_channels=2, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)
    return build(
        InfinityConfig(
            tokenizer=BitPyramidConfig(bits=2, scales=((1, 1), (1, 2), (2, 2)), patch=patch),
            depth=2,
            width=16,
            heads=2,
            text=TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2),
            pool_heads=2,
            gate_init=1.0,
            modulation_init=1.0,
            head_init=1.0,
        )
    )
