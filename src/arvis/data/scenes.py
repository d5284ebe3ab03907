"""Scenes composed from the emoji: captions, exact ground truth and question-answer pairs for the six GenEval skills.

A scene is a pure function of (seed, split, index). The skills are those of GenEval (arXiv 2310.11513). Unmentioned
means plain: an object without a colour keeps its own, a scene without a background colour is on white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch

from arvis.data.cutouts import BACKGROUNDS, COLOURS, THINGS, Cutouts, Thing, paste
from arvis.data.emoji import Emoji, load_emoji

SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = ("to the left of", "to the right of", "above", "below")

_TINTS = tuple(name for name in BACKGROUNDS if name != "white")
_PAINTS = tuple(COLOURS)
_BY_NOUN = {thing.noun: thing for thing in THINGS}
_PAINTABLE = tuple(thing for thing in THINGS if thing.colourable)

Box = tuple[int, int, int, int]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: its noun, the colour it was painted (None: its own), and its tight box (left, top, right, bottom).

    Boxes are in pixels, right and bottom exclusive. `pixels` is the size it was drawn at.
    """

    name: str
    colour: str | None
    box: Box
    pixels: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in a picture, and what can be asked about it."""

    objects: tuple[SceneObject, ...]
    background: str
    skill: str
    caption: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """`length` is only where an epoch ends; `coloured_background` is the share of scenes that are not on white."""

    size: int = 64
    seed: int = 0
    split: str = "train"
    length: int = 100_000
    skills: tuple[str, ...] = SKILLS
    coloured_background: float = 0.4


class Scenes:
    """Composed scenes. An item is `{"image": uint8 [3, size, size], "caption": str, "label": skill index}`.

    Split "train" never shows a held-out combination (`is_heldout`); in split "heldout" every scene shows at least the
    one its skill is about: object and background, two objects, number and object, or colour and object.
    """

    def __init__(self, config: ScenesConfig | None = None, emoji: Emoji | None = None) -> None:
        self.config = config = config or ScenesConfig()
        if config.split not in ("train", "heldout"):
            raise ValueError(f"unknown split {config.split!r} of the scenes; expected 'train' or 'heldout'")
        unknown = [skill for skill in config.skills if skill not in SKILLS]
        if unknown or not config.skills:
            raise ValueError(f"unknown skills {unknown} of the scenes; expected some of {', '.join(SKILLS)}")
        if config.size < 32:
            raise ValueError(f"scenes of {config.size} x {config.size} pixels asked for; the smallest are 32 x 32")
        if emoji is None:
            # Objects are at most 7/8 of the picture, so the packaged 64 x 64 emoji serve scenes up to 73 pixels.
            emoji = load_emoji(64 if config.size <= 73 else config.size)
        self.classes: tuple[str, ...] = SKILLS
        self.cutouts = Cutouts(emoji)
        self._heldout = config.split == "heldout"
        self._key = (config.seed * 2 + self._heldout) & (2**64 - 1)
        self._unit = config.size / 64
        flat = np.ones((1, config.size, config.size), np.uint8)
        self._plain = {name: np.array(rgb, np.uint8)[:, None, None] * flat for name, rgb in BACKGROUNDS.items()}

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.config.length:
            raise IndexError(f"scene {i} of {self.config.length}")
        scene = self.scene(i)
        return {
            "image": torch.from_numpy(self.render(scene)),
            "caption": scene.caption,
            "label": SKILLS.index(scene.skill),
        }

    def scene(self, i: int) -> Scene:
        """The ground truth of scene i."""
        draws = _draws(self._key, i)
        skill = _pick(draws, self.config.skills)
        things, colours, count, relation = self._subject(skill, draws)
        background = self._background(skill, things, colours, draws)
        kinds = [(things[0], colours[0])] * count + list(zip(things[1:], colours[1:], strict=True))
        objects = self._arrange(kinds, relation, draws)
        caption = _caption(things, colours, count, relation, background)
        other = _pick(draws, THINGS)
        questions = _questions(things, colours, count, relation, background, other)
        return Scene(objects=objects, background=background, skill=skill, caption=caption, questions=questions)

    def render(self, scene: Scene) -> np.ndarray:
        """uint8 [3, size, size]."""
        canvas_CHW = self._plain[scene.background].copy()
        for thing in scene.objects:
            paste(canvas_CHW, self.cutouts.get(thing.name, thing.colour, thing.pixels), thing.box[0], thing.box[1])
        return canvas_CHW

    def _subject(self, skill: str, draws: Iterator[float]) -> tuple[list[Thing], list[str | None], int, str | None]:
        """What the scene is about: things, their colours, how many of the first, and the relation of the first two."""
        held = self._heldout
        if skill == "single_object":
            return [_pick(draws, THINGS)], [None], 1, None
        if skill == "colors":
            thing = _pick(draws, _PAINTABLE)
            colour = _HELD_COLOUR[thing.noun] if held else _pick(draws, _FREE_COLOURS[thing.noun])
            return [thing], [colour], 1, None
        if skill == "counting":
            thing = _pick(draws, _HELD_COUNTED if held else THINGS)
            count = _HELD_COUNT[thing.noun] if held else _pick(draws, _FREE_COUNTS[thing.noun])
            if next(draws) < 0.75:
                return [thing], [None], count, None
            second = _pick(draws, _FREE_PARTNERS[thing.noun])
            colour = _pick(draws, _FREE_COLOURS[second.noun]) if second.colourable and next(draws) < 0.5 else None
            return [thing, second], [None, colour], count, None
        painted = skill == "color_attr"
        partners = (
            (_HELD_PAINTED if held else _FREE_PAINTED) if painted else (_HELD_PARTNERS if held else _FREE_PARTNERS)
        )
        first = _pick(draws, _PAINTABLE if painted else THINGS)
        second = _pick(draws, partners[first.noun])
        if painted:
            colour = _pick(draws, _FREE_COLOURS[first.noun])
            others = [c for c in _FREE_COLOURS[second.noun] if c != colour]
            return [first, second], [colour, _pick(draws, others)], 1, None
        return [first, second], [None, None], 1, _pick(draws, RELATIONS) if skill == "position" else None

    def _background(
        self, skill: str, things: Sequence[Thing], colours: Sequence[str | None], draws: Iterator[float]
    ) -> str:
        chance = next(draws)
        if self._heldout and skill == "single_object":
            return _HELD_BACKGROUND[things[0].noun]
        banned = {_HELD_BACKGROUND[thing.noun] for thing in things} | set(colours)
        tint = _pick(draws, [name for name in _TINTS if name not in banned])
        return tint if chance < self.config.coloured_background else "white"

    def _arrange(
        self, kinds: Sequence[tuple[Thing, str | None]], relation: str | None, draws: Iterator[float]
    ) -> tuple[SceneObject, ...]:
        """One object per cell of a small grid, at a random place inside its cell."""
        count, size = len(kinds), self.config.size
        upright = next(draws) < 0.5
        if relation is not None:
            upright = relation in ("above", "below")
        columns, rows = _GRIDS[count]
        if upright:
            columns, rows = rows, columns
        cells = list(range(columns * rows))
        if relation in ("to the right of", "below"):
            cells.reverse()
        elif relation is None:
            for k in range(len(cells) - 1):  # Fisher-Yates
                other = k + int(next(draws) * (len(cells) - k))
                cells[k], cells[other] = cells[other], cells[k]
        smallest, largest = _PIXELS[count]
        step = next(draws)
        objects = []
        for (thing, colour), cell in zip(kinds, cells, strict=False):
            if count == 2:
                step = next(draws)
            pixels = round((smallest + 4 * int(step * ((largest - smallest) // 4 + 1))) * self._unit)
            height, width = self.cutouts.get(thing.noun, colour, pixels).shape[1:]
            column, row = cell % columns, cell // columns
            across, down = next(draws), next(draws)
            if relation is not None:
                # beside means beside: little freedom along the other axis
                across, down = (0.3 + 0.4 * across, down) if upright else (across, 0.3 + 0.4 * down)
            left, right = column * size // columns, (column + 1) * size // columns
            top, bottom = row * size // rows, (row + 1) * size // rows
            x = left + int(across * (right - left - width + 1))
            y = top + int(down * (bottom - top - height + 1))
            objects.append(
                SceneObject(name=thing.noun, colour=colour, box=(x, y, x + width, y + height), pixels=pixels)
            )
        return tuple(objects)


# objects in the scene -> (columns, rows), and the smallest and largest drawing size in a picture of 64 pixels
_GRIDS = {1: (1, 1), 2: (2, 1), 3: (2, 2), 4: (2, 2), 5: (3, 2), 6: (3, 2)}
_PIXELS = {1: (32, 56), 2: (24, 32), 3: (24, 32), 4: (24, 32), 5: (20, 20), 6: (20, 20)}


def is_heldout(first: str, second: str | int) -> bool:
    """Whether an object and another object, a colour, a background ("on green") or a number never meet in train."""
    if isinstance(second, int):
        return _HELD_COUNT.get(first) == second
    if second.startswith("on "):
        return _HELD_BACKGROUND[first] == second.removeprefix("on ")
    if second in COLOURS and second not in _BY_NOUN:
        return _HELD_COLOUR.get(first) == second
    return _hash("pair", *sorted((first, second))) % 10 == 0


def _hash(*words: str) -> int:
    return int.from_bytes(blake2b("/".join(words).encode(), digest_size=8).digest(), "little")


_HELD_BACKGROUND = {t.noun: _TINTS[_hash("background", t.noun) % len(_TINTS)] for t in THINGS}
_HELD_COLOUR = {t.noun: _PAINTS[_hash("colour", t.noun) % len(_PAINTS)] for t in _PAINTABLE}
_FREE_COLOURS = {t.noun: tuple(c for c in _PAINTS if c != _HELD_COLOUR[t.noun]) for t in _PAINTABLE}
# one number is held out of every second object
_HELD_COUNTED = tuple(t for t in THINGS if _hash("counted", t.noun) % 2)
_HELD_COUNT = {t.noun: tuple(COUNTS)[_hash("count", t.noun) % len(COUNTS)] for t in _HELD_COUNTED}
_FREE_COUNTS = {t.noun: tuple(n for n in COUNTS if n != _HELD_COUNT.get(t.noun)) for t in THINGS}


def _partners(things: Sequence[Thing], held: bool) -> dict[str, tuple[Thing, ...]]:
    return {a.noun: tuple(b for b in things if b is not a and is_heldout(a.noun, b.noun) == held) for a in things}


_FREE_PARTNERS, _HELD_PARTNERS = _partners(THINGS, False), _partners(THINGS, True)
_FREE_PAINTED, _HELD_PAINTED = _partners(_PAINTABLE, False), _partners(_PAINTABLE, True)


def _draws(key: int, index: int) -> Iterator[float]:
    """Numbers in [0, 1), a pure function of (key, index): the raw Philox stream is the same in every numpy."""
    bits = np.random.Philox(key=np.array([key, index], np.uint64)).random_raw(40)
    return iter(((bits >> np.uint64(11)) * 2.0**-53).tolist())


def _pick(draws: Iterator[float], options: Sequence[_T]) -> _T:
    return options[int(next(draws) * len(options))]


def _phrase(thing: Thing, colour: str | None, count: int = 1) -> str:
    if count > 1:
        return f"{COUNTS[count]} {thing.plural}"
    if colour is None:
        return f"{thing.article} {thing.noun}"
    return f"{'an' if colour[0] == 'o' else 'a'} {colour} {thing.noun}"


def _caption(
    things: Sequence[Thing], colours: Sequence[str | None], count: int, relation: str | None, background: str
) -> str:
    phrases = [_phrase(things[0], colours[0], count), *map(_phrase, things[1:], colours[1:])]
    where = "" if background == "white" else f" on {'an' if background[0] == 'o' else 'a'} {background} background"
    return f" {relation or 'and'} ".join(phrases) + where


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a caption asks for: (noun, colour, how many) of each kind, where the first lies relative to the second."""

    things: tuple[tuple[str, str | None, int], ...]
    relation: str | None
    background: str


@lru_cache(maxsize=4096)
def read_caption(caption: str) -> Asked:
    """What the caption of a scene asks for: the inverse of how captions are made.

    Raises ValueError for text that is no such caption.
    """
    rest, background = caption, "white"
    for name in _TINTS:
        where = f" on {'an' if name[0] == 'o' else 'a'} {name} background"
        if caption.endswith(where):
            rest, background = caption.removesuffix(where), name
    phrases = _phrases()
    if rest in phrases:
        return Asked(things=(phrases[rest],), relation=None, background=background)
    for word in ("and", *RELATIONS):
        parts = rest.split(f" {word} ")
        for at in range(1, len(parts)):  # the word may be part of a noun
            pair = f" {word} ".join(parts[:at]), f" {word} ".join(parts[at:])
            if pair[0] in phrases and pair[1] in phrases:
                things = (phrases[pair[0]], phrases[pair[1]])
                return Asked(things=things, relation=None if word == "and" else word, background=background)
    raise ValueError(
        f'{caption!r} is no caption of a scene, such as "a red apple above a dog" or "three cats on a blue background"'
    )


@lru_cache(maxsize=1)
def _phrases() -> dict[str, tuple[str, str | None, int]]:
    """Every phrase for things of one kind, and what it means; a name comes before a colour."""
    out: dict[str, tuple[str, str | None, int]] = {}
    for thing in THINGS:
        out[_phrase(thing, None)] = (thing.noun, None, 1)
        out |= {_phrase(thing, None, count): (thing.noun, None, count) for count in COUNTS}
    for thing in _PAINTABLE:
        for colour in COLOURS:
            out.setdefault(_phrase(thing, colour), (thing.noun, colour, 1))
    return out


def _questions(
    things: Sequence[Thing],
    colours: Sequence[str | None],
    count: int,
    relation: str | None,
    background: str,
    other: Thing,
) -> tuple[tuple[str, str], ...]:
    asked = []
    for thing, colour, number in zip(things, colours, (count, 1), strict=False):
        asked += [(f"is there {thing.article} {thing.noun}?", "yes"), (f"how many {thing.plural}?", str(number))]
        if colour is not None:
            asked.append((f"what colour is the {thing.noun}?", colour))
    if other not in things:
        asked.append((f"is there {other.article} {other.noun}?", "no"))
    asked.append(("what colour is the background?", background))
    if relation is not None:
        first, second = (thing.noun for thing in things)
        if relation in ("above", "below"):
            asked.append((f"is the {first} above or below the {second}?", relation))
        else:
            side = "left" if "left" in relation else "right"
            asked.append((f"is the {first} to the left or to the right of the {second}?", side))
    return tuple(asked)
