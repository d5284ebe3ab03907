"""Recordings of official code against our systems, tensor by tensor, and full-size key layouts without their weights.

A recording is a folder: `weights.safetensors` (official names), `io.safetensors` (named inputs, noises and outputs) and
`config.json` (`model`: constructor values by component, `runs`: parameters of each run, `tensors`: what every tensor is
and how closely it must be reproduced). The file of a system (or of a part that has recordings of its own) offers

    run(fixture)         yields (name, tensor) for every output of a recording, computed by our system
    skeleton(layout)     our module on the meta device and its key table, for a key layout
    RECORDINGS           the recordings that it runs, where they are not the one that has the system's name
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from arvis.weights import Key, Report, WeightsError, map_shapes, read

Verdict = Literal["pass", "fail", "not covered", "input"]

_log = logging.getLogger("arvis")


class ParityError(ValueError):
    """There is nothing to compare: no recording, none of this form, or no runner."""


class Row(NamedTuple):
    """One recorded tensor: the largest difference and the largest allowed one; NaN where nothing was compared."""

    name: str
    max_error: float
    tolerance: float
    verdict: Verdict
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict in ("pass", "input")

    def __str__(self) -> str:
        compared = not math.isnan(self.max_error)
        numbers = f"max error {self.max_error:.1e}, tolerance {self.tolerance:.1e}  " if compared else ""
        return f"{self.verdict:11}  {self.name:30}  {numbers}{self.note}".rstrip()


class Fixture:
    """The recording in a folder: numbers as float32 (wider ones as they are) and int64."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.slug: str = self.config["slug"]
            self.runs: dict[str, Any] = self.config["runs"]
            self.tensors: dict[str, dict[str, Any]] = self.config["tensors"]
            self._model: dict[str, Any] = self.config["model"]
            self.io = _widened(read(self.folder / "io.safetensors"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ParityError(f"{self.folder} holds no recording: {type(error).__name__}: {error}") from error

    def model(self, component: str) -> dict[str, Any]:
        """The official constructor values of a component."""
        return self._model[component]

    def weights(self, component: str) -> dict[str, Tensor]:
        """The tensors of a component under their official names; empty for one without weights."""
        prefixes = {name: values.get("weights_prefix") for name, values in self._model.items()}
        own = prefixes[component]
        if own is None:
            return {}
        others = tuple(p for p in prefixes.values() if p and p != own and p.startswith(own))
        return {
            name.removeprefix(own): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(own) and not name.startswith(others)
        }

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        try:
            return _widened(read(self.folder / "weights.safetensors"))
        except WeightsError as error:
            raise ParityError(f"{self.folder} holds no recording: {error}") from error


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float16 was only how exact numbers were stored; ids came in whatever integers held them."""

    def widened(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.long()
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    return {name: widened(tensor) for name, tensor in tensors.items()}


def places(slug: str) -> list[Path]:
    """Where a recording is looked for: in the tests of this checkout, then in the folders of $ARVIS_PARITY (by default
    in one beside the checkout)."""
    root = Path(__file__).resolve().parents[3]
    checkout = (root / "pyproject.toml").is_file()
    own = [root / "tests" / "parity"] if checkout else []
    beside = [root.parent / "shared" / "parity"] if checkout else []
    named = [Path(place) for place in os.environ.get("ARVIS_PARITY", "").split(os.pathsep) if place]
    return [place / slug for place in own + (named or beside)]


def find(slug: str) -> Fixture:
    """The recording of a system. ParityError saying where it was looked for when there is none."""
    looked = places(slug)
    for folder in looked:
        if (folder / "config.json").is_file():
            return Fixture(folder)
    where = ", ".join(map(str, looked)) or "no folder: set ARVIS_PARITY"
    raise ParityError(f"no recording of the official code of {slug!r} is here (looked in {where})")


class Runner(Protocol):
    """What the file of a system offers."""

    def run(self, fixture: Fixture) -> Iterator[tuple[str, Tensor]]: ...
    def skeleton(self, layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]: ...


def runners() -> tuple[str, ...]:
    """Whatever is compared with official code: the systems that have a runner, and parts that are no system."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return tuple(name.replace("_", "-") for name in names if name != Path(__file__).stem)


def covered(slug: str) -> bool:
    """Whether a system, or a part, has a runner."""
    return slug in runners()


def recordings(slug: str) -> tuple[str, ...]:
    """The names of the recordings that a system's runner reproduces."""
    return getattr(_runner(slug), "RECORDINGS", (slug,))


def _home(slug: str) -> str:
    return f"{__package__}.{slug.replace('-', '_')}"


def _runner(slug: str) -> Runner:
    if not covered(slug):
        raise ParityError(f"{slug!r} has no comparison with official code yet: it would be the module {_home(slug)}")
    return import_module(_home(slug))  # type: ignore[return-value]


def run(slug: str, fixture: Fixture) -> list[Row]:
    """One row per tensor of a recording, in the order of its config.json; nothing is left out.

    Where the runner breaks off, what it had not computed by then is not covered, and the rows say why.
    """
    runner = _runner(slug)
    if fixture.slug not in recordings(slug):
        known = " and ".join(map(repr, recordings(slug)))
        raise ParityError(f"{fixture.folder} is a recording of {fixture.slug!r}, not of {known}")
    found: dict[str, Tensor] = {}
    note = ""
    with torch.no_grad():
        try:
            for name, tensor in runner.run(fixture):
                found[name] = tensor
        except Exception as error:  # whatever it is, the rows computed before it are worth showing
            _log.error("the comparison of %s broke off", slug, exc_info=error)
            note = f"broke off: {type(error).__name__}: {error}"
    rows = [_row(name, about, fixture.io.get(name), found.get(name), note) for name, about in fixture.tensors.items()]
    unlisted = [name for name in fixture.io if name not in fixture.tensors]
    return rows + [Row(name, math.nan, math.nan, "not covered", "config.json does not list it") for name in unlisted]


def _row(name: str, about: Mapping[str, Any], wanted: Tensor | None, found: Tensor | None, note: str) -> Row:
    if wanted is None:
        return Row(name, math.nan, math.nan, "not covered", "io.safetensors does not hold it")
    if about["role"] != "output":
        return Row(name, math.nan, math.nan, "input")
    if found is None:
        return Row(name, math.nan, math.nan, "not covered", note)
    tolerance = allowed(about["compare"], about["atol"], wanted)
    if found.shape != wanted.shape:
        told = f"shape {tuple(found.shape)}, recorded {tuple(wanted.shape)}"
        return Row(name, math.inf, tolerance, "fail", told)
    error = difference(found, wanted)
    return Row(name, error, tolerance, "pass" if error <= tolerance else "fail")


def allowed(compare: str, atol: float | None, wanted: Tensor) -> float:
    """The largest allowed difference: 0 ("exact"), atol ("close"), or atol times the largest finite |wanted|
    ("relative")."""
    if compare == "exact":
        return 0.0
    if compare not in ("close", "relative") or atol is None:
        raise ParityError(f"tensors are compared as exact, close or relative (with atol), got {compare!r} and {atol}")
    if compare == "close":
        return atol
    finite = wanted.double()[wanted.isfinite()]
    return atol * float(finite.abs().max()) if finite.numel() else 0.0


def difference(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted|; equal infinities and NaN at the same place differ by nothing, NaN alone by infinity."""
    if not wanted.numel():
        return 0.0
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max())


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """How the official names and shapes of a checkpoint map onto our module and back; `parameters` as published."""

    name: str
    fit: Report
    parameters: int

    @property
    def ok(self) -> bool:
        return self.fit.ok and self.fit.parameters == self.parameters

    def __str__(self) -> str:
        counted = f"{self.fit.parameters:,} parameters"
        if self.fit.parameters != self.parameters:
            counted += f", where the official model has {self.parameters:,}"
        return f"{self.name}: {self.fit}{', both ways' if self.fit.ok else ''}; {counted}"


def map_keys(slug: str, file: str | Path) -> KeyReport:
    """Map a full-size key layout (.json) in both directions, without memory for values.

    Every official tensor must have a place, every parameter of ours a source, all shapes and the parameter count must
    be equal, and our names exported must give the layout again.
    """
    runner = _runner(slug)
    try:
        layout = json.loads(Path(file).read_text(encoding="utf-8"))
        name, stated = f"{layout['slug']}/{layout['preset']}", int(layout["parameters"])
        shapes = {key: tuple(shape) for key, (_, shape) in layout["tensors"].items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ParityError(f"{file} is no key layout: {type(error).__name__}: {error}") from error
    with torch.device("meta"):
        module, keys = runner.skeleton(layout)
    return KeyReport(name=name, fit=map_shapes(module, keys, shapes), parameters=stated)
