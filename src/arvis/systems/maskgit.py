"""MaskGIT: codes of a VQGAN, guessed all at once by a bidirectional transformer and kept by confidence, set by set.

MaskGIT: Masked Generative Image Transformer, arXiv 2202.04200. The official weights are JAX files, which are not read
here. The mask ratios of MAGE (arXiv 2211.09117) are a setting.

Every step guesses all undecided codes in the presence of the decided ones and keeps those whose log-probability plus
Gumbel noise is largest; a schedule says how many stay hidden, and the noise fades out towards the end. So the order is
found on the way: it is MAR's loop with another order and a categorical head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Dist, Guess
from arvis.nn.attention import attend
from arvis.nn.prefix import ClassPrefix, Prefixer, WordPrefix
from arvis.nn.text import TextConfig
from arvis.nn.trunk import Call, Trunk
from arvis.nn.wide import unrounded
from arvis.noise import Source, truncated
from arvis.orders import hidden_counts, schedule
from arvis.published import Preset, Result
from arvis.sampling import cfg, confidence, lowest, mix, per_item, temper, top_k
from arvis.state import Cond, State
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.grid import GridVQ, GridVQConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import NEVER, Layout, Pin, Space


@dataclass(frozen=True, kw_only=True)
class MaskGITSampling:
    """Official sampling settings; all but `steps` and `schedule` may be one number or one per item.

    `schedule` says which share stays hidden: "cosine", "uniform", "log", "exp" or "pow2", "pow0.5", ... The
    `choice_temperature` weighs the noise in the order; `temperature`, `top_k` and guidance u + `cfg_scale` (c - u) are
    those of the codes, and off as published.
    """

    steps: int = 12
    schedule: str = "cosine"
    choice_temperature: float = 4.5
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        schedule(self.schedule)
        if self.steps < 1:
            raise ValueError(f"there is at least one step, got {self.steps=}")

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model, in the official order."""
        return cls(cfg_scale=1.0, temperature=1.0, top_k=0)


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig:
    """Sizes of the transformer and its tokenizer.

    The condition is a class, or with `text` a prompt; in training `label_drop` of the conditions are left out. Training
    hides a share of the codes that is `mask_schedule` of a uniform number, or with `mask_normal` = (mean, deviation,
    least, most) from a Gaussian cut to an interval: (0.55, 0.25, 0.5, 1.0) in MAGE.
    """

    tokenizer: GridVQConfig
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-12
    num_classes: int = 1000
    text: TextConfig | None = None
    dropout: float = 0.1
    label_drop: float = 0.1
    label_smoothing: float = 0.1
    mask_schedule: str = "cosine"
    mask_normal: tuple[float, float, float, float] | None = None


class PostNormBlock(nn.Module):
    """BERT's block: x = norm(x + attn(x)); x = norm(x + mlp(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.scale, self.dropout = heads, (width // heads) ** -0.5, dropout
        hidden = round(width * mlp_ratio)
        self.qkv, self.out, self.norm1 = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.up, self.down, self.norm2 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width, eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [R, H, n, h]
        seen = attend(q, k, v, call.mask, self.scale, self.dropout if self.training else 0.0)
        x = self.norm1(x + self.drop(self.out(seen.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))


class MaskedTransformer(nn.Module):
    """BERT over the rows of the condition and all codes, hidden ones as the mask token; its head is the word table."""

    def __init__(
        self,
        conditioner: Prefixer,
        blocks: Iterable[nn.Module],
        *,
        layout: Layout,
        codes: int,
        width: int,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layout, self.codes = layout, codes
        self.conditioner: Prefixer = conditioner
        self.word = nn.Embedding(codes + 1, width)  # the last one is the mask token
        self.position = nn.Parameter(torch.zeros(1, layout.n, width))
        self.embed_norm, self.drop = nn.LayerNorm(width, eps), nn.Dropout(dropout)
        self.trunk = Trunk(blocks)
        self.head, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(codes))

    def forward(self, tokens_BN1: Tensor, known_BN: Tensor, prefix_RTD: Tensor) -> Tensor:
        """Logits [B*G, N, V], at least float32, of all positions, behind the rows of the condition [B*G, T, D]."""
        ids = torch.where(known_BN, tokens_BN1[..., 0], self.codes)
        x = (self.word(ids) + self.position).repeat_interleave(len(prefix_RTD) // len(ids), 0)
        x = self.drop(self.embed_norm(torch.cat((prefix_RTD.to(x.dtype), x), 1)))
        h = self.trunk(x, Call())[:, -self.layout.n :]
        h = self.head_norm(F.gelu(self.head(h)))
        with unrounded(h):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            return F.linear(h, self.word.weight[: self.codes].to(h.dtype), self.bias.to(h.dtype))

    def init_weights(self) -> None:
        """BERT's initialisation: everything normal with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)


class MaskGIT(nn.Module):
    """The three verbs over guesses: `group` is filled while walking. The state carries no cache.

    Tokens that are given are known from the start, and the schedule runs over the others of each item.
    """

    Sampling: ClassVar[type] = MaskGITSampling

    def __init__(
        self,
        tokenizer: GridVQ,
        transformer: MaskedTransformer,
        *,
        label_drop: float = 0.1,
        label_smoothing: float = 0.1,
        mask_schedule: str = "cosine",
        mask_normal: tuple[float, float, float, float] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.label_drop, self.label_smoothing = label_drop, label_smoothing
        self.mask_schedule, self.mask_normal = schedule(mask_schedule), mask_normal
        self.space: Space = tokenizer.space

    def parts(self) -> dict[str, nn.Module]:
        """The tokenizer and the generator."""
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
        items, layout, device = len(noise), self._layout(layout), self.transformer.bias.device
        group = torch.full((items, layout.n), NEVER, dtype=torch.int32, device=device)
        tokens = torch.zeros(items, layout.n, 1, dtype=torch.int64, device=device)
        unknown = torch.full((items,), layout.n)
        if given is not None:
            known = given.mask.to(device)
            group = group.masked_fill(known, -1)
            tokens = torch.where(known[..., None], given.value.to(tokens), tokens)
            unknown = (~known).sum(1).cpu()
        scale = per_item(sampling.cfg_scale, items)
        guided = bool((scale != 1).any())
        null = torch.zeros(items, dtype=torch.bool, device=device)
        prefixes = [self.transformer.conditioner(cond, null | u) for u in ((False, True) if guided else (False,))]
        hidden = hidden_counts(unknown, sampling.steps, schedule(sampling.schedule))
        return State(
            tokens=tokens,
            group=group,
            k=torch.zeros(items, dtype=torch.int64),
            K=sampling.steps if bool((unknown > 0).any()) else 0,
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=torch.stack(cfg(scale) if guided else (torch.ones_like(scale),), -1)[:, None],
            knobs={
                name: per_item(getattr(sampling, name), items)
                for name in ("choice_temperature", "temperature", "top_k")
            },
            given=given,
            more={"prefix": torch.stack([p.rows for p in prefixes], 1), "hidden": hidden},
        )

    def predict(self, s: State) -> Guess:
        k, prefix = s.at(), s.more["prefix"]
        logits = self.transformer(s.tokens, s.known, prefix.flatten(0, 1)).unflatten(0, prefix.shape[:2])
        logits = mix(logits, s.weight(k))[:, :, None]
        logits = top_k(temper(logits, s.knobs["temperature"]), s.knobs["top_k"])
        return Guess(torch.arange(s.layout.n, device=logits.device)[None], logits, at=k)

    def masked_again(self, s: State, d: Guess, x_BnS: Tensor) -> Tensor:
        """bool [B, N]: the guesses that the schedule hides again, those of least confidence."""
        k, undecided = s.at(), s.group == NEVER
        u = s.noise.uniform("rank", k, (s.layout.n,))
        score = confidence(d.marginal(x_BnS), s.knobs["choice_temperature"] * (1 - (k + 1) / s.K), u)
        return undecided & lowest(score.masked_fill(~undecided, float("inf")), s.more["hidden"][:, k])

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        """Keeps the confident guesses; the last step keeps all."""
        assert isinstance(d, Guess), "this system predicts guesses"
        k, kept = s.at(), s.group == NEVER
        if k < s.K - 1:
            kept &= ~self.masked_again(s, d, x_BnS)
        s.group = s.group.masked_fill(kept, k)
        s.put(d.where, x_BnS)
        s.k = s.k + 1

    # -- training -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What training may store of images: their codes."""
        return {"tokens": self.tokenizer.encode(image)}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels, in nats, averaged over the hidden codes of the batch.

        batch: "tokens" [B, N, 1], or "image" [B, 3, Y, X] in [-1, 1] to be encoded; and the conditions.
        """
        tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        n, device = tokens.shape[1], tokens.device
        count = (self.hidden_share(noise) * n).ceil().long().clamp(1, n)
        hidden = lowest(noise.uniform("order", 0, (n,)).to(device), count)
        null = noise.uniform("drop", 0, ()).to(device) < self.label_drop
        prefix = self.transformer.conditioner(self.prepare(batch), null).rows
        logits, target = self.transformer(tokens, ~hidden, prefix)[hidden], tokens[hidden][:, 0]
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        hit = (logits.detach().argmax(-1) == target).float().mean()
        return {"loss": loss, "nats": F.cross_entropy(logits.detach(), target), "accuracy": hit}

    def hidden_share(self, noise: Source) -> Tensor:
        """The share of codes that training hides, float64 [B] in (0, 1]."""
        u = noise.uniform("share", 0, ())
        return self.mask_schedule(u, u) if self.mask_normal is None else truncated(u, *self.mask_normal)

    def _layout(self, layout: Layout | None) -> Layout:
        own = self.transformer.layout
        if layout is not None and layout != own:
            raise ValueError(f"positions are learned for {own.levels}, got {layout.levels}; train with these")
        return own


# -- assembly and presets -----------------------------------------------------------------------------------------


def build(config: MaskGITConfig) -> MaskGIT:
    """A MaskGIT with freshly initialised weights."""
    conditioner: ClassPrefix | WordPrefix = ClassPrefix(config.num_classes, config.width)
    if config.text is not None:
        conditioner = WordPrefix(config.text, config.width)
    tokenizer = GridVQ(config.tokenizer)
    transformer = MaskedTransformer(
        conditioner,
        [
            PostNormBlock(config.width, config.heads, config.mlp_ratio, config.norm_eps, config.dropout)
            for _ in range(config.depth)
        ],
        layout=tokenizer.layout(),
        codes=config.tokenizer.vocab_size,
        width=config.width,
        eps=config.norm_eps,
        dropout=config.dropout,
    )
    transformer.init_weights()
    if isinstance(conditioner, WordPrefix):
        conditioner.encoder.init_weights()
    return MaskGIT(
        tokenizer,
        transformer,
        label_drop=config.label_drop,
        label_smoothing=config.label_smoothing,
        mask_schedule=config.mask_schedule,
        mask_normal=config.mask_normal,
    )


def maskgit_256() -> MaskGITConfig:
    """The published sizes: 16x16 cells of 1,024 codes of 256 channels; convolutions without attention around them."""
    cnn = CNNConfig(ch=128, z_channels=256, using_sa=False, using_mid_sa=False)
    tokenizer = GridVQConfig(grid=(16, 16), vocab_size=1024, code_width=256, l2_norm=False, cnn=cnn)
    return MaskGITConfig(tokenizer=tokenizer, depth=24, width=768, heads=16)


def emoji_64() -> MaskGITConfig:
    """64x64 pixels, 8x8 cells of 1,024 codes; words of an encoder that is trained along."""
    tokenizer = GridVQConfig(grid=(8, 8), vocab_size=1024, patch=PatchConfig())
    return MaskGITConfig(
        tokenizer=tokenizer,
        depth=6,
        width=256,
        heads=4,
        norm_eps=1e-6,
        num_classes=0,
        text=TextConfig(words=16),
        dropout=0.0,
        label_smoothing=0.0,
    )


CONFIG = MaskGITConfig

_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}

PRESETS = {
    "maskgit-256": Preset(
        config=maskgit_256,
        licence="Apache-2.0",
        training={
            "generator": {
                "steps": 300 * (1_281_167 // 256),
                "batch": 256,
                "lr": 1e-4,
                "betas": (0.9, 0.96),
                "weight_decay": 0.045,
                "schedule": "constant",
                "warmup": 5000,
                "clip": 0.0,
            }
        },
    ),
    "maskgit-emoji-64": Preset(
        config=emoji_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 2.0, "choice_temperature": 3.0},
        training={
            "tokenizer": {"steps": 2000, "batch": 64, "lr": 1e-3, **_SCHEDULE, "clip": 1.0, "weight_decay": 0.01},
            "generator": {"steps": 2500, "batch": 64, "lr": 3e-3, **_SCHEDULE, "muon": ("trunk",)},
        },
    ),
}

RESULTS = (
    Result(preset="maskgit-256", metric="FID", value=6.18, settings="8 steps, no guidance, 50k", source="paper"),
    Result(preset="maskgit-256", metric="IS", value=182.1, settings="8 steps, no guidance, 50k", source="paper"),
)


def tiny() -> MaskGIT:
    """The smallest complete MaskGIT, for the laws: more positions than steps."""
    patch = PatchConfig(
        patch=4, grid=(4, 4), z_channels=4, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4
    )
    tokenizer = GridVQConfig(grid=(4, 4), vocab_size=5, code_width=4, l2_norm=False, patch=patch)
    system = build(MaskGITConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3))
    for name, p in system.transformer.named_parameters():
        if "norm" not in name:  # far from where training starts, so that everything matters
            nn.init.normal_(p, std=0.3)
    return system
