"""CoDe: a large model drafts the coarse scales, a small one refines the fine ones.

Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient, arXiv 2411.17787. Weights: MIT.

Coarse scales have few tokens and need a large model; fine scales have most tokens and need little of one. The drafter
draws scales 0..N-1 and is done: its cache is dropped. What it hands over is the tokens, since the models share their
tokenizer; the refiner builds the sum of their codes anew, reads all N + 1 scales in one pass (rule `upto`, cached) and
goes on. Nothing is verified: the law is p_drafter(first N scales) p_refiner(the rest | first N).

`Collaborative` takes any models over scales, and a configuration names any two presets; the published pairs are a large
and a small VAR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from operator import attrgetter
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from arvis.config import assignments, dotted, override
from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.noise import Source
from arvis.published import File, Preset, Result
from arvis.sampling import per_item, temper, top_k, top_p
from arvis.state import Cond, State
from arvis.systems import preset, system
from arvis.systems.var import NO_DECAY
from arvis.tokens import Layout, Pin
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
class ModelConfig:
    """A preset of any system over scales by name, with `changes` of its configuration ("name=value")."""

    preset: str
    changes: tuple[str, ...] = ()

    @property
    def module(self) -> ModuleType:
        """The system that it is of."""
        return system(preset(self.preset)[0])

    @property
    def config(self) -> Any:
        """The configuration of that system."""
        return override(preset(self.preset)[2].config(), self.changes)


Model = tuple[ModuleType, Any]
"""The module of a system and a configuration of it."""


@dataclass(frozen=True, kw_only=True)
class CodeConfig:
    """The drafter, the refiner, and how many scales are drafted.

    Both have `num_classes` where it is not 0. In training `label_drop` of the refiner's conditions are left out.
    """

    drafter: ModelConfig
    refiner: ModelConfig
    handover: int
    num_classes: int = 0
    label_drop: float = 0.1

    @property
    def models(self) -> tuple[Model, Model]:
        """The drafter and the refiner."""
        drafter, refiner = (self._model(part) for part in (self.drafter, self.refiner))
        return drafter, refiner

    def _model(self, part: ModelConfig) -> Model:
        config, field = part.config, dotted(part.config, "num_classes")
        if self.num_classes and field:
            config = override(config, [f"{field}={self.num_classes}"])
        return part.module, config


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


def _alike(a: Any, b: Any) -> bool:
    """Whether two tokenizers are one, or of one kind and (but on the meta device) with the same values."""
    if a is b:
        return True
    theirs = b.state_dict()
    return _of_one_kind(a, b) and all(x.is_meta or torch.equal(x, theirs[n]) for n, x in a.state_dict().items())


def _of_one_kind(a: Any, b: Any) -> bool:
    """Whether two tokenizers have the same scales, and tensors of the same names and shapes."""
    ours, theirs = ({name: x.shape for name, x in tokenizer.state_dict().items()} for tokenizer in (a, b))
    return a.layout() == b.layout() and ours == theirs


# -- assembly and presets ---------------------------------------------------------------------------------------------


def build(config: CodeConfig) -> Collaborative:
    """A pair over one tokenizer, with freshly initialised weights. ValueError for models of different tokenizers."""
    drafter, refiner = (module.build(own) for module, own in config.models)
    if _of_one_kind(drafter.tokenizer, refiner.tokenizer):  # else it is refused
        refiner.tokenizer = drafter.tokenizer
    return Collaborative({"drafter": drafter, "refiner": refiner}, (config.handover,), config.label_drop)


def coupled(large: Any, small: Any, handover: int) -> CodeConfig:
    """The configuration of two loaded models, which say their `slug` and `config`."""
    field = dotted(large.config, "num_classes")
    return CodeConfig(
        drafter=described(large.slug, large.config),
        refiner=described(small.slug, small.config),
        handover=handover,
        num_classes=attrgetter(field)(large.config) if field else 0,
    )


def described(slug: str, config: Any) -> ModelConfig:
    """A configuration by the preset of its system that needs the fewest changes."""
    published = {name: p.config() for name, p in system(slug).PRESETS.items()}
    found = [ModelConfig(preset=name, changes=assignments(base, config)) for name, base in published.items()]
    return min(found, key=lambda model: len(model.changes))


def official(handover: int) -> CodeConfig:
    """VAR-d30 drafts, VAR-d16 refines."""
    drafter, refiner = ModelConfig(preset="var-d30"), ModelConfig(preset="var-d16")
    return CodeConfig(drafter=drafter, refiner=refiner, handover=handover, num_classes=1000)


def emoji_64() -> CodeConfig:
    """The nine groups of the emoji world at 64x64 pixels: 14 tokens are drafted, 89 refined."""
    small = ModelConfig(preset="var-emoji-64", changes=("depth=3", "width=128", "heads=4"))
    return CodeConfig(drafter=ModelConfig(preset="var-emoji-64"), refiner=small, handover=3, num_classes=9)


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
    """The official names of every part, which are those of both models."""
    drafter, refiner = (module.keys(own) for module, own in config.models)
    return {"tokenizer": drafter["tokenizer"], "drafter": drafter["transformer"], "refiner": refiner["transformer"]}


_TINY = (
    "depth=2",
    "width=16",
    "heads=2",
    "shared_aln=false",
    "adaln_init=1.0",
    'tokenizer={"patch_nums": [1, 2, 3], "vocab_size": 5, "z_channels": 4, "cnn": '
    '{"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4}}',
)


def tiny() -> Collaborative:
    """The smallest complete pair, for the laws."""
    drafter = ModelConfig(preset="var-emoji-64", changes=_TINY)
    refiner = ModelConfig(preset="var-emoji-64", changes=(*_TINY, "depth=1", "width=8"))
    return build(CodeConfig(drafter=drafter, refiner=refiner, handover=2, num_classes=3))
