"""A folder of pictures: classes by sub-folder, or captions beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from arvis.data.pictures import Pictures, Record

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
FILE_KEYS = ("file_name", "file", "image")
CAPTION_KEYS = ("caption", "text", "prompt")

_EXPECTED = (
    f"pictures ({', '.join(SUFFIXES)}), in sub-folders named after their classes, or with captions in captions.jsonl "
    '({"file": "a.png", "caption": "..."} a line) or in a .txt file beside each picture'
)


class FolderSource:
    """The pictures below a folder, in sorted order.

    Captions come from captions.jsonl (or metadata.jsonl) in the folder, else from the .txt file beside the picture,
    else from the name of the first sub-folder, which is also the class (pictures outside one are the class "").
    """

    def __init__(self, path: str | Path) -> None:
        self.root = root = Path(path)
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise FileNotFoundError(f"{root} {what}; expected a folder of {_EXPECTED}")
        self.skipped: list[tuple[str, str]] = []
        listed = _read_captions(root)
        found = _find(root)
        self._captions: Mapping[str, str] = {}
        if listed is not None:
            present = set(found)
            missing = [name for name in listed if name not in present]
            self.skipped += [(str(root / name), "named in the captions file but not there") for name in missing]
            found = [name for name in found if name in listed]
            self._captions = listed
        if not found:
            raise ValueError(f"no pictures in {root}; expected {_EXPECTED}")
        self._names = found
        folders = {_folder(name) for name in found} if listed is None else {""}
        self.classes = tuple(sorted(folders)) if folders != {""} else ()
        self._label = {name: k for k, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return str(self.root / self._names[i])

    def key(self, i: int) -> str:
        return self._names[i]

    def record(self, i: int) -> Record:
        name = self._names[i]
        folder = _folder(name)
        caption = self._captions.get(name)
        if caption is None:
            beside = (self.root / name).with_suffix(".txt")
            caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else folder.replace("_", " ")
        return Record(data=(self.root / name).read_bytes(), caption=caption, label=self._label.get(folder, 0))


def open_folder(path: str | Path, size: int, split: str = "train") -> Pictures:
    """A folder as a data set; its sub-folders "train" and "val" (or "heldout", "test"), if both exist, are the splits.

    Without them one picture in twenty is held out, from 40 pictures on.
    """
    root = Path(path)
    held = next((root / name for name in ("heldout", "val", "test") if (root / name).is_dir()), None)
    if held is not None and (root / "train").is_dir() and split in ("train", "heldout"):
        return Pictures(FolderSource(root / "train" if split == "train" else held), size)
    return Pictures(FolderSource(root), size).split(split)


def _folder(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _find(root: Path) -> list[str]:
    """Relative names with forward slashes, sorted; hidden files and folders are left out."""
    found = []
    for folder, inside, files in os.walk(root, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(found)


def _read_captions(root: Path) -> dict[str, str] | None:
    path = next((root / name for name in CAPTION_FILES if (root / name).is_file()), None)
    if path is None:
        return None
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = next(row[key] for key in FILE_KEYS if key in row)
            captions[str(Path(file).as_posix())] = str(next(row[key] for key in CAPTION_KEYS if key in row))
        except (ValueError, TypeError, StopIteration) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"file": "a.png", "caption": "..."}}, got {line[:80]!r}'
            ) from error
    return captions
