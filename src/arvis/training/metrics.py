"""The metrics file of a run: one JSON object a line, appended whole, cut back to a checkpoint's step on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvis.training.checkpoint import write_text

NAME = "metrics.jsonl"


def append(run: Path, row: Mapping[str, Any]) -> None:
    """Append one line by a single write, so that a killed process leaves at most one torn last line."""
    line = json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}) + "\n"
    try:
        handle = os.open(Path(run) / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:
        text = f"could not append to {Path(run) / NAME}: {error.strerror}; the run can be resumed from its checkpoint"
        raise OSError(error.errno, text) from error


def read(run: Path) -> list[dict[str, Any]]:
    """All complete lines; a torn or foreign line is left out."""
    file = Path(run) / NAME
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def cut(run: Path, step: int) -> None:
    """Drop every line after `step`, so that the file is that of a run which stopped there."""
    kept = [row for row in read(run) if row["step"] <= step]
    write_text(Path(run) / NAME, "".join(json.dumps(row) + "\n" for row in kept))


class Window:
    """The mean of every metric since the last line; part of the checkpoint, so that resumed lines are the same."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self.sums = dict(sums or {})
        self.count = count

    def add(self, values: Mapping[str, float]) -> None:
        """Take in the metrics of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def mean(self) -> dict[str, float]:
        """The means; the window is empty afterwards."""
        means = {name: total / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means
