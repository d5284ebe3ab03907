"""A data set of pictures read from anywhere: decoded when asked for, broken ones skipped, counted and named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from arvis.data.images import UnreadableImageError, centre_crop, read_image, to_tensor

_log = logging.getLogger("arvis")

HELD_OUT_SHARE = 20  # one picture in twenty
SMALLEST_TO_SPLIT = 40


@dataclass(frozen=True, kw_only=True)
class Record:
    """An encoded picture and what is known about it."""

    data: bytes
    caption: str
    label: int


class Source(Protocol):
    """Where records come from: a folder, parquet files, tar files.

    `name(i)` is what reports call record i, `key(i)` its name below the folder or in the file, wherever that lies.
    """

    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...
    def name(self, i: int) -> str: ...
    def key(self, i: int) -> str: ...
    def record(self, i: int) -> Record: ...


class Pictures:
    """An item is `{"image": uint8 [3, size, size] (centre crop), "caption": str, "label": int}`.

    A picture that does not decode is replaced by the next that does, noted in `skipped` as (name, reason), and logged
    once; item i is therefore the same whatever was read before.
    """

    def __init__(self, source: Source, size: int, indices: Sequence[int] | None = None) -> None:
        self._source = source
        self._indices = range(len(source)) if indices is None else indices
        self._broken: set[int] = set()
        self.size = size
        self.classes = source.classes
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        for step in range(len(self)):
            row = self._indices[(i + step) % len(self)]
            if row in self._broken:
                continue
            name = self._source.name(row)
            try:
                record = self._source.record(row)
                image = to_tensor(centre_crop(read_image(record.data, name), self.size))
            except OSError as error:
                self._broken.add(row)
                reason = str(error).removeprefix(f"cannot decode {name}: ")
                self.skipped.append((name, reason))
                _log.warning("skipped %s: %s", name, reason)
                continue
            return {"image": image, "caption": record.caption, "label": record.label}
        raise UnreadableImageError(
            f"none of the {len(self)} pictures could be read; the first: {self.skipped[0][0]}: {self.skipped[0][1]}"
        )

    def name(self, i: int) -> str:
        """What reports call picture i."""
        return self._source.key(self._indices[i])

    def split(self, which: str) -> Pictures:
        """ "all", "heldout" (one picture in twenty, by a hash of its name, but at least one) or "train" (the others).

        Fewer than 40 pictures are not divided: all of them are "train", and "heldout" is a ValueError.
        """
        if which not in ("train", "heldout", "all"):
            raise ValueError(f"unknown split {which!r}; expected 'train', 'heldout' or 'all'")
        if which == "all" or (which == "train" and len(self) < SMALLEST_TO_SPLIT):
            return self
        if len(self) < SMALLEST_TO_SPLIT:
            raise ValueError(
                f"{len(self)} pictures are too few to hold some out (at least {SMALLEST_TO_SPLIT}); put the held-out "
                "ones in a folder of their own"
            )
        hashes = [_hash(self._source.key(i)) for i in self._indices]
        held = [h % HELD_OUT_SHARE == 0 for h in hashes]
        if not any(held):
            held[hashes.index(min(hashes))] = True
        keep = [i for i, is_held in zip(self._indices, held, strict=True) if is_held == (which == "heldout")]
        return Pictures(self._source, self.size, keep)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
