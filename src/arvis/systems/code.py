"""CoDe: a large model drafts the coarse scales, a small one refines the fine ones.

Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient, arXiv 2411.17787. Weights: MIT.

Coarse scales have few tokens and need a large model; fine scales have most tokens and need little of one. The drafter
draws scales 0..N-1 and is done: its cache is dropped. What it hands over is the tokens, since the models share their
tokenizer; the refiner builds the sum of their codes anew, reads all N + 1 scales in one pass (rule `upto`, cached) and
goes on. Nothing is verified: the law is p_drafter(first N scales) p_refiner(the rest | first N).

`Collaborative` takes any models over scales; the published system is one of a large and a small VAR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.noise import Source
from arvis.published import File, Preset, Result
from arvis.sampling import per_item, temper, top_k, top_p
from arvis.state import Cond, State
from arvis.systems.var import (
    NO_DECAY,
    PATCH_NUMS_256,
    TOKENIZER_KEYS,
    TRANSFORMER_KEYS,
    VARConfig,
    preset,
    scale_keys,
)
from arvis.systems.var import build as build_scales
from arvis.systems.var import emoji_64 as large_64
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import Layout, Pin, pyramid
from arvis.walk import Watch
from arvis.weights import Key


@dataclass(frozen=True, kw_only=True)
class CodeSampling:
    """Official sampling settings; `top_k` and `temperature` have one number per scale (or more), or one for all.

    Guided logits are cut by top_k, then by top_p, and then divided by the temperature, so what is kept does not depend
    on it. `cfg_scale` is that of the models; without one they are not guided.
    """

    cfg_scale: float | None = 1.5
    top_k: tuple[int, ...] = (600,)
    top_p: float = 0.96
    temperature: tuple[float, ...] = (1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.0, 1.0, 1.0)

    @classmethod
    def plain(cls) -> Self:
        """The unguided, unfiltered law of the models."""
        return cls(cfg_scale=None, top_k=(0,), top_p=0.0, temperature=(1.0,))


@dataclass(frozen=True, kw_only=True)
class CodeConfig:
    """The drafter, the sizes in which the refiner differs from it, and how many scales are drafted."""

    drafter: VARConfig
    depth: int
    width: int
    heads: int
    handover: int

    @property
    def refiner(self) -> VARConfig:
        drop_path = self.drafter.drop_path * self.depth / self.drafter.depth
        return replace(self.drafter, depth=self.depth, width=self.width, heads=self.heads, drop_path=drop_path)


# -- any models over scales -------------------------------------------------------------------------------------------


class Collaborative(nn.Module):
    """The three verbs, each scale by the model whose turn it is: model i goes on at scale `handovers[i - 1]`.

    `models` are by name, in order; they share a tokenizer (which is kept once), scales and conditions, and the first
    one's `prepare` reads a request for all. A state holds the states of the models to come (`then`), so it is gathered
    and joined as a whole. Settings are `CodeSampling`, or the models' own kind, by which they filter themselves.

    Raises ValueError for models that do not go together, and for hand-overs that are no growing list of scales.
    """

    Sampling: ClassVar[type] = CodeSampling

    def __init__(self, models: Mapping[str, Any], handovers: Sequence[int], label_drop: float = 0.1) -> None:
        super().__init__()
        first, *others = models.values()
        scales = first.tokenizer.layout().K
        if len(handovers) != len(others) or not all(a < b for a, b in pairwise((0, *handovers, scales))):
            raise ValueError(
                f"{len(models)} models over {scales} scales need {len(others)} growing hand-overs between 1 and "
                f"{scales - 1}, got {tuple(handovers)}"
            )
        for name, model in models.items():
            if tuple(model.conditions) != tuple(first.conditions) or not _alike(first.tokenizer, model.tokenizer):
                raise ValueError(
                    f"models that hand over share tokenizer and conditions, and {name!r} has others than "
                    f"{next(iter(models))!r}: train both on the tokens of one tokenizer"
                )
            model.tokenizer = first.tokenizer
        self.tokenizer: Any = first.tokenizer
        self.space = first.space
        self.handovers, self.label_drop = tuple(handovers), label_drop
        self._names, self._models = tuple(models), [*models.values()]  # in a list: the tokenizer is registered once
        for name, model in models.items():
            self.add_module(name, _generator(model))

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, **{name: self.get_submodule(name) for name in self._names}}

    @property
    def models(self) -> dict[str, Any]:
        """The models by name, in the order of their turns."""
        return dict(zip(self._names, self._models, strict=True))

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self._models[0].conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self._models[0].prepare(request)

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        states = [model.start(cond, _own(model, sampling), noise, layout, given) for model in self._models]
        if isinstance(sampling, CodeSampling):
            knobs = _knobs(sampling, len(noise), states[0].K)
            for s in states:
                s.knobs = {**s.knobs, **knobs}
        for s, handover in zip(states, self.handovers, strict=False):
            _no_more(s, handover)
        for s, then in pairwise(states):
            s.then = then
        return self._handed_over(states[0])

    def predict(self, s: State) -> Dist:
        d = self._models[self._turn(s)].predict(s)
        return _filtered(d, s) if "scale_top_k" in s.knobs else d

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self._models[self._turn(s)].commit(s, d, x_BnS)
        self._handed_over(s)

    def _turn(self, s: State) -> int:
        """Whose turn it is: as many models wait as there are states behind this one."""
        waiting = 0
        while s.then is not None:
            s, waiting = s.then, waiting + 1
        return len(self._models) - 1 - waiting

    def _handed_over(self, s: State) -> State:
        """At a hand-over the next model's state takes the place of this one's, whose cache is gone with it.

        The verbs are lazy: what is committed here without a prediction is fed by the next one, all scales in one pass.
        Noise goes on, and so do the guidance weights and settings that both models have.
        """
        while s.then is not None and s.at() >= self.handovers[self._turn(s)]:
            then, model = s.then, self._models[self._turn(s) + 1]
            for k in range(then.at(), s.at()):
                span = s.layout.span(k)
                model.commit(then, Categorical(s.layout.where(k), torch.empty(0)), s.tokens[:, span])
            then.noise = s.noise
            then.weights = s.weights if s.weights.shape == then.weights.shape else then.weights
            kept = {n: x for n, x in s.knobs.items() if n in then.knobs and x.shape == then.knobs[n].shape}
            then.knobs = {**then.knobs, **kept}
            for f in fields(State):
                setattr(s, f.name, getattr(then, f.name))
        return s

    # -- one pass over all scales, and training -------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> _Relayed:
        """The distribution of every token given the true coarser scales, of the model whose scale it is."""
        scales: Layout = layout or self.tokenizer.layout()
        ends = [scales.offsets[k] for k in (0, *self.handovers, scales.K)]
        parts = [model.teacher(tokens, cond, layout) for model in self._models]
        return _Relayed(torch.arange(scales.n)[None], parts, [slice(a, b) for a, b in pairwise(ends)])

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What can be stored of pictures [B, 3, Y, X] for training: their tokens [B, N, S]."""
        return {"tokens": self.tokenizer.encode(image, self.tokenizer.layout())}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Specialised training: each model learns its own scales, in nats per token, and nothing of the others.

        batch: "tokens" [B, N, S], or "image" [B, 3, Y, X] in [-1, 1] to be encoded; and the conditions. The drafter's
        is its own loss over the prefix alone; the others' is `specialised`. With "levels" only so many coarse scales
        are learned.
        """
        layout = self.tokenizer.layout()
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        most = min(batch.get("levels") or layout.K, layout.K)
        null_B = noise.uniform("drop", 0, ()).to(tokens.device) < self.label_drop
        out = self._models[0].loss({**batch, "tokens": tokens, "levels": min(most, self.handovers[0])}, noise)
        cond = self.prepare(batch)
        for model, (first, last) in zip(self._models[1:], pairwise((*self.handovers, most)), strict=True):
            if first < last:
                nats_Bn = specialised(model, tokens, cond, null_B, first, last, layout)
                each = nats_Bn.detach().mean(0).split(layout.sizes[first:last])
                out = {**out, "loss": out["loss"] + nats_Bn.mean()}
                out |= {f"nats_{k}": nats.mean() for k, nats in enumerate(each, first)}
        return out


def collaborate(drafter: Any, refiner: Any, handover: int) -> Collaborative:
    """Two trained models over scales of one tokenizer: the first draws `handover` scales, the second the rest."""
    return Collaborative({"drafter": drafter, "refiner": refiner}, (handover,))


def specialised(
    model: Any, tokens: Tensor, cond: Cond, null_B: Tensor, first: int, last: int, layout: Layout
) -> Tensor:
    """Nats [B, n] of the tokens of scales first..last-1 given the true coarser ones; no condition where `null_B`."""
    span = slice(layout.offsets[first], layout.offsets[last])
    return _halves(
        null_B, lambda rows, c: -model.teacher(tokens[rows], c, layout).log_prob(tokens[rows])[:, span], cond
    )


def distilled(
    student: Any,
    teacher: Any,
    tokens: Tensor,
    cond: Cond,
    null_B: Tensor,
    first: int,
    layout: Layout,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> Tensor:
    """Distillation on scales first..K-1, per sub-token [B, n, S]: alpha T^2 KL(teacher || student), both softened by T,
    and (1 - alpha) of the cross-entropy. `first` 0 is the official first stage, the hand-over the second."""

    def loss(rows: Tensor, c: Cond | None) -> Tensor:
        x = tokens[rows]
        own = student.teacher(x, c, layout).logits[:, layout.offsets[first] :]
        with torch.no_grad():
            wanted = (teacher.teacher(x, c, layout).logits[:, layout.offsets[first] :] / temperature).log_softmax(-1)
        softened = (own / temperature).log_softmax(-1)
        divergence = temperature**2 * (wanted.exp() * (wanted - softened)).sum(-1)
        true = x[:, layout.offsets[first] :, :, None]
        return alpha * divergence - (1 - alpha) * own.log_softmax(-1).gather(-1, true)[..., 0]

    return _halves(null_B, loss, cond)


def _halves(null_B: Tensor, of: Callable[[Tensor, Cond | None], Tensor], cond: Cond) -> Tensor:
    """`of` the items with their conditions and of those without, in the order of the items."""
    rows = [(~null_B).nonzero()[:, 0], null_B.nonzero()[:, 0]]
    given = [{name: x[rows[0]] for name, x in cond.items()}, None]
    found = [of(part, c) for part, c in zip(rows, given, strict=True) if len(part)]
    return torch.cat(found)[torch.cat(rows).argsort()]


@dataclass
class _Relayed:
    """One distribution for each span of positions [B, n, S]."""

    where: Tensor
    parts: Sequence[Any]
    spans: Sequence[slice]
    at: int | Tensor = 0

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        return torch.cat([d.sample(noise, pin)[:, span] for d, span in zip(self.parts, self.spans, strict=True)], 1)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        return torch.cat([d.log_prob(x_BnS)[:, span] for d, span in zip(self.parts, self.spans, strict=True)], 1)


def _own(model: Any, sampling: Any) -> Any:
    """The settings of a model: its own kind as they are, else guided and unfiltered."""
    if isinstance(sampling, model.Sampling):
        return sampling
    plain = model.Sampling.plain()
    return plain if sampling.cfg_scale is None else replace(plain, cfg_scale=sampling.cfg_scale)


def _knobs(sampling: CodeSampling, items: int, scales: int) -> dict[str, Tensor]:
    def each(name: str) -> Tensor:
        values = getattr(sampling, name)
        if len(values) != 1 and len(values) < scales:
            raise ValueError(f"{name} has one number for all scales or one for each of {scales}, got {len(values)}")
        return torch.tensor(values[:scales], dtype=torch.float64).expand(items, scales).clone()

    return {
        "scale_top_k": each("top_k"),
        "scale_top_p": per_item(sampling.top_p, items),
        "scale_temperature": each("temperature"),
    }


def _filtered(d: Any, s: State) -> Any:
    """top_k, top_p, then the temperature of the scale, on guided logits."""
    k = s.at()
    logits = top_p(top_k(d.logits, s.knobs["scale_top_k"][:, k]), s.knobs["scale_top_p"])
    return replace(d, logits=temper(logits, s.knobs["scale_temperature"][:, k]))


def _no_more(s: State, handover: int) -> None:
    """A cache with room for all scales, one row per token, needs none for those that come after a hand-over."""
    for name, cache in s.cache.items():
        if cache.slots == s.layout.offsets[-2] and not (cache.end or cache.extra):
            s.cache[name] = Cache(len(s), s.layout.offsets[handover])


def _generator(model: Any) -> nn.Module:
    """What of a model is not its tokenizer."""
    parts = {name: part for name, part in model.parts().items() if name != "tokenizer"}
    return next(iter(parts.values())) if len(parts) == 1 else nn.ModuleDict(parts)


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two tokenizers are one, or have the same scales, names, shapes and (but on the meta device) values."""
    if a is b:
        return True
    ours, theirs = a.state_dict(), b.state_dict()
    return (
        a.layout() == b.layout()
        and {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
        and all(x.is_meta or torch.equal(x, theirs[name]) for name, x in ours.items())
    )


# -- assembly and presets ---------------------------------------------------------------------------------------------


def build(config: CodeConfig) -> Collaborative:
    """A large and a small VAR over one tokenizer, with freshly initialised weights."""
    drafter, refiner = build_scales(config.drafter), build_scales(config.refiner)
    refiner.tokenizer = drafter.tokenizer
    models = {"drafter": drafter, "refiner": refiner}
    return Collaborative(models, (config.handover,), config.drafter.label_drop)


def coupled(large: VARConfig, small: VARConfig, handover: int) -> CodeConfig:
    """The configuration of two VARs; ValueError where they differ in more than their sizes."""
    config = CodeConfig(drafter=large, depth=small.depth, width=small.width, heads=small.heads, handover=handover)
    same = replace(small, drop_path=config.refiner.drop_path, adaln_init=large.adaln_init)
    if same != config.refiner:
        raise ValueError(f"a drafter and a refiner differ in depth, width and heads alone, got {large} and {small}")
    return config


def official(handover: int) -> CodeConfig:
    """VAR-d30 drafts, VAR-d16 refines."""
    return CodeConfig(
        drafter=preset(30, PATCH_NUMS_256, False, 1e-5), depth=16, width=1024, heads=16, handover=handover
    )


def emoji_64() -> CodeConfig:
    """The nine groups of the emoji world at 64x64 pixels: 14 tokens are drafted, 89 refined."""
    return CodeConfig(drafter=large_64(), depth=3, width=128, heads=4, handover=3)


CONFIG = CodeConfig

_TOKENIZER = File(repo="FoundationVision/var", name="vae_ch160v4096z32.pth")

PRESETS = {
    f"code-{n}": Preset(
        config=lambda n=n: official(n),
        files={
            "tokenizer": _TOKENIZER,
            "drafter": File(repo="Zigeng/VAR_CoDe", name=f"drafter_{n}.pth"),
            "refiner": File(repo="Zigeng/VAR_CoDe", name=f"refiner_{n}.pth"),
        },
        licence="MIT",
    )
    for n in (8, 9, 7, 6)
}

PRESETS["code-untuned"] = Preset(
    config=lambda: official(8),
    files={
        "tokenizer": _TOKENIZER,
        "drafter": File(repo="FoundationVision/var", name="var_d30.pth"),
        "refiner": File(repo="FoundationVision/var", name="var_d16.pth"),
    },
    licence="MIT",
)

PRESETS["code-emoji-64"] = Preset(
    config=emoji_64,
    licence="Apache-2.0",
    sampling={"cfg_scale": 2.0, "top_k": (200,), "top_p": 0.9, "temperature": (1.0,)},
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
)

RESULTS = tuple(
    Result(
        preset=f"code-{n}",
        metric=metric,
        value=value,
        settings="cfg 1.5, top_k 600, top_p 0.96, 50k",
        source="official README",
    )
    for n, fid, inception in ((9, 1.94, 296), (8, 1.98, 302), (7, 2.11, 303), (6, 2.27, 297))
    for metric, value in (("FID", fid), ("IS", inception))
)


def keys(config: CodeConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part: both models are VARs."""
    scales = scale_keys(pyramid(config.drafter.tokenizer.patch_nums))
    transformer = (*TRANSFORMER_KEYS, *scales)
    return {"tokenizer": TOKENIZER_KEYS, "drafter": transformer, "refiner": transformer}


def tiny() -> Collaborative:
    """The smallest complete pair, for the laws."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 3),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    drafter = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0)
    return build(CodeConfig(drafter=drafter, depth=1, width=8, heads=2, handover=2))
