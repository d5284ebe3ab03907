"""What is in a picture of the emoji world: an exact detector made of the cut-outs that scenes are composed of.

A scene is a flat background and some of 143 known objects at known sizes, so a picture is explained by the objects
that leave the least squared error. For a template with difference F from the background, drawn where the picture
differs from the background by D, that error falls by the gain 2<D, F> - |F|^2. Gains of every object in every colour,
size and place are one correlation each at half resolution; the best are examined pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.data.cutouts import BACKGROUNDS, COLOURS, THINGS, Cutouts
from arvis.data.emoji import Emoji, load_emoji
from arvis.data.scenes import Box
from arvis.evaluation.skills import Found, Seen

SIZE = 64
PIXELS = tuple(range(20, 60, 4))  # every size that scenes of 64 x 64 draw objects at
_RANK = 96  # of the templates of a group, in the coarse search
_CELL = 4  # templates are grouped by their height and width at half resolution, rounded up to multiples of this


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """`score` is the least correlation of an object that counts as found, `most` how many are looked for.

    `overlap` is the share of the smaller box that two objects may have in common; `near` candidates of the coarse
    search are examined pixel by pixel for each object.
    """

    score: float = 0.75
    most: int = 8
    overlap: float = 0.25
    near: int = 32
    blur: float = 1.0


@dataclass(frozen=True)
class _Group:
    """Templates of one drawing size and about one shape, at half resolution, as matrices over flattened windows."""

    pixels: int
    height: int
    width: int
    look_A: Tensor  # index of the look of each template
    basis_PR: Tensor  # premultiplied colour and minus alpha of the templates, P = 4 * height * width, are ...
    weight_RA: Tensor  # ... nearly half the product of these two
    slack: tuple[int, int]  # how much smaller than height and width the smallest template is
    norms_5A: Tensor  # sums of colour^2, of colour * alpha for each channel, of alpha^2


class Detector:
    """uint8 pictures [B, 3, 64, 64] -> what is in each. Knows nothing about captions; judging is `judge`."""

    def __init__(self, config: DetectorConfig | None = None, emoji: Emoji | None = None) -> None:
        self.config = config or DetectorConfig()
        self._cutouts = Cutouts(emoji or load_emoji(SIZE))
        self._looks = [(t.noun, c) for t in THINGS for c in ((None, *COLOURS) if t.colourable else (None,))]
        self._powers: dict[tuple[int, int], np.ndarray] = {}
        self._sides = np.array([[self._cutouts.get(*look, p).shape[:0:-1] for p in PIXELS] for look in self._looks])
        self._groups = list(self._build())

    def __call__(self, images_B3YX: Tensor, batch: int = 8) -> list[Seen]:  # noqa: N803
        """Raises ValueError for anything but uint8 [B, 3, 64, 64]."""
        if images_B3YX.dtype != torch.uint8 or images_B3YX.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"the detector reads uint8 pictures [B, 3, {SIZE}, {SIZE}], got {images_B3YX.dtype} "
                f"{tuple(images_B3YX.shape)}"
            )
        seen = []
        for part in images_B3YX.cpu().split(batch):
            seen += self._look(part.numpy())
        return seen

    def _build(self) -> Iterator[_Group]:
        for pixels in PIXELS:
            shapes: dict[tuple[int, int], list[int]] = {}
            halves = []
            for i, (noun, colour) in enumerate(self._looks):
                half = _halved(self._cutouts.get(noun, colour, pixels))
                halves.append(half)
                height, width = (-(-side // _CELL) * _CELL for side in half.shape[1:])
                shapes.setdefault((min(height, SIZE // 2), min(width, SIZE // 2)), []).append(i)
            for (height, width), members in shapes.items():
                tiles = np.zeros((len(members), 4, height, width), np.float32)
                for row, i in enumerate(members):
                    tiles[row, :, : halves[i].shape[1], : halves[i].shape[2]] = halves[i]
                norms = _norms(_blurred(tiles, self.config.blur / 2))
                tiles[:, 3] *= -1
                basis_PR, weight_RA = _low_rank(tiles.reshape(len(members), -1), _RANK)
                sides = np.array([halves[i].shape[1:] for i in members]).min(0)
                yield _Group(
                    pixels=pixels,
                    height=height,
                    width=width,
                    slack=(height - int(sides[0]), width - int(sides[1])),
                    look_A=torch.tensor(members, dtype=torch.float32),
                    basis_PR=basis_PR,
                    weight_RA=weight_RA,
                    norms_5A=torch.from_numpy(norms).T,
                )

    def _look(self, images_B3YX: np.ndarray) -> list[Seen]:  # noqa: N803
        named = [_background(image) for image in images_B3YX]
        flat_B3 = np.stack([rgb for _, rgb in named])
        rest_B3YX = images_B3YX.astype(np.float32) / 255 - flat_B3[:, :, None, None]
        coarse = self._search(rest_B3YX, flat_B3)
        return [
            Seen(background=named[i][0], objects=tuple(self._parse(rest_B3YX[i], flat_B3[i], coarse[i])))
            for i in range(len(named))
        ]

    def _search(self, rest_B3YX: np.ndarray, flat_B3: np.ndarray) -> list[np.ndarray]:  # noqa: N803
        """Candidates of each picture: rows of (gain, look, pixels, top, left), half a gain per pixel of the picture."""
        flat = torch.from_numpy(flat_B3)
        mean = rest_B3YX.reshape(*rest_B3YX.shape[:2], SIZE // 2, 2, SIZE // 2, 2).mean((3, 5))
        half = torch.from_numpy(_twice_blurred(mean, self.config.blur / 2))
        half = torch.cat((half, torch.einsum("bc,bcyx->byx", flat, half)[:, None]), 1)
        square = torch.from_numpy(_square(flat_B3))
        out = []
        for group in self._groups:
            # a window may hang over the lower and right edges as far as its narrowest object lets it
            edge = F.pad(half, (0, group.slack[1], 0, group.slack[0]))
            windows = edge.unfold(2, group.height, 1).unfold(3, group.width, 1)
            count, _, down, across = windows.shape[:4]
            flattened = windows.permute(0, 2, 3, 1, 4, 5).reshape(count * down * across, -1)
            gain = (flattened @ group.basis_PR) @ group.weight_RA
            gain = gain.view(count, down * across, -1).sub_((square @ group.norms_5A)[:, None])
            best, which = gain.topk(min(4, gain.shape[-1]), -1)
            place = torch.arange(down * across)[None, :, None].expand_as(which)
            rows = torch.stack(
                (
                    best,
                    group.look_A[which],
                    torch.full_like(best, group.pixels),
                    2.0 * (place // across),
                    2.0 * (place % across),
                ),
                -1,
            )
            out.append(rows.flatten(1, 2))
        return list(torch.cat(out, 1).numpy())

    def _parse(self, rest_3YX: np.ndarray, flat_3: np.ndarray, rows_C5: np.ndarray) -> Iterator[Found]:  # noqa: N803
        """Objects by falling merit, each taken out of the picture before the next is looked for."""
        rest_3YX = rest_3YX.copy()
        rows_C5 = rows_C5[rows_C5[:, 0] > 0]
        boxes_C4 = self._boxes(rows_C5)
        merit_C = None
        for _ in range(3 * self.config.most):
            soft_3YX, sums = _twice_blurred(rest_3YX, self.config.blur), _sums(rest_3YX, self.config.blur)
            if merit_C is None:
                merit_C = _merit(4 * rows_C5[:, 0], boxes_C4, sums)
            if not len(merit_C) or merit_C.max() <= 0:
                return
            close = _alike(boxes_C4, boxes_C4[int(merit_C.argmax())]) > 0.4
            near = np.flatnonzero(close)
            near = near[np.argsort(-merit_C[near])[: self.config.near]]
            best = max((self._exact(soft_3YX, sums, flat_3, row) for row in rows_C5[near]), key=lambda e: e[0])
            _, look, pixels, box = best
            noun = self._looks[look][0]
            score = self._compare(rest_3YX, flat_3, look, pixels, box)[0]
            if score >= self.config.score:
                yield Found(name=noun, colour=self._colour(rest_3YX, flat_3, noun, pixels, box), box=box, score=score)
                self._remove(rest_3YX, look, pixels, box)
                keep = _shared(boxes_C4, np.array(box)) <= self.config.overlap
            else:
                keep = ~close
            rows_C5, boxes_C4, merit_C = rows_C5[keep], boxes_C4[keep], merit_C[keep]

    def _boxes(self, rows_C5: np.ndarray) -> np.ndarray:  # noqa: N803
        corner_C2 = rows_C5[:, [4, 3]].astype(int)
        size_C2 = self._sides[rows_C5[:, 1].astype(int), (rows_C5[:, 2].astype(int) - PIXELS[0]) // 4]
        return np.concatenate([corner_C2, corner_C2 + size_C2], 1)

    def _exact(
        self,
        soft_3YX: np.ndarray,
        sums: np.ndarray,
        flat_3: np.ndarray,
        row_5: np.ndarray,  # noqa: N803
    ) -> tuple[float, int, int, Box]:
        """A candidate at full resolution, at its best place within two pixels: merit, look, pixels, box."""
        look, pixels = int(row_5[1]), int(row_5[2])
        drawn = _difference(self._cutouts.get(*self._looks[look], pixels), flat_3)
        height, width = drawn.shape[1:]
        top, left = (min(max(int(row_5[k]) - 1, 0), SIZE - side) for k, side in ((3, height), (4, width)))
        part = soft_3YX[:, top : top + height + 3, left : left + width + 3]
        windows = np.lib.stride_tricks.sliding_window_view(part, (height, width), (1, 2))
        gain = 2 * np.einsum("cyxhw,chw->yx", windows, drawn) - self._power(look, pixels) @ _square(flat_3)
        y, x = np.unravel_index(int(gain.argmax()), gain.shape)
        box = (left + int(x), top + int(y), left + int(x) + width, top + int(y) + height)
        return (float(_merit(gain[y, x], np.array([box]), sums)[0]), look, pixels, box)

    def _power(self, look: int, pixels: int) -> np.ndarray:
        if (look, pixels) not in self._powers:
            tile = self._cutouts.get(*self._looks[look], pixels).astype(np.float32) / 255
            self._powers[look, pixels] = _norms(_blurred(tile[None], self.config.blur))[0]
        return self._powers[look, pixels]

    def _compare(
        self,
        rest_3YX: np.ndarray,
        flat_3: np.ndarray,
        look: int,
        pixels: int,
        box: Box,  # noqa: N803
    ) -> tuple[float, float]:
        """Correlation and squared error of an object with the picture around it, both blurred."""
        tile = self._cutouts.get(*self._looks[look], pixels)
        pad = _reach(self.config.blur)
        drawn = _blurred(_difference(tile, flat_3)[None], self.config.blur)[0]
        where = _blurred(tile[None, 3:].astype(np.float32) / 255, self.config.blur)[0] > 0.05
        soft = _blurred(rest_3YX[None], self.config.blur)[0]
        part = soft[:, box[1] : box[3] + 2 * pad, box[0] : box[2] + 2 * pad] * where
        power = np.sqrt((part**2).sum() * (drawn**2).sum())
        return float((part * drawn).sum() / max(power, 1e-9)), float(((part - drawn) ** 2).sum())

    def _remove(self, rest_3YX: np.ndarray, look: int, pixels: int, box: Box) -> None:  # noqa: N803
        """Take an object out, with a rim of one pixel that blurring may have put around it."""
        hidden = np.zeros((SIZE + 2, SIZE + 2), bool)
        solid = self._cutouts.get(*self._looks[look], pixels)[3] > 0
        for y in range(3):
            for x in range(3):
                hidden[box[1] + y : box[3] + y, box[0] + x : box[2] + x] |= solid
        rest_3YX *= ~hidden[1:-1, 1:-1]

    def _colour(
        self,
        rest_3YX: np.ndarray,
        flat_3: np.ndarray,
        noun: str,
        pixels: int,
        box: Box,  # noqa: N803
    ) -> str | None:
        """The painted variant that leaves the least error where the object was found."""
        if (noun, "red") not in self._looks:
            return None
        looks = {colour: self._looks.index((noun, colour)) for colour in COLOURS}
        return min(COLOURS, key=lambda c: self._compare(rest_3YX, flat_3, looks[c], pixels, box)[1])


def _halved(tile_CHW: np.ndarray) -> np.ndarray:  # noqa: N803
    """A tile at half resolution, float32 in [0, 1], averaged over the four ways it can lie on the coarser grid."""
    tile = np.pad(tile_CHW.astype(np.float32) / 255, ((0, 0), (1, 1), (1, 1)))
    tile = (tile[:, :-1] + tile[:, 1:]) / 2
    tile = (tile[:, :, :-1] + tile[:, :, 1:]) / 2
    height, width = (side + side % 2 for side in tile.shape[1:])
    tile = np.pad(tile, ((0, 0), (0, height - tile.shape[1]), (0, width - tile.shape[2])))
    return tile.reshape(4, height // 2, 2, width // 2, 2).mean((2, 4))


def _low_rank(matrix_AP: np.ndarray, rank: int) -> tuple[Tensor, Tensor]:  # noqa: N803
    """[P, R] and [R, A] whose product is the best approximation of the transpose, times two."""
    tall = torch.from_numpy(matrix_AP)
    _, vectors_AR = torch.linalg.eigh((tall @ tall.T).double())
    weight_AR = vectors_AR[:, -rank:].float()
    return 2 * tall.T @ weight_AR, weight_AR.T.contiguous()


def _difference(tile_4YX: np.ndarray, flat_3: np.ndarray) -> np.ndarray:  # noqa: N803
    """What drawing a tile changes in a flat picture, float32 [3, h, w] with colours in [0, 1]."""
    tile = tile_4YX.astype(np.float32) / 255
    return tile[:3] - tile[3] * flat_3[:, None, None]


def _shared(boxes_C4: np.ndarray, box_4: np.ndarray) -> np.ndarray:  # noqa: N803
    """Intersections with a box as shares of the smaller of the two areas."""
    size = np.minimum(boxes_C4[:, 2:], box_4[2:]) - np.maximum(boxes_C4[:, :2], box_4[:2])
    common = size.clip(0).prod(1)
    areas = (boxes_C4[:, 2:] - boxes_C4[:, :2]).prod(1)
    return common / np.minimum(areas, (box_4[2:] - box_4[:2]).prod())


def _alike(boxes_C4: np.ndarray, box_4: np.ndarray) -> np.ndarray:  # noqa: N803
    """Intersections with a box as shares of the unions."""
    size = np.minimum(boxes_C4[:, 2:], box_4[2:]) - np.maximum(boxes_C4[:, :2], box_4[:2])
    common = size.clip(0).prod(1)
    return common / ((boxes_C4[:, 2:] - boxes_C4[:, :2]).prod(1) + (box_4[2:] - box_4[:2]).prod() - common)


def _merit(gain_C: np.ndarray, boxes_C4: np.ndarray, sums: np.ndarray) -> np.ndarray:  # noqa: N803
    """Gain times the share that it is of all there is to explain inside the box.

    The gain alone would prefer one large object over two small ones it covers in part; the share alone a small object
    over the large one it looks like a piece of.
    """
    x0, y0, x1, y1 = boxes_C4.clip(0, SIZE).T
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return np.asarray(gain_C).clip(0) ** 2 / inside.clip(1e-6)


def _sums(rest_3YX: np.ndarray, sigma: float) -> np.ndarray:  # noqa: N803
    """Sums of the squares of a blurred picture over all pixels above and left of each corner."""
    pad = _reach(sigma)
    soft = _blurred(rest_3YX[None], sigma)[0][:, pad : pad + SIZE, pad : pad + SIZE]
    sums = np.zeros((SIZE + 1, SIZE + 1), np.float32)
    sums[1:, 1:] = (soft**2).sum(0).cumsum(0).cumsum(1)
    return sums


def _square(flat: np.ndarray) -> np.ndarray:
    """What |colour - alpha * flat|^2 needs of the background, [..., 3] -> [..., 5], against `_norms`."""
    ones = np.ones_like(flat[..., :1])
    return np.concatenate([ones, -2 * flat, (flat**2).sum(-1, keepdims=True)], -1)


def _norms(tiles_A4YX: np.ndarray) -> np.ndarray:  # noqa: N803
    colour, alpha = tiles_A4YX[:, :3], tiles_A4YX[:, 3:]
    parts = [(colour**2).sum((1, 2, 3))[:, None], (colour * alpha).sum((2, 3)), (alpha**2).sum((2, 3))]
    return np.concatenate(parts, 1)


def _reach(sigma: float) -> int:
    return max(1, round(3 * sigma))


@lru_cache(maxsize=256)
def _kernel(side: int, sigma: float) -> np.ndarray:
    """The matrix of a Gaussian blur that keeps what spreads over the ends, float32 [side + 2 reach, side]."""
    reach = _reach(sigma)
    distance = np.arange(side + 2 * reach)[:, None] - reach - np.arange(side)
    weight = np.exp(-(distance**2) / (2 * max(sigma, 1e-3) ** 2)) * (np.abs(distance) <= reach)
    return (
        weight
        / weight.max(0).clip(1e-9)
        / np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * max(sigma, 1e-3) ** 2)).sum()
    ).astype(np.float32)


def _blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """[..., Y, X] -> [..., Y + 2 reach, X + 2 reach]."""
    return _kernel(images.shape[-2], sigma) @ images @ _kernel(images.shape[-1], sigma).T


def _twice_blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """[..., Y, X] of the same size, so that its product with F is that of the blurred images with the blurred F."""
    down, across = (_kernel(side, sigma) for side in images.shape[-2:])
    return (down.T @ down) @ images @ (across.T @ across)


def _background(image_3YX: np.ndarray) -> tuple[str | None, np.ndarray]:  # noqa: N803
    """The name of the background, and its colour as it is in the picture, float32 [3] in [0, 1].

    Every pixel votes for the colours of BACKGROUNDS near its own, those within four pixels of the edge three times. A
    winner with fewer votes than a twentieth of the picture is no background: then it is the median of the edge.
    """
    names = list(BACKGROUNDS)
    pixels_N3 = image_3YX.reshape(3, -1).T.astype(np.float32)
    weight_YX = np.ones(image_3YX.shape[1:], np.float32)
    weight_YX[4:-4, 4:-4] = 1 / 3
    palette_83 = np.array(list(BACKGROUNDS.values()), np.float32)
    distance_N8 = ((pixels_N3[:, None] - palette_83) ** 2).sum(-1)
    votes_8 = weight_YX.reshape(-1) @ np.exp(-distance_N8 / (2 * 20**2))
    best = int(votes_8.argmax())
    if votes_8[best] < 0.05 * weight_YX.sum():
        edge = np.concatenate([image_3YX[:, [0, -1]].reshape(3, -1), image_3YX[:, :, [0, -1]].reshape(3, -1)], 1)
        return None, (np.median(edge, 1) / 255).astype(np.float32)
    near = pixels_N3[distance_N8[:, best] < 40**2]
    return names[best], (np.median(near, 0) / 255).astype(np.float32)
