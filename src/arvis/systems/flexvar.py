"""FlexVAR: next-scale prediction where every scale is the whole picture, so that any list of scales is a valid one.

FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction, arXiv 2502.20313. Weights: MIT.

A scale predicts its own codes, not what coarser ones left over; its input is the code map of the scale before,
enlarged. Positions are one learned grid, resized to every scale. Lists are drawn at random in training and are an
argument of each generation: other numbers of steps, sizes and shapes need no training. The picture is the last scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.adaln import (
    AdaLNBlock,
    AdaLNHead,
    CosineTemperature,
    FeedForward,
    FixedTemperature,
    OwnModulation,
    SelfAttention,
    SharedModulation,
)
from arvis.nn.cache import Cache
from arvis.nn.scales import ClassConditioner, Condition, Conditioner, initialise, made_ahead, stacked, unstacked
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Source
from arvis.orders import by_level
from arvis.published import File, Preset, Result
from arvis.quant.multiscale import area, to_rows
from arvis.rows import Rows, See, render, upto
from arvis.sampling import cfg, mix, per_item, temper, top_k, top_p, var_cfg
from arvis.state import Cond, Lesson, Staged, State
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.resized import ResizedVQ, ResizedVQConfig
from arvis.tokens import Layout, Pin, pyramid
from arvis.weights import Key
from arvis.weights.families import ADALN_KEYS, mask_key, vqgan_keys


@dataclass(frozen=True, kw_only=True)
class FlexVARSampling:
    """Official sampling settings; scale, temperature and filters may be one number or one per item.

    `scales` are the sides of the list of scales in cells (none given: the tokenizer's), one step each; `shape` (Y, X)
    pixels stretches it to a picture of that shape. Guidance is a "ramp", (1 + t) c - t u with t = cfg_scale k / min(K -
    1, `ramp_steps`), which goes on beyond cfg_scale in longer lists, and t = cfg_scale at scales larger than
    `largest`; or "constant", u + cfg_scale (c - u). Codes are drawn at scales whose sides are all among `drawn` and at
    most `largest`, elsewhere the likeliest one is taken (Compat: part of the published numbers); with no `drawn` they
    are drawn everywhere.
    """

    scales: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    cfg_scale: float = 2.5
    guidance: Literal["ramp", "constant"] = "ramp"
    ramp_steps: int = 9
    largest: int = 16
    drawn: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)
    top_k: int = 900
    top_p: float = 0.95
    temperature: float = 1.0

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model."""
        return cls(cfg_scale=0.0, drawn=(), top_k=0, top_p=0.0)


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Random lists of scales for training: `first`, then `picks` (how many distinct sides of lowest..highest), `last`.

    The share `own` of the steps takes the tokenizer's list instead. One, two, ... inner scales behind `first` are left
    out where a uniform number exceeds `gaps`; then one of the last four is, while there are more than `most` tokens.
    """

    own: float = 0.05
    first: tuple[int, ...] = (1, 2)
    picks: tuple[tuple[int, int, int], ...] = ((5, 3, 10), (2, 11, 15))
    last: int = 16
    gaps: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99)
    most: int = 680

    def __post_init__(self) -> None:
        if any(not 0 <= n <= highest - lowest + 1 for n, lowest, highest in self.picks):
            raise ValueError(f"picks are (how many, lowest, highest) with as many sides between, got {self.picks}")

    def draw(self, own: tuple[int, ...], noise: Source) -> tuple[int, ...]:
        """The list of one step, from the noise of the first item: a batch shares it."""
        count = 3 + len(self.first) + len(self.gaps) + 2 * sum(n for n, _, _ in self.picks)
        u = iter(noise.uniform("scales", 0, (count,))[0].tolist())
        if next(u) < self.own:
            return own
        sides = [*self.first]
        for n, lowest, highest in self.picks:
            pool = [*range(lowest, highest + 1)]
            sides += sorted(pool.pop(int(next(u) * len(pool))) for _ in range(n))
        sides = [*sorted(sides), self.last]
        gap = next(u)
        for limit in self.gaps:
            inner = len(sides) - 1 - len(self.first)
            if gap > limit and inner > 0:
                del sides[len(self.first) + int(next(u) * inner)]
        while sum(p * p for p in sides) > self.most and len(sides) > 1:
            del sides[-1 - int(next(u) * min(4, len(sides) - 1))]
        return tuple(sides)


@dataclass(frozen=True, kw_only=True)
class FlexVARConfig:
    """Sizes of the transformer and its tokenizer; positions are learned on `grid` x `grid` cells."""

    tokenizer: ResizedVQConfig
    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    grid: int = 32
    lists: ListConfig = field(default_factory=ListConfig)
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    drop_path: float = 0.0
    label_drop: float = 0.1
    adaln_init: float = 1e-3


class ResizedScaleTransformer(nn.Module):
    """The transformer over any list of scales: embed, blocks, head; positions are one grid [1, D, g, g], averaged down
    (or repeated up) to the cells of a scale."""

    def __init__(
        self,
        conditioner: Conditioner,
        blocks: Sequence[AdaLNBlock],
        *,
        grid: int,
        channels: int,
        codes: int,
        width: int,
        shared: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.width = width
        self.conditioner: Conditioner = conditioner
        self.word = nn.Linear(channels, width)
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(waves(width, grid))
        self.shared = nn.Linear(width, 6 * width) if shared else None
        self.trunk = Trunk(blocks)
        self.head = AdaLNHead(width, codes, eps)

    def embed(self, c: Condition, x_BNC: Tensor | None, layout: Layout, first: int, last: int) -> Tensor:
        """Input rows [B*G, R, D] of scales first..last-1; x holds their features, without scale 0."""
        rows = []
        if first == 0:
            rows.append(c.start[:, None] + self.start_position)
        if x_BNC is not None:
            word = self.word(x_BNC)  # the same for every guidance row: multiplied once
            rows.append(word.repeat_interleave(len(c.start) // len(word), 0))
        position = [to_rows(area(self.position, size)) for size in layout.levels[first:last]]
        return torch.cat(rows, 1) + torch.cat(position, 1)

    def forward(
        self,
        c: Condition,
        x_BNC: Tensor | None,
        layout: Layout,
        first: int,
        last: int,
        see: See,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden rows [B*G, R, D] of scales first..last-1, over the cache where there is one."""
        if layout.sizes[0] != 1:
            raise ValueError(f"a list of scales begins with one cell, got {layout.levels}")
        x = self.embed(c, x_BNC, layout, first, last)
        rows = Rows.of(layout.level_N[layout.offsets[first] : layout.offsets[last]])
        # nothing reads the rows of the last scale later, so they take no slot of the cache
        mask = render(see, rows, rows) if cache is None else cache.place(see, rows, keep=last < layout.K)
        vector = self.modulation(c) if c.ahead is None else c.vector
        return self.trunk(x, Call(mask=mask, cache=cache, vector=vector, ahead=c.ahead, rows=rows))

    def once(self, c: Condition) -> Condition:
        """The condition with the vectors of all blocks."""
        return c._replace(ahead=made_ahead(self.trunk, self.modulation(c)))

    def modulation(self, c: Condition) -> Tensor:
        """What modulates the blocks: the vector of the condition, or the six vectors that all blocks share."""
        return c.vector if self.shared is None else self.shared(F.silu(c.vector)).view(-1, 6, self.width)

    def init_weights(self, gate: float) -> None:
        """VAR's initialisation; the grid of positions stays as it was made."""
        initialise(self, self.trunk, self.head, self.width, gate)
        nn.init.trunc_normal_(self.start_position, std=(1 / (3 * self.width)) ** 0.5)


def waves(width: int, grid: int) -> Tensor:
    """The first positions [1, D, g, g]: at row i and column j channel 2 m is sin(i w_m) and channel 2 m + 1 is
    cos(j w_m), w_m = 10000^(-2 m / D)."""
    rate = 10000 ** (-torch.arange(0, width, 2).double() / width)
    angle = rate[:, None] * torch.arange(grid).double()
    rows, columns = angle.sin()[:, :, None], angle.cos()[:, None, :]
    both = torch.stack((rows.expand(-1, -1, grid), columns.expand(-1, grid, -1)), 1)
    return both.flatten(0, 1)[None, :width].float()


Objective = Callable[[Staged, dict[str, Any], Source], dict[str, Tensor]]
"""(system, batch, noise) -> losses by name; "loss" is minimised."""


def teacher_forcing(system: Staged, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
    """Every scale is learned under the true coarser ones."""
    return system.lesson(batch, noise).losses


class FlexVAR(nn.Module):
    """The three verbs over any list of scales that begins with one cell. `see` is the visibility between scales."""

    Sampling: ClassVar[type] = FlexVARSampling

    def __init__(
        self,
        tokenizer: ResizedVQ,
        transformer: ResizedScaleTransformer,
        lists: ListConfig,
        see: See = upto,
        label_drop: float = 0.1,
        objective: Objective = teacher_forcing,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.lists = tokenizer, transformer, lists
        self.see, self.label_drop, self.objective = see, label_drop, objective
        self.space = tokenizer.space

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.transformer.conditioner.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.transformer.conditioner.prepare(request)

    def layout(self, sampling: Any) -> Layout:
        """The list of scales that some settings ask for."""
        if len(sampling.shape) not in (0, 2) or any(p < 1 for p in sampling.scales):
            raise ValueError(f"scales are sides of at least 1 cell and shape is Y,X pixels, got {sampling}")
        asked = bool(sampling.scales or sampling.shape)
        return self.tokenizer.layout(sampling.shape or None, sampling.scales) if asked else self.tokenizer.layout()

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        items, layout = len(noise), layout or self.layout(sampling)
        device = self.transformer.position.device
        weights = weigh(sampling, items, layout)
        guided = weights.shape[-1] > 1
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
            weights=weights,
            knobs={
                "top_k": kept_codes(sampling, items, layout),
                **{name: per_item(getattr(sampling, name), items) for name in ("top_p", "temperature")},
            },
            given=given,
            cache={"trunk": Cache(items, layout.offsets[-2])},
            more={"f": self.tokenizer.start(items, layout), **stacked([self.transformer.once(c) for c in rows])},
        )
        if given is not None:
            for k in range(s.given_groups()):  # the next predict feeds them in one pass
                span = torch.arange(layout.offsets[k], layout.offsets[k + 1])[None]
                self.commit(s, Categorical(span, torch.empty(0)), given.at(span).value)
        return s

    def predict(self, s: State) -> Categorical:
        k, layout, cache = s.at(), s.layout, s.cache["trunk"]
        cache.forget(k)
        first = layout.offsets.index(cache.end)  # scales first..k are pending
        if first == k:
            x = None if k == 0 else self.tokenizer.next_input(s.more["f"], k, layout)
        else:
            x = self.tokenizer.inputs(s.tokens, layout, first, k + 1)
        c = unstacked(s.more)
        h = self.transformer(c, x, layout, first, k + 1, self.see, cache)[:, -layout.sizes[k] :]
        logits = self.transformer.head(h, c.vector).unflatten(0, (len(s), -1))  # [B, G, n, V]
        logits = mix(logits, s.weight(k))[:, :, None]
        logits = top_p(top_k(temper(logits, s.knobs["temperature"]), s.knobs["top_k"][:, k]), s.knobs["top_p"])
        where = torch.arange(layout.offsets[k], layout.offsets[k + 1], device=logits.device)[None]
        return Categorical(where, logits, at=k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        k = s.at()
        s.tokens[:, s.layout.span(k)] = x_BnS
        s.more["f"] = self.tokenizer.accumulate(s.more["f"], x_BnS, k, s.layout)
        s.k = s.k + 1

    # -- one pass over all scales ---------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        """The distribution of every token given the true coarser scales, logits [B, N, 1, V]."""
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return self._teacher(tokens, self.transformer.conditioner(cond, null), layout or self.tokenizer.layout())

    def _teacher(self, tokens: Tensor, c: Condition, layout: Layout) -> Categorical:
        x = self.tokenizer.inputs(tokens, layout)
        return self.one_pass(x, c, layout, range(1, layout.K), self.see)

    def one_pass(self, x_BNC: Tensor, c: Condition, layout: Layout, scales: Sequence[int], see: See) -> Categorical:
        """The distributions of scale 0 and of `scales` alone under any inputs of these and any visibility."""
        alone = Layout(tuple(layout.levels[k] for k in (0, *scales)))
        h = self.transformer(c, x_BNC if scales else None, alone, 0, alone.K, see)
        return Categorical(layout.where(0, *scales), self.transformer.head(h, c.vector)[:, :, None])

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What of pictures can be stored for training: their features, as every step looks up another list."""
        with torch.no_grad():
            return {"features": self.tokenizer.features(image)}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """The losses of the objective; without another one, mean cross-entropy over all tokens of a random list.

        batch: "image" [B, 3, Y, X] in [-1, 1] or its "features", and the conditions, which are dropped with
        `label_drop`. With "levels" only so many scales are learned.
        """
        return self.objective(self, batch, noise)

    def lesson(self, batch: dict[str, Any], noise: Source) -> Lesson:
        """A step of teacher forcing on a random list of scales, with what it was about."""
        f = (batch if "features" in batch else self.latents(batch["image"]))["features"]
        sides = self.lists.draw(self.tokenizer.config.patch_nums, noise)
        layout = pyramid(sides[: batch.get("levels") or None])
        tokens, cond = self.tokenizer.tokens(f, layout), self.prepare(batch)
        null = noise.uniform("drop", 0, ()).to(tokens.device) < self.label_drop
        d = self._teacher(tokens, self.transformer.conditioner(cond, null), layout)
        nats = -d.log_prob(tokens)
        hit = (d.logits.detach().argmax(-1) == tokens)[..., 0].float()
        ends = {"nats_first": nats[:, 0].mean(), "nats_last": nats[:, layout.span(layout.K - 1)].mean()}
        ends = {name: value.detach() for name, value in ends.items()}
        return Lesson(tokens, layout, cond, d, {"loss": nats.mean(), "accuracy": hit.mean(), **ends})


# -- sampling -----------------------------------------------------------------------------------------------------


def weigh(sampling: Any, items: int, layout: Layout) -> Tensor:
    """Guidance weights [B, K, 1 or 2] over the condition and none."""
    scale, neutral = per_item(sampling.cfg_scale, items), 0.0 if sampling.guidance == "ramp" else 1.0
    if not bool((scale != neutral).any()):
        return torch.ones(items, layout.K, 1, dtype=scale.dtype)
    if sampling.guidance == "constant":
        return torch.stack(cfg(scale[:, None].expand(-1, layout.K)), -1)
    ramp = torch.arange(layout.K).double() / max(min(layout.K - 1, sampling.ramp_steps), 1)
    beyond = torch.tensor([max(size) > sampling.largest for size in layout.levels])
    return torch.stack(var_cfg(scale[:, None] * torch.where(beyond, 1.0, ramp)), -1)


def kept_codes(sampling: Any, items: int, layout: Layout) -> Tensor:
    """How many codes stay at each scale [B, K]: top_k, and one where a scale is not drawn."""
    usual = [max(size) <= sampling.largest and set(size) <= set(sampling.drawn) for size in layout.levels]
    drawn = torch.tensor(usual) if sampling.drawn else torch.ones(layout.K, dtype=torch.bool)
    return torch.where(drawn, per_item(sampling.top_k, items)[:, None], 1.0)


# -- assembly and presets -----------------------------------------------------------------------------------------


def block(config: FlexVARConfig, layer: int) -> AdaLNBlock:
    """Block `layer` of a configuration; stochastic depth grows linearly to `drop_path`."""
    width, heads = config.width, config.heads
    plain = FixedTemperature(0.25 * (width // heads) ** -0.5)
    return AdaLNBlock(
        width,
        modulation=SharedModulation(width) if config.shared_aln else OwnModulation(width),
        attn=SelfAttention(width, heads, CosineTemperature(heads) if config.attn_l2_norm else plain),
        ffn=FeedForward(width, round(width * config.mlp_ratio)),
        eps=config.norm_eps,
        drop_path=config.drop_path * layer / max(config.depth - 1, 1),
    )


def build(config: FlexVARConfig, objective: Objective = teacher_forcing) -> FlexVAR:
    """A FlexVAR with freshly initialised weights."""
    transformer = ResizedScaleTransformer(
        ClassConditioner(config.num_classes, config.width),
        [block(config, i) for i in range(config.depth)],
        grid=config.grid,
        channels=config.tokenizer.code_width,
        codes=config.tokenizer.vocab_size,
        width=config.width,
        shared=config.shared_aln,
        eps=config.norm_eps,
    )
    transformer.init_weights(config.adaln_init)
    tokenizer = ResizedVQ(config.tokenizer)
    return FlexVAR(tokenizer, transformer, config.lists, label_drop=config.label_drop, objective=objective)


def preset(depth: int, adaln_init: float) -> FlexVARConfig:
    """VAR's scaling rule: width 64 per layer of depth, one head per layer of depth."""
    return FlexVARConfig(
        tokenizer=ResizedVQConfig(cnn=CNNConfig(ch=128, z_channels=256)),
        depth=depth,
        width=64 * depth,
        heads=depth,
        drop_path=0.1 * depth / 24,
        adaln_init=adaln_init,
    )


STEPS = {
    6: (1, 2, 4, 6, 10, 16),
    8: (1, 2, 3, 5, 7, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
    14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
    15: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32),
}
"""The published lists by their number of steps, all for 256 pixels but the last, which is for 512."""

NO_DECAY = ("start_position", "position", "offset", "log_scale")
"""What the official optimiser does not decay, beside biases and other 1-d tensors."""

_REPO = "jiaosiyu1999/FlexVAR"


def training(epochs: int, base_lr: float, final: float, batch: int = 768) -> dict[str, dict[str, Any]]:
    """So many epochs of ImageNet at lr `base_lr` per 256 rows, in the official schedule of the generator."""
    steps = epochs * (1_281_167 // batch)
    return {
        "generator": {
            "steps": steps,
            "batch": batch,
            "lr": base_lr * batch / 256,
            "warmup": steps // 50,
            "schedule": "lin0",
            "final": final,
            "weight_decay": 0.05,
            "clip": 2.0,
            "no_decay": NO_DECAY,
        }
    }


def _preset(depth: int, epochs: int, adaln_init: float, base_lr: float, final: float) -> Preset:
    """A published size; its file is named by its last epoch."""
    return Preset(
        config=lambda: preset(depth, adaln_init),
        files={
            "tokenizer": File(repo=_REPO, name="FlexVAE.pth", inside="model"),
            "transformer": File(repo=_REPO, name=f"FlexVARd{depth}-epo{epochs - 1}.pth", inside="trainer.var_wo_ddp|"),
        },
        licence="MIT",
        training=training(epochs, base_lr, final),
    )


def emoji_64() -> FlexVARConfig:
    """The nine groups of the emoji world at 64x64 pixels; lists of up to five scales that end in 8x8 cells."""
    return FlexVARConfig(
        tokenizer=ResizedVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=1024, patch=PatchConfig()),
        depth=8,
        width=192,
        heads=6,
        num_classes=9,
        grid=16,
        lists=ListConfig(picks=((2, 3, 7),), last=8),
        shared_aln=True,
        adaln_init=0.1,
    )


CONFIG = FlexVARConfig

EMOJI_SAMPLING: dict[str, Any] = {"cfg_scale": 2.0, "top_k": 200, "top_p": 0.9, "drawn": ()}
_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}
EMOJI_TRAINING: dict[str, dict[str, Any]] = {
    "tokenizer": {
        "steps": 2000,
        "batch": 64,
        "lr": 3e-3,
        **_SCHEDULE,
        "clip": 1.0,
        "weight_decay": 0.01,
        "muon": ("coder.grid",),
    },
    "generator": {"steps": 2500, "batch": 64, "lr": 3e-3, **_SCHEDULE, "muon": ("trunk",), "no_decay": NO_DECAY},
}

PRESETS = {
    "flexvar-d16": _preset(16, 180, 1e-3, 1e-4, 0.1),
    "flexvar-d20": _preset(20, 250, 1e-3, 1e-4, 0.1),
    "flexvar-d24": _preset(24, 350, 1e-4, 8e-5, 0.01),
    "flexvar-emoji-64": Preset(config=emoji_64, licence="Apache-2.0", sampling=EMOJI_SAMPLING, training=EMOJI_TRAINING),
}

RESULTS = (
    *(
        Result(preset=name, metric=metric, value=value, settings="10 steps, at 256", source="official README")
        for name, fid, score in (
            ("flexvar-d16", 3.05, 291.3),
            ("flexvar-d20", 2.41, 299.3),
            ("flexvar-d24", 2.21, 299.1),
        )
        for metric, value in (("FID", fid), ("IS", score))
    ),
    Result(preset="flexvar-d24", metric="FID", value=2.08, settings="13 steps, zero-shot, at 256", source="abstract"),
)


# -- official names -----------------------------------------------------------------------------------------------

TRANSFORMER_KEYS = (
    Key("conditioner.embedding.weight", "class_emb.weight"),
    *ADALN_KEYS,
)


def keys(config: FlexVARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part."""
    mask = mask_key(pyramid(config.tokenizer.patch_nums), optional=True)  # in files, of the list that was trained last
    return {"tokenizer": vqgan_keys(config.tokenizer.backbone), "transformer": (*TRANSFORMER_KEYS, mask)}


def tiny_config() -> FlexVARConfig:
    """The smallest complete one."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
    return FlexVARConfig(
        tokenizer=ResizedVQConfig(patch_nums=(1, 2, 3), vocab_size=5, code_width=4, cnn=cnn),
        depth=2,
        width=16,
        heads=2,
        num_classes=3,
        grid=4,
        lists=ListConfig(own=0.3, first=(1,), picks=((1, 2, 2),), last=3, gaps=(0.5,)),
        adaln_init=1.0,
    )


def tiny() -> FlexVAR:
    """The smallest complete FlexVAR, for the laws."""
    return build(tiny_config())
