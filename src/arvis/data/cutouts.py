"""Nameable objects cut out of the emoji, in their own colours or recoloured, and the one function that pastes them.

A cut-out is a tight premultiplied RGBA tile, uint8 [4, h, w]: planes, because pasting them is several times quicker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from arvis.data.emoji import Emoji

SOLID = 64  # alpha from which a pixel counts as part of the object; the tile is cut to these

# colour -> hue in degrees, saturation, value of a recoloured object's typical pixel
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (357, 0.85, 0.87),
    "orange": (27, 0.92, 1.00),
    "yellow": (51, 0.85, 1.00),
    "green": (128, 0.75, 0.66),
    "blue": (217, 0.82, 0.92),
    "purple": (273, 0.66, 0.76),
    "pink": (332, 0.42, 1.00),
    "brown": (22, 0.66, 0.47),
    "black": (0, 0.00, 0.15),
}

# colour -> RGB of a plain background, lighter than the objects of the same name so that those stay visible
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (240, 116, 108),
    "orange": (250, 180, 110),
    "yellow": (252, 228, 130),
    "green": (140, 208, 140),
    "blue": (128, 178, 240),
    "purple": (178, 146, 222),
    "pink": (252, 192, 214),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A nameable object: the emoji it is cut from, its noun, and whether it can be painted in another colour."""

    emoji: str
    noun: str
    plural: str
    colourable: bool

    @property
    def article(self) -> str:
        return "an" if self.noun[0] in "aeiou" and not self.noun.startswith("uni") else "a"


# "emoji name", "emoji name=noun", or "emoji name=noun/plural"
_PLAIN = """
dog, cow, ewe=sheep/sheep, goat, rabbit, elephant, giraffe, tiger, lion, zebra, camel, kangaroo, koala, panda, monkey,
gorilla, whale, shark, butterfly/butterflies, spider, ant, rooster, duck, owl, penguin, swan, parrot, flamingo,
peacock, bat, hedgehog, unicorn, fox/foxes, wolf/wolves, raccoon, deer/deer, chipmunk=squirrel, mushroom,
snowman without snow=snowman/snowmen, banana, peach/peaches, watermelon, pineapple, avocado, croissant, pretzel,
hamburger, pizza, cookie, doughnut, cupcake, birthday cake=cake, lollipop, egg, wine glass/wine glasses,
hot beverage=cup, bus/buses, bicycle, house, soccer ball, crown, top hat=hat, rocket, airplane, locomotive=train,
tractor, motor scooter=scooter, light bulb, guitar, hammer, camera, laptop, trophy/trophies, drum, violin, sunflower,
robot, castle, globe showing Americas=globe, toilet, window, ring
"""
_COLOURABLE = """
cat, horse, pig, bear, frog, turtle, snake, crocodile, dolphin, octopus/octopuses, crab, lobster, snail, bird,
fish/fish, sauropod=dinosaur, red apple=apple, pear, lemon, strawberry/strawberries, carrot, eggplant,
tomato/tomatoes, hot pepper=pepper, teapot, automobile=car, delivery truck=truck, star, key, umbrella,
closed book=book, chair, teddy bear, backpack, handbag, dress/dresses, billed cap=cap, running shoe=shoe, balloon,
helicopter, sailboat, anchor, bell, magnet, telephone, trumpet, cactus/cacti, tulip, rose,
deciduous tree=tree, red heart=heart, bucket, pencil, crayon, jack-o-lantern=pumpkin, maple leaf=leaf/leaves, tent,
scarf/scarves, coat, purse, basketball
"""


def _things(text: str, colourable: bool) -> list[Thing]:
    things = []
    for entry in text.replace("\n", " ").split(","):
        name, _, plural = entry.strip().partition("/")
        emoji, _, noun = name.partition("=")
        noun = noun or emoji
        things.append(Thing(emoji=emoji, noun=noun, plural=plural or noun + "s", colourable=colourable))
    return things


THINGS: tuple[Thing, ...] = (*_things(_PLAIN, False), *_things(_COLOURABLE, True))


class Cutouts:
    """Cut-outs of THINGS from a set of emoji, made on first use and kept."""

    def __init__(self, emoji: Emoji) -> None:
        self.native = emoji.size
        self._source = {t.noun: emoji.premultiplied_of(emoji.find(t.emoji)) for t in THINGS}
        self._painted: dict[tuple[str, str], np.ndarray] = {}
        self._tiles: dict[tuple[str, str | None, int], np.ndarray] = {}

    def get(self, noun: str, colour: str | None, pixels: int) -> np.ndarray:
        """The object drawn on a square of `pixels`, cut tight: premultiplied uint8 [4, h, w] with h, w <= pixels."""
        key = (noun, colour, pixels)
        tile = self._tiles.get(key)
        if tile is None:
            tile = self._tiles[key] = self._make(noun, colour, pixels)
        return tile

    def _make(self, noun: str, colour: str | None, pixels: int) -> np.ndarray:
        if noun not in self._source:
            raise KeyError(f"no object called {noun!r}; the nouns are those of arvis.data.cutouts.THINGS")
        tile_HWC = self._source[noun]
        if colour is not None:
            if (noun, colour) not in self._painted:
                self._painted[noun, colour] = recolour(tile_HWC, colour)
            tile_HWC = self._painted[noun, colour]
        if pixels != self.native:
            tile_HWC = resize(tile_HWC, pixels)
        solid = tile_HWC[..., 3] >= SOLID
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        tile_CHW = tile_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].transpose(2, 0, 1).copy()
        tile_CHW.setflags(write=False)
        return tile_CHW


def paste(canvas_CHW: np.ndarray, tile_CHW: np.ndarray, left: int, top: int) -> None:  # noqa: N803
    """Draw a premultiplied tile over a uint8 [3, H, W] canvas in place; what hangs over an edge is cut off."""
    height, width = canvas_CHW.shape[1:]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + tile_CHW.shape[1], height), min(left + tile_CHW.shape[2], width)
    if y0 >= y1 or x0 >= x1:
        return
    tile = tile_CHW[:, y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas_CHW[:, y0:y1, x0:x1]
    through = under * (255 - tile[3]).astype(np.uint16)
    # (x + 128 + (x + 128 >> 8)) >> 8 is x / 255 rounded, for every x in 0 ... 255 * 255, and stays below 2^16
    through += 128
    through += through >> 8
    through >>= 8
    through += tile[:3]
    under[...] = through


def resize(tile_HWC: np.ndarray, pixels: int) -> np.ndarray:  # noqa: N803
    """A premultiplied square tile at another size (Lanczos); colour stays below alpha."""
    planes = [Image.fromarray(plane) for plane in np.moveaxis(tile_HWC, -1, 0).astype(np.float32)]
    sized = [np.asarray(plane.resize((pixels, pixels), Image.Resampling.LANCZOS)) for plane in planes]
    alpha = sized[3].clip(0, 255)
    return np.stack([*(plane.clip(0, alpha) for plane in sized[:3]), alpha], -1).round().astype(np.uint8)


def recolour(tile_HWC: np.ndarray, colour: str) -> np.ndarray:  # noqa: N803
    """The tile with its main hue replaced; details of other hues, greys, shading and highlights stay.

    The main hue is the middle of the 70 degrees that hold most of the coloured pixels. Pixels near it take the new hue;
    their saturation and value are scaled so that the typical pixel becomes exactly the colour of COLOURS.
    """
    if colour not in COLOURS:
        raise ValueError(f"unknown colour {colour!r}; expected one of {', '.join(COLOURS)}")
    alpha = tile_HWC[..., 3:].astype(np.float32)
    rgb = tile_HWC[..., :3] / np.maximum(alpha, 1)
    hue, saturation, value = to_hsv(rgb)
    vivid = (alpha[..., 0] > 200) & (saturation > 0.25) & (value > 0.25)
    counts = np.bincount((hue[vivid] / 10).astype(int) % 36, minlength=36)
    window = sum(np.roll(counts, shift) for shift in range(-3, 4))
    main = 10 * int(np.argmax(window)) + 5
    distance = np.abs((hue - main + 180) % 360 - 180)
    near = ((65 - distance) / 20).clip(0, 1) * ((saturation - 0.12) / 0.15).clip(0, 1)
    typical = vivid & (distance <= 35)
    new_hue, new_saturation, new_value = COLOURS[colour]
    saturation = (saturation * (new_saturation / np.median(saturation[typical]))).clip(0, 1)
    value = (value * (new_value / np.median(value[typical]))).clip(0, 1)
    painted = to_rgb(np.full_like(hue, new_hue), saturation, value)
    mixed = rgb + near[..., None] * (painted - rgb)
    return np.concatenate([(mixed * alpha).round(), alpha], -1).astype(np.uint8)


def to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1], of colours [..., 3] in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        high == red,
        ((green - blue) / span) % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return sector * 60, (high - low) / np.maximum(high, 1e-6), high


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv`: colours [..., 3] in [0, 1]."""
    k = (np.stack([hue, hue, hue], -1) / 60 + np.array([5.0, 3.0, 1.0])) % 6
    return value[..., None] * (1 - saturation[..., None] * np.minimum(k, 4 - k).clip(0, 1))


def nearest_colour(rgb: np.ndarray) -> str:
    """What to call one RGB triple in [0, 255]: the nearest of COLOURS, "white" and "grey"."""
    names = [*COLOURS, "white", "grey"]
    triples = [*COLOURS.values(), (0.0, 0.0, 1.0), (0.0, 0.0, 0.6)]
    palette = 255 * to_rgb(*(np.array(part) for part in zip(*triples, strict=True)))
    return names[int(np.argmin(((palette - np.asarray(rgb, float)) ** 2).sum(-1)))]
