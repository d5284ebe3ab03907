"""Whether a picture shows what the caption of a scene says: the six skills of GenEval (arXiv 2310.11513), judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arvis.data.scenes import RELATIONS, Box, Scene


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object in a picture: its noun, the nearest of COLOURS if it is one that comes in colours, its box, its score.

    The score is the correlation in [-1, 1] between the picture and the object, as differences from the background.
    """

    name: str
    colour: str | None
    box: Box
    score: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a detector sees in one picture; the background is one of BACKGROUNDS or None if it is none of them."""

    background: str | None
    objects: tuple[Found, ...]

    def of(self, name: str, colour: str | None = None) -> list[Found]:
        """The objects with a noun, and with a colour if one is asked for."""
        return [f for f in self.objects if f.name == name and colour in (None, f.colour)]


def relation(first: Box, second: Box) -> frozenset[str]:
    """Where the first box lies relative to the second, of RELATIONS, by GenEval's rule (arXiv 2310.11513).

    The offset of the centres, less a tenth of the boxes' joint sides, must point more than 30 degrees off the other
    axis.
    """
    offset = np.array([first[k] + first[k + 2] - second[k] - second[k + 2] for k in (0, 1)]) / 2
    sides = np.array([first[k + 2] - first[k] + second[k + 2] - second[k] for k in (0, 1)])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sides, 0)
    if (np.abs(rest) < 1e-3).all():
        return frozenset()
    x, y = rest / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def judge(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Whether a picture shows what the caption of a scene says: "skill", "background", and "caption" (all of it).

    "skill" follows GenEval: the objects the skill is about are there, in their colours and relation; other objects do
    not matter, except that a counted one must be there exactly that often.
    """
    counts = {name: sum(o.name == name for o in scene.objects) for name in (o.name for o in scene.objects)}
    first, last = scene.objects[0], scene.objects[-1]
    there = all(seen.of(o.name, o.colour) for o in scene.objects)
    exact = all(len(seen.of(name)) == count for name, count in counts.items())
    right = there
    if scene.skill == "counting":
        right = len(seen.of(first.name)) == counts[first.name]
    elif scene.skill == "position":
        asked = next(r for r in RELATIONS if f" {r} " in scene.caption)
        right = any(asked in relation(a.box, b.box) for a in seen.of(first.name)[:1] for b in seen.of(last.name)[:1])
    background = seen.background == scene.background
    return {"skill": right, "background": background, "caption": right and there and exact and background}
