"""Parquet files of encoded pictures, as the Hugging Face hub stores image data sets."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from arvis.data.folders import CAPTION_KEYS
from arvis.data.pictures import Record

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes")
LABEL_COLUMNS = ("label", "class", "cls", "fine_label")


class ParquetSource:
    """Rows of parquet files: a column of bytes, or of {"bytes": ..., "path": ...}, with an optional caption and label.

    Needs pyarrow. Rows are read by row group and a few groups are kept, so shuffled reading is quick where groups are
    small (the hub writes 100 rows).
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._arrow = arrow = _pyarrow()
        self.skipped: list[tuple[str, str]] = []
        self.classes: tuple[str, ...] = ()
        self._paths = [Path(path) for path in paths]
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._starts: list[int] = []
        count = 0
        for k, path in enumerate(self._paths):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist; expected a parquet file with a column of pictures")
            try:
                with arrow.parquet.ParquetFile(path) as file:
                    columns, about = file.schema_arrow.names, file.schema_arrow.metadata or {}
                    sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            except arrow.ArrowInvalid as error:
                raise ValueError(f"{path} is not a parquet file: {error}") from error
            if k == 0:
                self._choose(path, columns)
                self.classes = _class_names(about.get(b"huggingface", b"{}"), self._label)
            for g, size in enumerate(sizes):
                self._groups.append((k, g))
                self._starts.append(count)
                count += size
        self._count = count
        if not count:
            raise ValueError(f"no rows in {', '.join(map(str, paths)) or 'an empty list of files'}")
        self._read_group = lru_cache(maxsize=4)(self._load_group)

    def _choose(self, path: Path, columns: Sequence[str]) -> None:
        image = next((name for name in IMAGE_COLUMNS if name in columns), None)
        if image is None:
            raise ValueError(
                f"{path} has no column of pictures: expected one of {', '.join(IMAGE_COLUMNS)}, "
                f"got {', '.join(columns)}"
            )
        self._image = image
        self._caption = next((name for name in CAPTION_KEYS if name in columns), None)
        self._label = next((name for name in LABEL_COLUMNS if name in columns), None)

    def _load_group(self, k: int, group: int) -> list[dict[str, Any]]:
        columns = [name for name in (self._image, self._caption, self._label) if name]
        with self._arrow.parquet.ParquetFile(self._paths[k]) as file:
            return file.read_row_group(group, columns=columns).to_pylist()

    def _locate(self, i: int) -> tuple[int, int, int]:
        at = bisect_right(self._starts, i) - 1
        return *self._groups[at], i - self._starts[at]

    def __len__(self) -> int:
        return self._count

    def name(self, i: int) -> str:
        k, group, row = self._locate(i)
        return f"{self._paths[k]}:{group}:{row}"

    def key(self, i: int) -> str:
        k, group, row = self._locate(i)
        return f"{self._paths[k].name}:{group}:{row}"

    def record(self, i: int) -> Record:
        k, group, row = self._locate(i)
        values = self._read_group(k, group)[row]
        image = values[self._image]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise OSError(f"column {self._image!r} holds {type(data).__name__}, not the bytes of a picture")
        caption = values.get(self._caption) if self._caption else None
        label = values.get(self._label) if self._label else None
        return Record(data=data, caption=str(caption or ""), label=label if isinstance(label, int) else 0)


def _class_names(about: bytes, label: str | None) -> tuple[str, ...]:
    """The names the hub's `datasets` library writes into the schema."""
    try:
        return tuple(json.loads(about)["info"]["features"][label]["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _pyarrow() -> Any:
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'arvis[data]'") from error
