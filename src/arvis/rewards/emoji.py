"""Exact rewards of the emoji world, from its ground truth: what is there by the detector, how near the true picture is.

No network judges: a picture cannot please these rewards but by showing what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.data.emoji import Emoji, load_emoji
from arvis.data.images import to_bytes
from arvis.data.scenes import Asked, read_caption
from arvis.evaluation.detectors import SIZE, Detector
from arvis.evaluation.skills import Seen, relation


def satisfied(asked: Asked, seen: Seen) -> dict[str, float]:
    """Each thing that a caption says, and how far it is so, in [0, 1].

    For each kind of object that it is there, and its colour and number (by the share that is missing or too many) where
    they are told; the relation; the background, which is white where nothing is said.
    """
    out: dict[str, float] = {}
    for noun, colour, count in asked.things:
        found = seen.of(noun)
        out[noun] = float(bool(found))
        if colour is not None:
            out[f"{noun}, {colour}"] = float(bool(seen.of(noun, colour)))
        if count > 1:
            out[f"{noun}, {count}"] = max(0.0, 1 - abs(len(found) - count) / count)
    if asked.relation is not None:
        first, second = (seen.of(noun)[:1] for noun, _, _ in asked.things)
        holds = any(asked.relation in relation(a.box, b.box) for a in first for b in second)
        out[asked.relation] = float(holds)
    out["background"] = float(seen.background == asked.background)
    return out


class SceneReward:
    """The share in [0, 1] of what the caption of a scene says that the detector finds in a picture of 64x64 pixels."""

    @cached_property
    def _detector(self) -> Detector:
        return Detector()

    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor:
        wanted = [read_caption(caption) for caption in asked]
        seen = self._detector(_sized(image))
        shares = [satisfied(a, s) for a, s in zip(wanted, seen, strict=True)]
        return torch.tensor([sum(s.values()) / len(s) for s in shares], dtype=torch.float64)


class PictureReward:
    """Minus the root mean square difference from the true picture of a name, colours in [0, 1]: from -1 to 0."""

    @cached_property
    def _world(self) -> Emoji:
        return load_emoji(SIZE)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {row.name: i for i, row in enumerate(self._world.rows)}

    def knows(self, name: str) -> bool:
        """Whether there is a picture of this name."""
        return name in self._index

    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor:
        """Raises KeyError with the nearest names for one that is none."""
        rows = [self._index[name] if self.knows(name) else self._world.find(name) for name in asked]
        difference = (_sized(image).double() - self._world.all_images()[rows].double()) / 255
        return -difference.square().mean((1, 2, 3)).sqrt()


class EmojiReward:
    """`PictureReward` for names, `SceneReward` for captions of scenes: 1 is a perfect picture of either."""

    def __init__(self) -> None:
        self._scene, self._picture = SceneReward(), PictureReward()

    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor:
        """Raises ValueError for text that is neither."""
        out = torch.zeros(len(asked), dtype=torch.float64)
        named = torch.tensor([self._picture.knows(text) for text in asked])
        for rows, judge, most in ((named, self._picture, 1.0), (~named, self._scene, 0.0)):
            if bool(rows.any()):
                texts = [text for text, taken in zip(asked, rows.tolist(), strict=True) if taken]
                out[rows] = most + judge(image[rows.to(image.device)], texts)
        return out


def _sized(image: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] on the host; other sizes are averaged or enlarged."""
    if image.shape[2:] != (SIZE, SIZE):
        image = to_bytes(image).float() / 127.5 - 1
        image = F.interpolate(image, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return to_bytes(image).cpu()
