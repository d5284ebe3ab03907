"""The emoji world: 3,655 hand-drawn pictures with names, groups, genders and skin tones.

Pictures: Noto Color Emoji (SIL Open Font License 1.1). Names and groups: Unicode's emoji-test.txt (Unicode licence).
The file `emoji64.zip` in this folder is made by `scripts/build_emoji.py`; its notices are in `emoji64.LICENSE.txt`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("person", "man", "woman")


@dataclass(frozen=True, kw_only=True)
class EmojiRow:
    """One emoji.

    `base` is what all its variants share ("firefighter", "waving hand"); `gender` is None where nobody is drawn, else
    "person", "man", "woman", or joined by "+" for couples and families ("woman+man"); `skin_tone` is None for the
    default drawing, one of SKIN_TONES, or two joined by "+".
    """

    name: str
    group: str
    subgroup: str
    base: str
    gender: str | None
    skin_tone: str | None
    codepoints: tuple[str, ...]

    @property
    def is_composition(self) -> bool:
        """Whether base, one gender and one skin tone are all specified."""
        return self.gender in GENDERS and self.skin_tone in SKIN_TONES

    @property
    def text(self) -> str:
        """The emoji itself, as a string."""
        return "".join(chr(int(code, 16)) for code in self.codepoints)


class Emoji:
    """A data set of emoji pictures, all of one size, decoded once and kept in memory.

    An item is `{"image": uint8 [3, size, size] on white, "caption": name, "label": group index}`.
    """

    def __init__(
        self,
        rgba_NHWC: np.ndarray,  # noqa: N803
        rows: Sequence[EmojiRow],
        indices: Sequence[int],
        sources: dict[str, str],
    ) -> None:
        self._rgba_NHWC = rgba_NHWC  # premultiplied, of the whole world; a split is a selection of it
        self._indices = np.asarray(indices, np.int64)
        self._every_row = tuple(rows)
        self._white: Tensor | None = None
        self.rows = tuple(rows[i] for i in self._indices)
        self.classes = tuple(dict.fromkeys(row.group for row in rows))
        self.sources = sources
        self.size = rgba_NHWC.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        rgba_HWC = self._rgba_NHWC[self._indices[i]]
        return {"image": _on_white(rgba_HWC), "caption": row.name, "label": self.classes.index(row.group)}

    def rgba(self, i: int) -> Tensor:
        """Straight (not premultiplied) colour and alpha, uint8 [4, size, size]; colour is 0 where alpha is 0."""
        premultiplied_HWC = self._rgba_NHWC[self._indices[i]].astype(np.float32)
        alpha_HW1 = premultiplied_HWC[..., 3:]
        colour_HWC = premultiplied_HWC[..., :3] * 255 / np.maximum(alpha_HW1, 1)
        straight_HWC = np.concatenate([colour_HWC, alpha_HW1], -1).round().clip(0, 255).astype(np.uint8)
        return torch.from_numpy(straight_HWC.transpose(2, 0, 1).copy())

    def premultiplied_of(self, i: int) -> np.ndarray:
        """One picture as premultiplied colour and alpha, uint8 [size, size, 4], read-only: what pasting needs."""
        return self._rgba_NHWC[self._indices[i]]

    def all_images(self) -> Tensor:
        """Every picture of this split on white, uint8 [N, 3, size, size]; computed once, do not write into it."""
        if self._white is None:
            self._white = _on_white(self._rgba_NHWC[self._indices])
        return self._white

    def twins(self) -> Tensor:
        """For each picture the first equal to it, int64 [N]: a drawing may stand under several names."""
        first: dict[bytes, int] = {}
        return torch.tensor([first.setdefault(image.numpy().tobytes(), i) for i, image in enumerate(self.all_images())])

    def split(self, which: str) -> Emoji:
        """The fixed split over compositions (see `heldout_names`): "train", "heldout", or "all" for both."""
        if which not in ("train", "heldout", "all"):
            raise ValueError(f"unknown split {which!r} of the emoji; expected 'train', 'heldout' or 'all'")
        held = heldout_names(self._every_row)
        keep = [i for i in self._indices if which == "all" or (self._every_row[i].name in held) == (which == "heldout")]
        return Emoji(self._rgba_NHWC, self._every_row, keep, self.sources)

    def find(self, name: str) -> int:
        """The index of an emoji by its exact name."""
        index = {row.name: i for i, row in enumerate(self.rows)}
        if name not in index:
            from difflib import get_close_matches

            near = ", ".join(get_close_matches(name, index, 3)) or "nothing similar"
            raise KeyError(f"no emoji named {name!r} here; nearest: {near}")
        return index[name]


def load_emoji(size: int = 64, path: str | Path | None = None) -> Emoji:
    """All emoji at `size` x `size` pixels.

    The package holds 64 x 64; smaller sizes are averaged from it in premultiplied colour. Larger ones need a file of
    their own: `python scripts/build_emoji.py --size 128` writes it into this folder, or with `--output FILE` elsewhere,
    for `load_emoji(128, path=FILE)`.
    """
    beside = Path(__file__).with_name
    larger = beside(f"emoji{size}.zip")
    source = Path(path) if path is not None else larger if larger.is_file() else beside("emoji64.zip")
    if not source.is_file():
        raise FileNotFoundError(f"no emoji file at {source}; make one with scripts/build_emoji.py --output {source}")
    rgba_NHWC, rows, about = _read(str(source), source.stat().st_mtime_ns)
    native = rgba_NHWC.shape[1]
    if not 1 <= size <= native:
        raise ValueError(
            f"emoji of size {size} asked for, {source.name} holds {native} x {native}; build a larger file with "
            f"scripts/build_emoji.py --size {size}"
        )
    if size != native:
        rgba_NHWC = _shrink(rgba_NHWC, size)
    return Emoji(rgba_NHWC, rows, range(len(rows)), about)


def heldout_names(rows: Sequence[EmojiRow]) -> frozenset[str]:
    """The names of the held-out compositions, a tenth of all base x gender x skin tone pictures.

    A base takes part when it has at least two genders in all five skin tones. Of its pictures one or two are held out,
    chosen by a hash of the base's name so that no two share a gender or a tone: every (base, gender) still occurs in
    train in other tones, and every (base, tone) with other genders.
    """
    variants: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row.is_composition:
            assert row.gender is not None and row.skin_tone is not None
            variants.setdefault(row.base, {}).setdefault(row.gender, {})[row.skin_tone] = row.name
    held = set()
    for base, by_gender in variants.items():
        genders = [g for g in GENDERS if len(by_gender.get(g, {})) == len(SKIN_TONES)]
        if len(genders) < 2:
            continue
        word = int.from_bytes(blake2b(base.encode(), digest_size=8).digest(), "little")
        gender, tone = word % len(genders), word // 6 % 5
        held.add(by_gender[genders[gender]][SKIN_TONES[tone]])
        if len(genders) == 3 and word // 30 % 2:
            gender, tone = (gender + 1 + word // 60 % 2) % 3, (tone + 1 + word // 120 % 4) % 5
            held.add(by_gender[genders[gender]][SKIN_TONES[tone]])
    return frozenset(held)


@lru_cache(maxsize=2)
def _read(path: str, _modified: int) -> tuple[np.ndarray, tuple[EmojiRow, ...], dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read("index.json"))
            names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
            sheets = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGBA")) for name in names]
        size, side, count = index["size"], index["sheet"], len(index["rows"])
        sheets = [sheet.reshape(side, size, side, size, 4).transpose(0, 2, 1, 3, 4) for sheet in sheets]
        tiles = np.concatenate(sheets).reshape(-1, size, size, 4)
        order, parents = np.array(index["order"]), np.array(index["parents"])
        rgba_NHWC = np.empty((count, size, size, 4), np.uint8)
        rgba_NHWC[order] = tiles[:count]
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise OSError(f"{path} is not an emoji file of scripts/build_emoji.py: {error}") from error
    # Stored are differences modulo 256: medium tones to the toneless picture, then the other tones to medium.
    is_child = parents >= 0
    is_grandchild = is_child & (parents[parents] >= 0)
    for now in (is_child & ~is_grandchild, is_grandchild):
        rgba_NHWC[now] += rgba_NHWC[parents[now]]
    rgba_NHWC.setflags(write=False)
    rows = tuple(EmojiRow(**{**row, "codepoints": tuple(row["codepoints"])}) for row in index["rows"])
    return rgba_NHWC, rows, index["sources"]


def _on_white(rgba: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 4] premultiplied -> uint8 [..., 3, H, W]. Exact: colour <= alpha, so nothing overflows."""
    white = rgba[..., :3] + (255 - rgba[..., 3:])
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(white, -1, -3)))


def _shrink(rgba_NHWC: np.ndarray, size: int) -> np.ndarray:
    """Area average, which keeps colour <= alpha."""
    native = rgba_NHWC.shape[1]
    edges = np.linspace(0, native, size + 1)
    pixel = np.arange(native)
    cover = (np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)).clip(0) * (size / native)
    weight_PY = cover.astype(np.float32)
    out = np.empty((len(rgba_NHWC), size, size, 4), np.uint8)
    for start in range(0, len(out), 256):
        part = rgba_NHWC[start : start + 256].astype(np.float32)
        half = np.einsum("py,nyxc->npxc", weight_PY, part, optimize=True)
        out[start : start + 256] = np.einsum("qx,npxc->npqc", weight_PY, half, optimize=True).round().astype(np.uint8)
    return out
