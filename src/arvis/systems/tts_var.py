"""TTS-VAR: a search over the scales while a picture is drawn: many paths at the coarse ones, few at the fine ones.

TTS-VAR: A Test-Time Scaling Framework for Visual Auto-Regressive Generation, arXiv 2507.18537. Code: MIT; no weights.

Coarse scales cost little and decide the structure, of which a reward can hardly judge: there paths are clustered by
what they look like, and one of each cluster goes on. At finer scales the picture so far foretells the reward of the
last: there paths are drawn with weights exp(lambda potential). Whatever is left at the end, the best one is taken.

A path is a row of a state, and gathering rows moves everything, so any system serves whose steps can be shown: the
search consumes the steps of a walk. The model itself is neither changed nor named here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.data.images import to_bytes
from arvis.nn.dinov2 import DINOv2, DINOv2Config
from arvis.published import Preset, Result
from arvis.rewards import Reward
from arvis.search import best, copies, multinomial, search
from arvis.state import State, System
from arvis.tokens import Layout
from arvis.walk import Step, walk
from arvis.weights import Fuse, Key, fetch, load_official, read

OFFICIAL = (8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1)
"""Paths that are kept after each of thirteen scales, of eight."""


@dataclass(frozen=True, kw_only=True)
class TTSVARConfig:
    """The official schedule: `paths[k]` paths of each picture are kept after scale k.

    After the scales `cluster` one path of each cluster goes on; after the scales `resample` paths are drawn, with
    replacement, with weights exp(`strength` potential). The potential is the reward of the picture so far, what it won
    since the last such scale ("diff"), the most it ever was, or the sum of all. Nowhere else can paths get fewer.
    """

    paths: tuple[int, ...] = OFFICIAL
    cluster: tuple[int, ...] = (2, 5)
    resample: tuple[int, ...] = (6, 9)
    strength: float = 10.0
    potential: Literal["value", "diff", "max", "sum"] = "value"

    def __post_init__(self) -> None:
        if not self.paths or min(self.paths) < 1:
            raise ValueError(f"at least one path is kept after each scale, got paths={self.paths}")
        for k, (before, after) in enumerate(zip(self.paths, self.paths[1:], strict=False), 1):
            if after > before or (after < before and k not in {*self.cluster, *self.resample}):
                raise ValueError(
                    f"paths get fewer after scales that cluster or resample, and never more: {before} before scale "
                    f"{k}, {after} after it, cluster={self.cluster}, resample={self.resample}"
                )
        beyond = [k for k in (*self.cluster, *self.resample) if not 0 <= k < len(self.paths) - 1]
        if beyond:
            raise ValueError(f"paths are chosen after scales 0 to {len(self.paths) - 2} of {self.paths}, got {beyond}")

    @property
    def most(self) -> int:
        """Paths of a picture at the first scale."""
        return self.paths[0]

    def cost(self, layout: Layout) -> int:
        """Token passes of a picture: at scale k as many paths run as were kept after the scale before."""
        running = (self.paths[0], *self.paths[:-1])
        return sum(n * size for n, size in zip(running, layout.sizes, strict=True))


def best_of(n: int, scales: int) -> TTSVARConfig:
    """The best of n pictures: nothing is chosen before the end."""
    return TTSVARConfig(paths=(n,) * scales, cluster=(), resample=())


def schedule(scales: int, paths: int = 8, config: TTSVARConfig | None = None) -> TTSVARConfig:
    """A schedule (the official one) for another number of scales and of paths.

    Its choices lie at the same fractions of the scales, each after one of its own and none after the first; where there
    are too few scales, those at the coarsest are left out.
    """
    config = config or TTSVARConfig()
    of, last = len(config.paths), scales - 1
    moved: dict[int, int] = {}
    for k in sorted({*config.cluster, *config.resample}, reverse=True):
        last = min(last - 1, round(k * (scales - 1) / max(of - 1, 1)))
        if last >= 1:
            moved[k] = last
    ends, kept = {to: max(1, round(paths * config.paths[k] / config.paths[0])) for k, to in moved.items()}, [paths]
    for k in range(scales):
        kept.append(ends.get(k, kept[-1]))
    return replace(
        config,
        paths=tuple(kept[1:]),
        cluster=tuple(moved[k] for k in config.cluster if k in moved),
        resample=tuple(moved[k] for k in config.resample if k in moved),
    )


# -- the search -------------------------------------------------------------------------------------------------------

Chosen = Callable[[Tensor, int, int], Tensor]
"""(pictures [items * n, 3, Y, X] in [-1, 1], n paths of each item, m to keep) -> rows [items * m]."""


@dataclass(frozen=True)
class PathSearch:
    """`TTSVARConfig` as a way to walk: `search(system, state, asked)` yields the steps of a walk over paths.

    `reward` judges the pictures so far, under what was `asked` for each item; `clusters` chooses at the coarse scales.
    Without a `config` it is the official schedule, for as many scales as there are. A step's state holds the paths that
    go on, those of an item side by side; that of the last step one picture per item.
    """

    reward: Reward
    config: TTSVARConfig | None = None
    clusters: Chosen = field(default_factory=lambda: clustered)

    @property
    def most(self) -> int:
        """Paths of a picture at most."""
        return (self.config or TTSVARConfig()).most

    def __call__(self, system: System, s: State, asked: Sequence[Any]) -> Iterator[Step]:
        paths = Paths(self, s, asked)
        s.take_(copies(len(s), paths.n))
        yield from search(walk(system, s), paths.choose)


class Paths:
    """The paths of some items while they are searched: `n` of each, and the rewards that they have had."""

    def __init__(self, plan: PathSearch, s: State, asked: Sequence[Any]) -> None:
        self.plan, self.asked, self.items = plan, asked, len(s)
        self.config = plan.config or schedule(s.K)
        if len(self.config.paths) != s.K:
            raise ValueError(
                f"the schedule is for {len(self.config.paths)} scales, the model has {s.K}: schedule({s.K}) makes one"
            )
        self.n = self.config.most
        self.history = torch.zeros(self.items * self.n, 0, dtype=torch.float64)

    def choose(self, step: Step) -> Tensor | None:
        """The rows that go on after a step, or None where all do."""
        k, config = step.k - 1, self.config
        if step.k == step.K:
            rows = best(self.score(step.preview()), self.n)
            self.n = 1
            return rows
        if k not in {*config.cluster, *config.resample}:
            return None
        image, m = step.preview(), config.paths[k]
        rows = torch.arange(len(image))
        if k in config.cluster:
            rows = self.plan.clusters(image, self.n, m)
            self.n, self.history = m, self.history[rows]
        if k in config.resample:
            score = self.score(image[rows.to(image.device)])
            u = step.state.noise.uniform("resample", k, (m,))[rows[:: self.n]]
            drawn = multinomial(weights(self.potential(score), config.strength, self.n), m, u)
            self.history = torch.cat((self.history, score[:, None]), 1)[drawn]
            rows, self.n = rows[drawn], m
        return rows

    def score(self, image: Tensor) -> Tensor:
        """Rewards of the paths, float64 on the host."""
        asked = [what for what in self.asked for _ in range(self.n)]
        return torch.as_tensor(self.plan.reward(image, asked)).double().cpu()

    def potential(self, score: Tensor) -> Tensor:
        """What a path is weighed by, from its reward now and those that its ancestors had."""
        every = torch.cat((self.history, score[:, None]), 1)
        match self.config.potential:
            case "diff":
                return score - self.history[:, -1] if self.history.shape[1] else score
            case "max":
                return every.amax(1)
            case "sum":
                return every.sum(1)
        return score


def weights(potential_B: Tensor, strength: float, n: int) -> Tensor:
    """exp(strength potential) among each n paths, [items, n], with sum 1.

    A path without a number (NaN) has no weight, infinite ones have it all, and where nobody has any all are alike.
    """
    p = strength * potential_B.double().view(-1, n)
    p = torch.where(p.isnan(), -torch.inf, p)
    most = p.amax(1, keepdim=True)
    weight = torch.where(most.isinf(), (p == most).double(), (p - most).exp())
    return weight / weight.sum(1, keepdim=True)


# -- clusters ---------------------------------------------------------------------------------------------------------


Features = Callable[[Tensor], Tensor]
"""Pictures [B, 3, Y, X] (uint8, or float in [-1, 1]) -> features of their patches [B, P, D]."""

SIDE = 16
"""Patches along each edge of a picture."""


def clustered(image: Tensor, n: int, m: int) -> Tensor:
    """One picture of each of m clusters among each n: by where the colours of pictures are unlike their own mean."""
    return members(principal(colours(image)), n, m)


def clustering(features: Features) -> Chosen:
    """As `clustered`, by any features."""
    return lambda image, n, m: members(principal(features(image)), n, m)


def colours(image: Tensor, side: int = SIDE) -> Tensor:
    """Mean colours of side x side patches, [B, side^2, 3]: features that need no weights."""
    return F.adaptive_avg_pool2d(image.float(), min(side, *image.shape[2:])).flatten(2).mT


class DINOv2Features:
    """What a frozen DINOv2 says of 16 x 16 patches, [B, 256, D]: the official features.

    `model` is a hub repository, or a folder or file in its layout: `config.json` and `model.safetensors`. Raises
    ValueError where it cannot be loaded, at the first pictures.

    Deviation: the small model without registers; the official one is "facebook/dinov2-with-registers-large".
    """

    def __init__(self, model: str = "facebook/dinov2-small") -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        encoder = encoder_of(self.model, str(image.device))
        with torch.autocast(image.device.type, enabled=False):
            return encoder(normalised(image, SIDE * encoder.config.patch))[1]


def principal(feature_BPD: Tensor) -> Tensor:
    """How far each patch lies along the picture's own first principal direction, [B, P].

    Deviation: the sign of a direction is arbitrary; its largest component is made positive, where the official code
    takes what the decomposition gives.
    """
    x = feature_BPD.double() - feature_BPD.double().mean(1, keepdim=True)
    v_BD = torch.linalg.svd(x, full_matrices=False).Vh[:, 0]
    largest = v_BD.gather(1, v_BD.abs().argmax(1, keepdim=True))
    return (x @ (v_BD * largest.sign())[..., None])[..., 0]


def members(vector_BD: Tensor, n: int, m: int) -> Tensor:
    """Rows of the vectors nearest to the centres of m clusters among each n; as many from others where some are empty.

    Deviation: k-means starts from vectors that lie far apart, without chance, where the official code draws some.
    """
    rows = [_members(part, m) + first * n for first, part in enumerate(vector_BD.double().cpu().split(n))]
    return torch.cat(rows)


def _members(x_nD: Tensor, m: int) -> Tensor:
    distance, start = torch.cdist(x_nD, x_nD), [int(torch.cdist(x_nD, x_nD.mean(0)[None])[:, 0].argmin())]
    while len(start) < m:
        away = distance[:, start].amin(1)
        away[start] = -1
        start.append(int(away.argmax()))
    centres = x_nD[start]
    for _ in range(100):
        nearest = torch.cdist(x_nD, centres).argmin(1)
        moved = torch.stack(
            [x_nD[nearest == j].mean(0) if bool((nearest == j).any()) else centres[j] for j in range(m)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    away, rows = torch.cdist(x_nD, centres), []
    for j in range(m):  # a path is taken once, also where centres fall together
        away[torch.tensor(rows, dtype=torch.int64), j] = torch.inf
        inside = torch.where(nearest == j, away[:, j], torch.inf)
        rows.append(int((inside if bool(inside.isfinite().any()) else away[:, j]).argmin()))
    return torch.tensor(rows)


# -- the encoder ------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures."""

ENCODER_KEYS = (
    Key("summary", "embeddings.cls_token"),
    Key("registers", "embeddings.register_tokens"),
    Key("position", "embeddings.position_embeddings"),
    Key("patches.{p}", "embeddings.patch_embeddings.projection.{p}"),
    Key((), "embeddings.mask_token", optional=True),  # of its training
    *(Key(f"trunk.blocks.{{i}}.{name}.{{p}}", f"encoder.layer.{{i}}.{name}.{{p}}") for name in ("norm1", "norm2")),
    *(
        Key(
            f"trunk.blocks.{{i}}.qkv.{p}",
            tuple(f"encoder.layer.{{i}}.attention.attention.{name}.{p}" for name in ("query", "key", "value")),
            Fuse(3),
        )
        for p in ("weight", "bias")
    ),
    Key("trunk.blocks.{i}.out.0.{p}", "encoder.layer.{i}.attention.output.dense.{p}"),
    Key("trunk.blocks.{i}.out.1.factor", "encoder.layer.{i}.layer_scale1.lambda1"),
    Key("trunk.blocks.{i}.mlp.0.{p}", "encoder.layer.{i}.mlp.fc1.{p}"),
    Key("trunk.blocks.{i}.mlp.2.0.{p}", "encoder.layer.{i}.mlp.fc2.{p}"),
    Key("trunk.blocks.{i}.mlp.2.1.factor", "encoder.layer.{i}.layer_scale2.lambda1"),
    Key("norm.{p}", "layernorm.{p}"),
)
"""The names of the files of the hub (model.safetensors)."""


@lru_cache(maxsize=2)
def encoder_of(model: str, device: str = "cpu") -> DINOv2:
    """A published DINOv2, frozen, in float32. Raises ValueError where it cannot be loaded."""
    path = Path(model)
    try:
        if path.exists():
            file = path / "model.safetensors" if path.is_dir() else path
            settings = file.with_name("config.json")
        else:
            file, settings = (fetch(model, name) for name in ("model.safetensors", "config.json"))
        config = encoder_config(json.loads(settings.read_text(encoding="utf-8")))
        with torch.device("meta"):
            encoder = DINOv2(config)
        tensors = {name: x.float() for name, x in read(file).items()}
        load_official(encoder, ENCODER_KEYS, tensors, source=str(file), device=device)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the DINOv2 {model} cannot be loaded, from the hub or as a folder: {reason}") from error
    return encoder.eval().requires_grad_(False)


def encoder_config(settings: dict[str, Any]) -> DINOv2Config:
    """The sizes in a `config.json` of the hub. ValueError for the one whose layers are of another kind."""
    if settings.get("use_swiglu_ffn"):
        raise ValueError("its layers have gates (the giant size), which is not supported; take a smaller one")
    return DINOv2Config(
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        patch=settings["patch_size"],
        grid=settings["image_size"] // settings["patch_size"],
        registers=settings.get("num_register_tokens", 0),
        mlp_ratio=settings["mlp_ratio"],
        norm_eps=settings["layer_norm_eps"],
    )


def normalised(image: Tensor, size: int) -> Tensor:
    """Pictures as the encoder reads them: `size` x `size` pixels, mean and deviation gone."""
    x = F.interpolate(to_bytes(image).float() / 255, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (x - mean) / deviation


# -- by name ----------------------------------------------------------------------------------------------------------

CONFIG = TTSVARConfig

PRESETS: dict[str, Preset] = {}
"""It has no models of its own: it searches with those of others."""

RESULTS = (
    Result(preset="infinity-2b", metric="GenEval", value=0.75, settings="with TTS-VAR, 8 paths", source="abstract"),
    Result(preset="infinity-2b", metric="GenEval", value=0.69, settings="without", source="abstract"),
)


def named(name: str) -> Features:
    """Features by name: "colours", "dinov2", or "dinov2:MODEL" (a hub name, or a folder); KeyError for another."""
    kind, colon, model = name.partition(":")
    if kind not in ("colours", "dinov2") or (colon and kind != "dinov2"):
        raise KeyError(f"no features are called {name!r}; there are colours, dinov2 and dinov2:MODEL")
    return colours if kind == "colours" else DINOv2Features(model) if model else DINOv2Features()


def searching(reward: Reward, scales: int, paths: int, features: str = "colours") -> PathSearch:
    """The search as `arvis generate --search` wants it; coarse scales are clustered by features of that name."""
    return PathSearch(reward, schedule(scales, paths), clustering(named(features)))
