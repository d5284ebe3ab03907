"""Webdataset tar files: members that share a name up to the first dot are one example (a.jpg, a.txt, a.cls, a.json)."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arvis.data.folders import CAPTION_KEYS, SUFFIXES
from arvis.data.pictures import Record


@dataclass(frozen=True, kw_only=True)
class _Example:
    tar: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix -> (offset, length)


class TarSource:
    """Examples of uncompressed tar files, indexed once by their headers and then read in any order.

    The caption is the .txt (or .caption) member or the "caption", "text" or "prompt" of the .json member; the label is
    the number in the .cls member or the "label" of the .json member. A tar that ends early gives what came before.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.skipped: list[tuple[str, str]] = []
        self.classes: tuple[str, ...] = ()
        self._examples: list[_Example] = []
        for path in map(Path, paths):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist; expected a webdataset tar file")
            self._examples += [e for e in self._scan(path) if any(suffix in e.members for suffix in SUFFIXES)]
        if not self._examples:
            names = ", ".join(map(str, paths)) or "an empty list of files"
            raise ValueError(f"no pictures in {names}; expected members such as 0001.jpg with 0001.txt or 0001.cls")

    def _scan(self, path: Path) -> list[_Example]:
        examples: dict[str, _Example] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    example = examples.setdefault(key, _Example(tar=path, key=key))
                    example.members[dot + suffix.lower()] = (member.offset_data, member.size)
        except tarfile.ReadError as error:
            if not examples:
                raise ValueError(f"{path} is not an uncompressed tar file ({error}); unpack .tar.gz first") from error
            self.skipped.append((str(path), f"ends early after {len(examples)} examples: {error}"))
        return list(examples.values())

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, i: int) -> str:
        return f"{self._examples[i].tar}:{self._examples[i].key}"

    def key(self, i: int) -> str:
        return f"{self._examples[i].tar.name}:{self._examples[i].key}"

    def record(self, i: int) -> Record:
        example = self._examples[i]
        parts = {}
        with example.tar.open("rb") as stream:
            for suffix, (offset, length) in example.members.items():
                stream.seek(offset)
                parts[suffix] = stream.read(length)
        try:
            info = json.loads(parts[".json"]) if ".json" in parts else {}
            caption = parts.get(".txt", parts.get(".caption"))
            text = (
                caption.decode() if caption is not None else str(next((info[k] for k in CAPTION_KEYS if k in info), ""))
            )
            label = int(parts[".cls"] if ".cls" in parts else info.get("label", 0))
        except (ValueError, TypeError, AttributeError) as error:
            raise OSError(f"bad caption or label: {error}") from error
        image = next(parts[suffix] for suffix in SUFFIXES if suffix in parts)
        return Record(data=image, caption=text.strip(), label=label)
