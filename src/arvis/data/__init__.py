"""Data sets: the emoji world, scenes composed from it, folders, parquet and tar files of pictures."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arvis.data.batches import Dataset

__all__ = ["fingerprint", "open_data"]

_NAMES = ("emoji", "scenes")


def open_data(spec: str, size: int, seed: int = 0, split: str = "train") -> Dataset:
    """The data set a short text names, as pictures of `size` x `size`.

    `spec` is "emoji", "scenes", both ("emoji+scenes", half and half), a folder of pictures, a .parquet or .tar file, or
    a pattern of such files ("shards/*.tar"). `split` is "train" or "heldout", or "all" for everything but scenes.
    `seed` chooses the scenes.
    """
    parts = spec.split("+")
    if all(part in _NAMES for part in parts):
        sets = [_open_world(part, size, seed, split) for part in parts]
        if len(sets) == 1:
            return sets[0]
        from arvis.data.mixture import Mixture

        return Mixture(sets)
    if Path(spec).is_dir():
        from arvis.data.folders import open_folder

        return open_folder(spec, size, split)
    paths = [spec] if Path(spec).is_file() else sorted(glob.glob(spec))
    kinds = {Path(path).suffix.lower() for path in paths}
    if kinds == {".tar"}:
        from arvis.data.pictures import Pictures
        from arvis.data.tars import TarSource

        return Pictures(TarSource(paths), size).split(split)
    if kinds == {".parquet"}:
        from arvis.data.parquet import ParquetSource
        from arvis.data.pictures import Pictures

        return Pictures(ParquetSource(paths), size).split(split)
    found = f"found {', '.join(paths[:3])}" if paths else "nothing is there"
    raise ValueError(
        f"no data set {spec!r} ({found}); expected 'emoji', 'scenes', 'emoji+scenes', a folder of pictures, "
        "or .parquet or .tar files"
    )


def fingerprint(spec: str) -> str:
    """A text that changes when the files behind a data set do: their names, sizes and times."""
    world = all(part in _NAMES for part in spec.split("+"))
    root = Path(__file__).parent if world else Path(spec)
    if world:
        files = list(root.glob("emoji*.zip"))
    elif root.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]
    else:
        files = [Path(name) for name in ([spec] if root.is_file() else glob.glob(spec))]
    told = [(file.relative_to(root if root.is_dir() else file.parent), file.stat()) for file in sorted(files)]
    return "\n".join([spec if world else "", *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in told)])


def _open_world(name: str, size: int, seed: int, split: str) -> Dataset:
    if name == "emoji":
        from arvis.data.emoji import load_emoji

        return load_emoji(size).split(split)
    from arvis.data.scenes import Scenes, ScenesConfig

    return Scenes(ScenesConfig(size=size, seed=seed, split=split))
