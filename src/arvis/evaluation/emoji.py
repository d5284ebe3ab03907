"""The emoji benchmark: what a text-to-image model of the emoji world has learned, against exact ground truth.

Retrieval asks which of all 3,655 pictures a painted one is nearest to (pixels, Euclidean; drawings that stand under
several names count as one). Held-out compositions ask the same for people whose (profession, gender, skin tone) was
never shown in training. Scenes ask an exact detector whether the six skills of GenEval (arXiv 2310.11513) succeeded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from arvis.data.emoji import Emoji, load_emoji
from arvis.data.scenes import SKILLS, Scene, Scenes, ScenesConfig
from arvis.evaluation.detectors import Detector
from arvis.evaluation.metrics import psnr, ssim
from arvis.evaluation.skills import judge
from arvis.evaluation.statistics import Rate
from arvis.noise import Noise

Paint = Callable[[list[str], int], Tensor]
"""(prompts, seed) -> uint8 [B, 3, 64, 64]."""

Reconstruct = Callable[[Tensor], Tensor]
"""uint8 [B, 3, 64, 64] -> the same, through a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EmojiEvaluation:
    """How much is measured: names of training pictures, scenes per skill, pictures per reconstruction set.

    Every held-out composition is asked for once, always. `split` chooses the scenes ("train": new scenes of familiar
    combinations; "heldout": combinations never shown).
    """

    names: int = 500
    scenes: int = 60
    pictures: int = 115
    split: str = "train"
    seed: int = 0
    batch: int = 25


@dataclass(frozen=True, kw_only=True)
class EmojiReport:
    """What was measured, with the settings it was measured under."""

    settings: dict[str, Any]
    reconstruction: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, Rate] = field(default_factory=dict)
    pictures_per_second: float = 0.0

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) in words."""
        out = [
            (f"reconstruction, {name}", f"{v['psnr']:.2f} dB PSNR, {v['ssim']:.3f} SSIM (n = {v['n']:.0f})")
            for name, v in self.reconstruction.items()
        ]
        out += [(name, str(rate)) for name, rate in self.rates.items()]
        return [*out, ("speed", f"{self.pictures_per_second:.1f} pictures/s at batch {self.settings['batch']}")]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def to_markdown(self) -> str:
        table = "\n".join(f"| {name} | {value} |" for name, value in self.rows())
        return f"| measured | value |\n|---|---|\n{table}\n\nSettings: `{json.dumps(self.settings)}`\n"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def evaluate(
    paint: Paint,
    reconstruct: Reconstruct,
    config: EmojiEvaluation | None = None,
    settings: dict[str, Any] | None = None,
    on_picture: Callable[[int], object] = lambda n: None,
) -> EmojiReport:
    """Measure a model; `settings` are reported with the numbers. The same arguments give the same numbers."""
    config = config or EmojiEvaluation()
    world = load_emoji(64)
    report = EmojiReport(settings={**asdict(config), **(settings or {})})
    clock = _Clock(paint, config.batch, config.seed, on_picture)

    for name, images in _reconstructed(world, config).items():
        back = torch.cat([reconstruct(part) for part in images.split(config.batch)])
        report.reconstruction[name] = {
            "psnr": float(psnr(images, back).mean()),
            "ssim": float(ssim(images, back).mean()),
            "n": float(len(images)),
        }

    nearest = Nearest(world)
    train = world.split("train")
    chosen = _choose(len(train), config.names, config.seed)
    names = [train.rows[i].name for i in chosen]
    found = nearest(clock(names))
    wanted = torch.tensor([world.find(name) for name in names])
    report.rates["retrieval of training names, first"] = _rate(nearest.same(found[:, 0], wanted))
    report.rates["retrieval of training names, among five"] = _rate(nearest.same(found, wanted[:, None]).any(1))

    held = world.split("heldout").rows
    got = [world.rows[i] for i in nearest(clock([row.name for row in held]))[:, 0].tolist()]
    for part in ("base", "gender", "skin_tone"):
        hits = [getattr(a, part) == getattr(b, part) for a, b in zip(held, got, strict=True)]
        label = {"base": "profession", "skin_tone": "skin tone"}.get(part, part)
        report.rates[f"held-out compositions, {label}"] = _rate(torch.tensor(hits))
    whole = [(a.base, a.gender, a.skin_tone) == (b.base, b.gender, b.skin_tone) for a, b in zip(held, got, strict=True)]
    report.rates["held-out compositions, all three"] = _rate(torch.tensor(whole))

    detector = Detector(emoji=world)
    for skill in SKILLS:
        scenes = _scenes(world, config, skill)
        seen = detector(clock([scene.caption for scene in scenes]))
        verdicts = [judge(scene, s)["skill"] for scene, s in zip(scenes, seen, strict=True)]
        report.rates[f"scenes, {skill.replace('_', ' ')}"] = _rate(torch.tensor(verdicts))
    return EmojiReport(**{**vars(report), "pictures_per_second": clock.per_second})


class Nearest:
    """The five pictures of the world nearest to given ones, by Euclidean distance of all pixels."""

    def __init__(self, world: Emoji) -> None:
        self._images = world.all_images().flatten(1).float()
        self._square = self._images.square().sum(1)
        self._twins = world.twins()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 64, 64] -> indices [B, 5], nearest first."""
        flat = images.flatten(1).float()
        return (self._square - 2 * flat @ self._images.T).topk(5, largest=False).indices

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether two indices stand for the same drawing."""
        return self._twins[a] == self._twins[b]


class _Clock:
    """Paints in batches, counts and times."""

    def __init__(self, paint: Paint, batch: int, seed: int, on_picture: Callable[[int], object]) -> None:
        self._paint, self._batch, self._seed, self._tell = paint, batch, seed, on_picture
        self._count, self._seconds = 0, 0.0

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        out = []
        for start in range(0, len(prompts), self._batch):
            part = list(prompts[start : start + self._batch])
            began = time.perf_counter()
            out.append(self._paint(part, self._seed + start))
            self._seconds += time.perf_counter() - began
            self._count += len(part)
            self._tell(len(part))
        return torch.cat(out)

    @property
    def per_second(self) -> float:
        return self._count / max(self._seconds, 1e-9)


def _choose(count: int, n: int, seed: int) -> list[int]:
    """n different indices below count, or all of them."""
    return Noise.of(seed).uniform("choose", 0, (count,))[0].argsort()[:n].tolist()


def _scenes(world: Emoji, config: EmojiEvaluation, skill: str) -> list[Scene]:
    scenes = Scenes(ScenesConfig(seed=config.seed + 7919, split=config.split, skills=(skill,)), world)
    return [scenes.scene(i) for i in range(config.scenes)]


def _reconstructed(world: Emoji, config: EmojiEvaluation) -> dict[str, Tensor]:
    train, held = world.split("train"), world.split("heldout")
    chosen = _choose(len(train), config.pictures, config.seed)
    scenes = Scenes(ScenesConfig(seed=config.seed + 7919, split="heldout"), world)
    return {
        "held-out pictures": held.all_images()[: config.pictures],
        "training pictures": train.all_images()[chosen],
        "scenes": torch.stack([scenes[i]["image"] for i in range(config.pictures)]),
    }


def _rate(hits: Tensor) -> Rate:
    return Rate(hits=int(hits.sum()), n=len(hits))
