"""The official weights of a model: where each part lies, what it takes to have them, and the model filled with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from arvis.published import File, Preset
from arvis.weights.files import read
from arvis.weights.hub import Hub, Remote, checksum
from arvis.weights.keys import Key, WeightsError, load_official
from arvis.weights.memory import free_disk, takes, told

Place = Path | tuple[Remote, ...]
"""A file or folder on this machine, or files on the hub (a folder's index and shards)."""


@dataclass(frozen=True, kw_only=True)
class Official:
    """The weights of a preset before they are here. `system` is its empty network on the meta device, `text` the files
    of the text encoder that its prompts will need."""

    slug: str
    name: str
    preset: Preset
    config: Any
    system: Any
    keys: Mapping[str, Sequence[Key]]
    places: Mapping[str, Place]
    text: tuple[Remote, ...]
    hub: Hub

    def lines(self, device: torch.device | str = "cpu") -> list[str]:
        """What will be downloaded, of what licence, and what it takes, in a line each."""
        parts = [
            f"{part} from {place}" if isinstance(place, Path) else listed(place, self.preset.files[part].name)
            for part, place in self.places.items()
        ]
        first = f"{self.name}, licence {self.preset.licence or 'unknown'}: {', '.join(parts)}"
        out = [first + summed(self.remotes, self.hub), f"{self.name}: {takes(self.system, device)}"]
        if self.preset.text:
            size = sum(remote.size for remote in self.text)
            there = bool(self.text) and not any(remote.to_download for remote in self.text)
            when = "in the cache" if there else "fetched when the first prompt comes"
            out.append(f"{self.name}: {self.preset.text}{f', {told(size)},' if size else ''} reads the prompts; {when}")
        return out

    @property
    def remotes(self) -> tuple[Remote, ...]:
        return tuple(r for place in self.places.values() if not isinstance(place, Path) for r in place)

    def fetch(self) -> dict[str, Path]:
        """The files of all parts, downloaded where they are not here yet. Raises WeightsError."""
        out = {}
        for part, place in self.places.items():
            try:
                out[part] = place if isinstance(place, Path) else self.hub.fetch(place)
            except WeightsError as error:
                raise by_hand(error, self.name, part) from error
        return out

    def fill(self, files: Mapping[str, Path], device: torch.device | str = "cpu") -> None:
        """Put the weights into the network, part by part, tensor by tensor on `device`. Raises WeightsError."""
        for part, path in files.items():
            tensors = read(path, self.preset.files[part].inside)
            load_official(self.system.parts()[part], self.keys[part], tensors, source=str(path), device=device)
        self.system.to(device)

    def source(self, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """Where the weights come from, as the configuration of a saved model says it.

        With the fetched `files`, with the checksum of each; WeightsError where it is not the one that the hub states.
        """
        rows: list[dict[str, str]] = []
        for part, place in self.places.items():
            here = files[part] if files else None
            if isinstance(place, Path):
                inside = sorted(place.iterdir()) if place.is_dir() else [place]
                found = [({"file": path.name}, path) for path in inside if path.is_file()]
            else:
                found = [
                    (
                        {"file": f"{r.repo}/{r.name}", "revision": r.commit, "sha256": r.sha256},
                        here / PurePosixPath(r.name).name if here and here.is_dir() else here,
                    )
                    for r in place
                ]
            for row, path in found:
                if files and path:
                    row["sha256"] = _checked(path, row.get("sha256", ""))
                rows.append({"part": part, **{name: value for name, value in row.items() if value}})
        repos = ", ".join(sorted({file.repo for file in self.preset.files.values()}))
        return {"repo": repos, "licence": self.preset.licence, "files": rows}


def _checked(path: Path, stated: str) -> str:
    found = checksum(path)
    if stated not in ("", found):
        raise WeightsError(f"{path} has the checksum {found}, and the hub says {stated}: delete it and try again")
    return found


def locate(
    slug: str,
    name: str,
    preset: Preset,
    config: Any,
    system: Any,
    keys: Mapping[str, Sequence[Key]],
    hub: Hub,
    weights: Mapping[str, str | Path] | str | Path | None = None,
) -> Official:
    """Find the weights of a preset: those of `weights` on this machine, the others on the hub.

    `weights` are files by part, or one file or folder with official names. Nothing large is downloaded. Raises
    WeightsError where a file is not there or it is not clear which part it is.
    """
    places: dict[str, Place] = dict(given(name, preset.files, weights))
    asked = False
    for part, file in preset.files.items():
        if part not in places:
            try:
                places[part], asked = hub.find(file.repo, file.name, file.revision, file.sha256), True
            except WeightsError as error:
                raise by_hand(error, name, part) from error
    text: tuple[Remote, ...] = ()
    if preset.text:
        try:
            text = (hub if asked else Hub(cache_dir=hub.cache, local_files_only=True)).find(preset.text, "")
        except WeightsError:  # its own loader will say it when it is needed
            text = ()
    ordered = {part: places[part] for part in preset.files}
    return Official(
        slug=slug,
        name=name,
        preset=preset,
        config=config,
        system=system,
        keys=keys,
        places=ordered,
        text=text,
        hub=hub,
    )


def given(
    name: str, files: Mapping[str, File], weights: Mapping[str, str | Path] | str | Path | None
) -> dict[str, Path]:
    """Official files on this machine by part. Raises WeightsError where one is absent, or of no part."""
    if weights is None:
        return {}
    if not isinstance(weights, str | Path):
        unknown = [part for part in weights if part not in files]
        if unknown:
            raise WeightsError(f"{name} has no part {unknown[0]!r}; its parts are {', '.join(files) or 'none'}")
        return {part: _in(Path(path), files[part]) for part, path in weights.items()}
    path = Path(weights)
    if not path.exists():
        raise WeightsError(f"there is no file {path}")
    for part, file in files.items():
        if path.name == PurePosixPath(file.name).name or path.stem == part:
            return {part: path}
    if path.is_dir():
        names = {
            part: (file.name, PurePosixPath(file.name).name, f"{part}.safetensors") for part, file in files.items()
        }
        found = {
            part: path / option
            for part, options in names.items()
            for option in reversed(options)
            if (path / option).exists()
        }
        if not found:
            looked = ", ".join(dict.fromkeys(option for options in names.values() for option in options[1:]))
            raise WeightsError(f"{path} has none of the files of {name}; looked for {looked}")
        return found
    if len(files) == 1:
        return dict.fromkeys(files, path)
    named = " or ".join(f'{{"{part}": "{path}"}}' for part in files)
    known = ", ".join(file.name for file in files.values())
    raise WeightsError(f"{path.name} is no official file of {name} ({known}): say which part it is, weights={named}")


def _in(path: Path, file: File) -> Path:
    """The file itself, or the one with the official name in a folder."""
    if not path.exists():
        raise WeightsError(f"there is no file {path}")
    inside = path / PurePosixPath(file.name).name
    return inside if path.is_dir() and inside.exists() else path


def by_hand(error: WeightsError, name: str, part: str) -> WeightsError:
    """An error of the hub, with the way around it."""
    return WeightsError(
        f"{error}; or give the file on disk: arvis convert {name} FOLDER --weights {part}=FILE, in Python "
        f'weights={{"{part}": FILE}}'
    )


def listed(found: Sequence[Remote], name: str) -> str:
    """A file, or a folder as one item, with its size and what of it is here."""
    size, rest = sum(r.size for r in found), sum(r.to_download for r in found)
    here = " (in the cache)" if not rest else f" ({told(size - rest)} of it here)" if rest < size else ""
    return f"{found[0].repo}/{name} {told(size)}{here}"


def summed(found: Sequence[Remote], hub: Hub) -> str:
    """How much of it is to be downloaded, and where to."""
    rest, free = sum(r.to_download for r in found), free_disk(hub.cache)
    if not rest:
        return ""
    return f"; {told(rest)} to download to {hub.cache}" + (f", where {told(free)} are free" if free is not None else "")


def room_on_disk(name: str, found: Sequence[Remote], hub: Hub) -> None:
    """WeightsError where what is to be downloaded does not fit on the disk."""
    rest, free = sum(r.to_download for r in found), free_disk(hub.cache)
    if free is not None and rest > free:
        raise WeightsError(
            f"{told(rest)} of {name} are to be downloaded and {told(free)} are free in {hub.cache}: free some space, "
            "or keep the cache elsewhere (cache_dir=FOLDER, or HF_HOME=FOLDER in the environment); anyway=True tries it"
        )
