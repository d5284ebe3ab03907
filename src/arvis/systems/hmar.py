"""HMAR: next-scale prediction where a scale sees itself alone, and is then drawn again in parts, the surest kept.

HMAR: Efficient Hierarchical Masked Auto-Regressive Image Generation, arXiv 2506.04421. Weights: NVIDIA licence, not for
commercial use.

The input of a scale is the picture so far, so the scales before it need not be seen (rule `same`): there is no cache,
and one pass over all scales is as many independent ones. A second branch, the last blocks and the head once more,
predicts hidden tokens of a scale from its other ones. It hides the tokens that are least sure, and draws them again, in
as many passes as a schedule says; the schedule is a setting of sampling. The branch is trained after the rest (stage
2), from a copy of what it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist, pinned
from arvis.nn.adaln import AdaLNHead
from arvis.nn.neighbourhood import InsideScales
from arvis.nn.scales import ClassConditioner, Condition, ScaleTransformer, made_ahead, unstacked
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Source
from arvis.published import File, Preset, Result
from arvis.rows import render, same
from arvis.sampling import draw, lowest, mix, per_item, temper, top_k, top_p, var_cfg
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
from arvis.walk import Watch
from arvis.weights import Key, Rearrange

Schedule = tuple[tuple[int, ...], ...]
"""For each scale how many tokens are kept of the first pass, then of every further one; scales without a row are drawn
at once."""

Stage = Literal["scales", "mask"]
Reweight = Literal["lognorm", "equal", "none"]

REFINED: Schedule = ((1,), (1, 3), (1, 1, 2, 5))
"""The official schedule at 256 pixels."""

UNGUIDED = 1e-6
"""Of the guidance scale, what the passes of the branch are guided with: nothing to speak of (Compat)."""


@dataclass(frozen=True, kw_only=True)
class HMARSampling:
    """Official sampling settings; all but the schedule may be one number or one per item.

    `cfg_scale` is t at the last scale. Filters come before the temperature, which does not touch the confidence.
    """

    cfg_scale: float = 1.7
    top_k: int = 1000
    top_p: float = 0.99
    temperature: float = 1.0
    schedule: Schedule = REFINED

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the model, every scale drawn at once."""
        return cls(cfg_scale=0.0, top_k=0, top_p=0.0, schedule=())


@dataclass(frozen=True, kw_only=True)
class HMARConfig:
    """The transformer over scales, and how many of its last layers the branch has once more.

    `learns` is the stage of training, "scales" and then "mask"; until the second, the branch draws nothing. A scale
    counts in the first by a log-normal weight of its side, each the same ("equal"), or each token the same ("none").
    """

    scale: VARConfig
    mask_layers: int = 8
    learns: Stage = "scales"
    reweight: Reweight = "lognorm"

    def __post_init__(self) -> None:
        if not 0 < self.mask_layers <= self.scale.depth:
            raise ValueError(f"the branch has 1..{self.scale.depth} of the last layers, got {self.mask_layers=}")


# -- two branches ---------------------------------------------------------------------------------------------------


class BranchedTransformer(nn.Module):
    """A transformer over scales whose last blocks and head exist twice: for a next scale, and for its hidden tokens."""

    def __init__(self, scales: ScaleTransformer, blocks: Sequence[nn.Module], codes: int, eps: float) -> None:
        super().__init__()
        self.scales = scales
        self.mask = nn.Parameter(torch.zeros(scales.width))
        self.trunk = Trunk(blocks)
        self.head = AdaLNHead(scales.width, codes, eps)
        self.copy_()

    @property
    def common(self) -> range:
        """The layers that both branches run."""
        return range(len(self.scales.trunk) - len(self.trunk))

    @torch.no_grad()
    def copy_(self) -> None:
        """The branch as a copy of what it stands beside."""
        for mine, other in zip(self.trunk.blocks, self.scales.trunk.blocks[len(self.common) :], strict=True):
            mine.load_state_dict(other.state_dict())
        self.head.load_state_dict(self.scales.head.state_dict())

    def forward(
        self, c: Condition, x_BNC: Tensor | None, own_BMC: Tensor, hidden_BM: Tensor, first: int, last: int
    ) -> Tensor:
        """Logits [B*G, R, V] of scales first..last-1, told what the tokens that are not hidden add to the picture.

        x is what came before each scale and `own` what its tokens add, both without scale 0, which is told nothing.
        """
        told = torch.where(hidden_BM[..., None], self.mask, F.linear(own_BMC, self.scales.word.weight))
        x = self.scales.embed(c, x_BNC, first, last)
        told = F.pad(told, (0, 0, x.shape[1] - told.shape[1], 0)).repeat_interleave(len(x) // len(told), 0)
        rows = self.scales.rows(*range(first, last))
        vector = self.scales.modulation(c) if c.ahead is None else c.vector
        call = Call(mask=render(same, rows, rows), vector=vector, ahead=c.ahead, rows=rows)
        x = self.scales.trunk(x + told, call, self.common)
        own = call if c.ahead is None else replace(call, ahead=c.ahead[:, len(self.scales.trunk) :])
        return self.head(self.trunk(x, own), c.vector)

    def vectors(self, c: Condition) -> Tensor:
        """What modulates the blocks of the branch [B*G, layers, 6, D]: once for all its passes."""
        return made_ahead(self.trunk, self.scales.modulation(c))


@dataclass
class Refined:
    """A scale drawn at once and then, pass by pass, its least sure tokens hidden and drawn again.

    `logits` [B, n, 1, V] are those of the first pass, guided and filtered; `left` [B, R] on the host says how many
    tokens each further pass draws; `again(x, hidden)` gives its logits for hidden [B, n] tokens of x. A token is as
    sure as it is likely in the logits of the last pass, and is hidden only if it was hidden before.
    """

    where: Tensor
    logits: Tensor
    temperature: Tensor
    left: Tensor
    again: Callable[[Tensor, Tensor], Tensor]
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        logits, passes = self.logits, self.left.shape[1]
        x = pinned(self._drawn(noise, "draw", logits), pin)
        hidden = torch.ones_like(x[..., 0], dtype=torch.bool) if pin is None else ~pin.mask.to(x.device)
        for i in range(passes):
            if watch is not None:
                watch(x, i, passes + 1)
            sure = Categorical(self.where, logits).log_prob(x).masked_fill(~hidden, float("inf"))
            hidden = hidden & lowest(sure, self.left[:, i])
            logits = self.again(x, hidden)
            x = torch.where(hidden[..., None], self._drawn(noise, f"draw again {i}", logits), x)
        return x

    def _drawn(self, noise: Source, what: str, logits: Tensor) -> Tensor:
        u = noise.uniform(what, self.at, logits.shape[1:-1])
        return draw(Categorical(self.where, temper(logits, self.temperature)).probs, u.to(logits.device))

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        raise NotImplementedError("which tokens are drawn again depends on the tokens: there is no likelihood")


def left_over(schedule: Schedule, layout: Layout) -> Tensor:
    """How many tokens of each scale are drawn by every further pass, int64 [K, R]; ValueError if rows do not add up."""
    rows = [*schedule, *((n,) for n in layout.sizes[len(schedule) :])]
    for k, (row, n) in enumerate(zip(rows, layout.sizes, strict=False)):
        if sum(row) != n or min(row) < 1 or (k == 0 and len(row) > 1):
            told = "; scale 0 is drawn at once" if k == 0 else ""
            raise ValueError(f"row {k} of a schedule says how {n} tokens are split{told}, got {row}")
    if len(rows) > layout.K:
        raise ValueError(f"a schedule has at most one row for each of {layout.K} scales, got {len(rows)}")
    left = torch.zeros(layout.K, max(map(len, rows)) - 1, dtype=torch.int64)
    for k, row in enumerate(rows):
        for i in range(1, len(row)):
            left[k, i - 1] = sum(row[i:])
    return left


def token_weights(layout: Layout, kind: Reweight) -> Tensor:
    """What each token counts in the loss, float64 [N]; the sum is 1, or the number of scales for "equal".

    "lognorm": scale i has the share N(z_i; 0, 1) / sum, z the sides in reversed order, in deviations from their mean.
    """
    sizes = torch.tensor(layout.sizes, dtype=torch.float64)
    share = torch.ones_like(sizes)
    if kind == "lognorm":
        side = sizes.sqrt().flip(0)
        share = (-((side - side.mean()) / side.std()).square() / 2).exp()
        share = share / share.sum()
    elif kind == "none":
        share = sizes / sizes.sum()
    return (share / sizes)[layout.level_N.long()]


# -- the system -----------------------------------------------------------------------------------------------------


class HMAR(nn.Module):
    """The three verbs over scales that see themselves alone; a scale may be a `Refined` distribution."""

    Sampling: ClassVar[type] = HMARSampling

    def __init__(
        self,
        tokenizer: PyramidVQ,
        transformer: BranchedTransformer,
        *,
        learns: Stage,
        reweight: Reweight,
        label_drop: float,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.learns, self.reweight, self.label_drop = learns, reweight, label_drop
        self.space: Space = tokenizer.space

    @property
    def scales(self) -> VAR:
        """The verbs of next-scale prediction, over the same parts."""
        return VAR(self.tokenizer, self.transformer.scales, same, self.label_drop)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

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
        s = self.scales.start(cond, sampling, noise, layout, given)
        left = left_over(sampling.schedule if self.learns == "mask" else (), s.layout)
        s.knobs["left"] = left.expand(len(s), -1, -1).clone()
        if self.learns == "mask":
            own = self.transformer.vectors(unstacked(s.more)).unflatten(0, (len(s), -1))
            s.more["ahead"] = torch.cat((s.more["ahead"], own), 2)  # of the scales' blocks, then of the branch's
        t = per_item(sampling.cfg_scale, len(s))[:, None].expand(-1, s.K) * UNGUIDED
        weights = var_cfg(t) if s.weights.shape[-1] > 1 else (torch.ones_like(t),)
        s.weights = torch.cat((s.weights, torch.stack(weights, -1)), 1)  # of the scales, then of the branch
        return s

    def predict(self, s: State) -> Categorical | Refined:
        k, scales = s.at(), self.transformer.scales
        logits = scales.head(self.scales.hidden(s), unstacked(s.more).vector)
        logits = self._filtered(s, logits, s.weight(k))
        where, temperature, left = s.layout.where(k).to(logits.device), s.knobs["temperature"], s.knobs["left"][:, k]
        passes = int((left > 0).sum(1).max()) if left.numel() else 0
        if not passes:
            return Categorical(where, temper(logits, temperature), at=k)
        return Refined(where, logits, temperature, left[:, :passes], self._again(s), at=k)

    def _again(self, s: State) -> Callable[[Tensor, Tensor], Tensor]:
        """The branch at the present scale: tokens [B, n, 1], hidden [B, n] -> guided and filtered logits."""
        k, layout, c = s.at(), s.layout, unstacked(s.more)
        x = self.tokenizer.next_input(s.more["f"], k, layout)

        def again(tokens: Tensor, hidden: Tensor) -> Tensor:
            logits = self.transformer(c, x, self.added(tokens, k, layout), hidden, k, k + 1)
            return self._filtered(s, logits, s.weight(s.K + k))

        return again

    def added(self, tokens_Bn1: Tensor, k: int, layout: Layout) -> Tensor:
        """What the tokens of scale k add to the picture, as it is seen at that scale: [B, n, C]."""
        none = self.tokenizer.start(len(tokens_Bn1), layout)
        return self.tokenizer.next_input(self.tokenizer.accumulate(none, tokens_Bn1, k, layout), k, layout)

    def _filtered(self, s: State, logits: Tensor, weight_BG: Tensor) -> Tensor:
        """Guided and filtered logits [B, n, 1, V] of [B*G, n, V]."""
        logits = mix(logits.unflatten(0, (len(s), -1)), weight_BG)[:, :, None]
        return top_p(top_k(logits, s.knobs["top_k"]), s.knobs["top_p"])

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self.scales.commit(s, d, x_BnS)

    # -- training -------------------------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        """The distribution of every token of a scale drawn at once, logits [B, N, 1, V]: scales are independent."""
        return self.scales.teacher(tokens, cond, layout)

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What can be stored of pictures [B, 3, Y, X] for training: their tokens [B, N, 1]."""
        return self.scales.latents(image)

    def begin_(self) -> None:
        """Freezes what the stage does not learn; a branch that has not learned anything yet is a copy."""
        branch = (self.transformer.trunk, self.transformer.head)
        learned = self.learns == "mask"
        if learned and not self.transformer.mask.any():
            self.transformer.copy_()
        self.transformer.mask.requires_grad_(learned)
        for part in branch if not learned else (self.transformer.scales,):
            part.requires_grad_(False)

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Of "scales": weighted cross-entropy of all tokens, in nats. Of "mask": that of hidden tokens.

        batch: as VAR's. With "levels" the first stage learns only so many coarse scales.
        """
        return self.mask_loss(batch, noise) if self.learns == "mask" else self.scale_loss(batch, noise)

    def scale_loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        lesson = self.scales.lesson(batch, noise)
        nats = -lesson.predicted.log_prob(lesson.tokens)
        weights = token_weights(lesson.layout, self.reweight)[: nats.shape[1]].to(nats)
        return {**lesson.losses, "loss": (nats * weights).sum(1).mean(), "nats": lesson.losses["loss"].detach()}

    def mask_loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Mean cross-entropy of hidden tokens: of every scale but the first, a share that is uniform in (0, 1).

        Deviation: each item hides tokens of its own, where the official code hides the same ones in a batch.
        """
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        null = noise.uniform("drop", 0, ()).to(tokens.device) < self.label_drop
        hidden = self.hidden(noise).to(tokens.device)
        c = self.transformer.scales.conditioner(self.prepare(batch), null)
        logits = self.masked_pass(tokens, hidden, c)
        nats, hit = self.hidden_nats(logits, tokens, hidden)
        return {"loss": nats, "accuracy": hit.detach()}

    def hidden(self, noise: Source, share: Tensor | None = None) -> Tensor:
        """bool [B, N]: random tokens of every scale but the first, at least one of each, a share of them."""
        layout = self.transformer.scales.layout
        share = noise.uniform("share", 0, ()) if share is None else share
        score, out = noise.uniform("hide", 0, (layout.n,)), []
        for k, n in enumerate(layout.sizes):
            count = (share * n).ceil().long().clamp(1, n) if k else torch.zeros_like(share, dtype=torch.int64)
            out.append(lowest(score[:, layout.span(k)], count))
        return torch.cat(out, 1)

    def masked_pass(self, tokens: Tensor, hidden_BN: Tensor, c: Condition) -> Tensor:
        """Logits [B, N, V] of the branch for all scales; the first has no hidden tokens, and is told nothing."""
        layout = self.transformer.scales.layout
        own = torch.cat([self.added(tokens[:, layout.span(k)], k, layout) for k in range(1, layout.K)], 1)
        x = self.tokenizer.inputs(tokens, layout, 1)
        return self.transformer(c, x, own, hidden_BN[:, layout.sizes[0] :], 0, layout.K)

    def hidden_nats(self, logits_BNV: Tensor, tokens: Tensor, hidden_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over items of the mean cross-entropy of hidden tokens in nats; and how many are the likeliest ones."""
        nats = F.cross_entropy(logits_BNV.flatten(0, 1), tokens.flatten(), reduction="none").view(hidden_BN.shape)
        share = hidden_BN / hidden_BN.sum(1, keepdim=True)
        hit = logits_BNV.argmax(-1) == tokens[..., 0]
        return (nats * share).sum(1).mean(), (hit * share).sum(1).mean()


# -- assembly and presets -----------------------------------------------------------------------------------------


def build(config: HMARConfig) -> HMAR:
    """An HMAR with freshly initialised weights."""
    scale, layout = config.scale, pyramid(config.scale.tokenizer.patch_nums)
    blocks = [adaln_block(scale, i, look=InsideScales(layout)) for i in range(scale.depth)]
    again = [adaln_block(scale, i, look=InsideScales(layout)) for i in range(scale.depth)[-config.mask_layers :]]
    base = assemble(scale, ClassConditioner(scale.num_classes, scale.width), blocks=blocks)
    return HMAR(
        base.tokenizer,
        BranchedTransformer(base.transformer, again, scale.tokenizer.vocab_size, scale.norm_eps),
        learns=config.learns,
        reweight=config.reweight,
        label_drop=scale.label_drop,
    )


def preset(depth: int, adaln_init: float) -> HMARConfig:
    """VAR's scaling rule, and the last eight layers once more."""
    return HMARConfig(scale=var.preset(depth, PATCH_NUMS_256, False, adaln_init), learns="mask")


def emoji_64() -> HMARConfig:
    """The nine groups of the emoji world at 64x64 pixels, 8x8 cells at the last of five scales: 103 tokens."""
    return HMARConfig(scale=var.emoji_64(), mask_layers=4)


CONFIG = HMARConfig


def _preset(depth: int, adaln_init: float, **sampling: float) -> Preset:
    """A published size; its first stage is trained as VAR of the same size."""
    base = var.PRESETS[f"var-d{depth}"]
    return Preset(
        config=lambda: preset(depth, adaln_init),
        files={
            "tokenizer": base.files["tokenizer"],
            "transformer": File(repo="nvidia/HMAR", name=f"hmar-d{depth}.pth"),
        },
        licence="NVIDIA licence, non-commercial (NSCLv1)",
        sampling=sampling,
        training=base.training,
    )


PRESETS = {
    "hmar-d16": _preset(16, 1e-3, cfg_scale=1.7, top_k=1000, top_p=0.99),
    "hmar-d20": _preset(20, 1e-3, cfg_scale=1.9, top_k=950, top_p=0.99),
    "hmar-d24": _preset(24, 1e-4, cfg_scale=2.1, top_k=900, top_p=0.99),
    "hmar-d30": _preset(30, 1e-5, cfg_scale=1.7, top_k=1000, top_p=0.99),
    "hmar-emoji-64": replace(var.PRESETS["var-emoji-64"], config=emoji_64),
}

RESULTS = tuple(
    Result(preset="hmar-d24", metric=metric, value=value, settings="more than", source="arXiv 2506.04421, abstract")
    for metric, value in (
        ("training time of VAR over its own", 2.5),
        ("sampling time of VAR over its own", 1.75),
        ("sampling memory of VAR over its own", 3.0),
    )
)


# -- official names -----------------------------------------------------------------------------------------------


def keys(config: HMARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part of an HMAR: one file holds both branches."""
    depth, common = config.scale.depth, config.scale.depth - config.mask_layers
    rows = [
        Key("scales.word.weight", "word_embed.weight"),
        Key("scales.word.bias", "word_embed_bias"),
        Key("mask", "mask_embed.weight", Rearrange("1 c -> c")),
    ]
    for key in (*TRANSFORMER_KEYS, *scale_keys(pyramid(config.scale.tokenizer.patch_nums), same)):
        theirs = str(key.official)
        if theirs.startswith("blocks."):
            for i in range(depth):
                place = f"base_blocks.{i}." if i < common else f"ns_blocks.{i - common}."
                rows.append(_moved(key, "scales.", theirs.replace("blocks.{i}.", place), str(i)))
            rows.append(_moved(key, "", f"mask_{theirs}"))
        elif theirs.startswith("head"):
            rows += [_moved(key, "scales.", f"ns_{theirs}"), _moved(key, "", f"mask_{theirs}")]
        elif not theirs.startswith("word_embed"):
            rows.append(_moved(key, "scales.", theirs))
    return {"tokenizer": TOKENIZER_KEYS, "transformer": tuple(rows)}


def _moved(key: Key, prefix: str, official: str, layer: str = "{i}") -> Key:
    """A row of VAR's names for the same tensors elsewhere."""

    def here(name: str) -> str:
        return prefix + name.replace("{i}", layer) if name else ""

    return replace(
        key, ours=here(key.ours) if isinstance(key.ours, str) else (), official=official, like=here(key.like)
    )


def tiny() -> HMAR:
    """The smallest complete HMAR, for the laws."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 3),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0)
    system = build(HMARConfig(scale=scale, mask_layers=1, learns="mask"))
    for head in (system.transformer.scales.head, system.transformer.head):  # so that what it sees moves what it draws
        nn.init.normal_(head.linear.weight, std=0.5)
    nn.init.normal_(system.transformer.mask)  # the branch is one that has learned
    return system
