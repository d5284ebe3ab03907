"""What was published about a system: presets with their official files, and results with their sampling settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class File:
    """One official checkpoint file: where it lies on the hub and where the tensors lie inside it.

    A name that ends in "/" is a folder of shards with their index. `revision` pins a commit, `sha256` the content.
    """

    repo: str
    name: str
    inside: str = ""
    revision: str = "main"
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named model: its configuration, and the official files of its parts ("tokenizer", "transformer", ...)."""

    config: Callable[[], Any]
    files: dict[str, File] = field(default_factory=dict)
    licence: str = ""
    text: str = ""
    """The hub repository of a frozen text encoder that reads the prompts; fetched when the first prompt comes."""
    sampling: dict[str, Any] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of `training.fit.FitConfig` by stage ("tokenizer", "generator")."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One published number, labelled as published."""

    preset: str
    metric: str
    value: float
    settings: str = ""
    source: str = ""
