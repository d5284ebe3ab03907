"""The run folder: config.json, the resolved settings of a run and what they ran on, beside the other files.

RUN/  config.json  metrics.jsonl  checkpoints/  samples/*.png  report.html
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arvis.training.checkpoint import write_text

_log = logging.getLogger("arvis")
_FILE = "config.json"


def exists(run: Path) -> bool:
    """Whether the folder already holds a run."""
    return (run / _FILE).exists()


def read(run: Path | str) -> dict[str, Any]:
    """The contents of config.json. Raises FileNotFoundError where the folder is not a run."""
    try:
        return json.loads((Path(run) / _FILE).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} is not a run folder: it has no {_FILE}") from None


def write(run: Path, fit: Mapping[str, Any], about: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Make the folder and write config.json: format, command, versions, `about`, the FitConfig, the caller's settings.

    Where it was there, each setting of the FitConfig that changed is named in the log.
    """
    (run / "samples").mkdir(parents=True, exist_ok=True)
    old = read(run).get("fit", {}) if exists(run) else {}
    changed = [f"{name}: {old[name]!r} -> {fit[name]!r}" for name in fit if name in old and old[name] != fit[name]]
    if changed:
        _log.warning("resuming with changed settings: %s", ", ".join(changed))
    first = {"format": 1, "command": sys.argv, "versions": _versions()}
    write_text(run / _FILE, json.dumps({**first, **about, "fit": fit, **settings}, indent=1))


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("arvis")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {"arvis": own, "torch": str(torch.__version__), "python": platform.python_version()}
