"""Where a model comes from: the package, a folder, the hub, official files; and the device it goes to."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arvis import systems
from arvis.config import from_dict
from arvis.weights import (
    SAME_NAMES,
    WeightsError,
    fetch,
    holds_adapters,
    load_official,
    merged,
    read,
    read_adapters,
    read_pretrained,
)

SHIPPED = Path(__file__).parent / "models"
"""Models that come with the package, one folder each."""

_log = logging.getLogger("arvis")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A system with its weights, its configuration and sampling settings, and where all this comes from."""

    system: Any
    slug: str
    name: str
    config: Any
    settings: Mapping[str, Any]
    source: Mapping[str, Any]


def from_folder(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    revision: str = "main",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Loaded:
    """A folder of ours, a safetensors file of one or of LoRA adapters to some model, or "owner/name" on the hub.

    Networks are built on the meta device; tensors stored in fewer bits are widened to float32. Raises WeightsError.
    """
    place, where = resolve_device(device), Path(path)
    if holds_adapters(where):
        base = read_adapters(where).base
        return with_adapters(by_name(base, device, cache_dir=cache_dir, local_files_only=local_files_only), where)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not where.exists():
        where = _from_hub(str(path), revision, cache_dir, local_files_only, token)
    found = read_pretrained(where)
    module = systems.system(found.system)
    config = from_dict(module.CONFIG, found.config)
    with torch.device("meta"):
        system = module.build(config)
    widened = {name: t.float() if t.is_floating_point() else t for name, t in found.tensors.items()}
    load_official(system, SAME_NAMES, widened, source=str(where))
    return Loaded(
        system=system.to(place),
        slug=found.system,
        name=found.source.get("name", where.name),
        config=config,
        settings=found.source.get("sampling") or {},
        source=found.source,
    )


def by_name(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    weights: Mapping[str, str | Path] | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Loaded:
    """A registered model, else a folder; `arvis.load` says the rest."""
    a_path = isinstance(name, Path) or "/" in name or "\\" in name
    try:
        slug, full, preset = systems.preset("" if a_path else str(name))
    except KeyError:
        if not a_path and not (name and Path(name).exists()):
            raise
        if weights:
            raise WeightsError(f"weights are for models by name, and {name} is a folder with its own") from None
        return from_folder(name, device, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    if (SHIPPED / full).is_dir() and not weights:
        return from_folder(SHIPPED / full, device)
    place = resolve_device(device)
    module, config = systems.system(slug), preset.config()
    files = {part: Path(path) for part, path in (weights or {}).items()}
    unknown = [part for part in files if part not in preset.files]
    if unknown:
        raise WeightsError(f"{full} has no part {unknown[0]!r}; its parts are {', '.join(preset.files) or 'none'}")
    if not preset.files:
        raise WeightsError(f"no weights of {full} are published: train it (arvis train {full}) and load its folder")
    absent = [path for path in files.values() if not path.exists()]
    if absent:
        raise WeightsError(f"there is no file {absent[0]}")
    if preset.licence:
        _log.info("%s: licence of the weights: %s", full, preset.licence)
    for part, file in preset.files.items():
        if part not in files:
            files[part] = fetch(
                file.repo,
                file.name,
                file.revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                sha256=file.sha256,
            )
    with torch.device("meta"):
        system = module.build(config)
    keys = module.keys(config)
    for part, path in files.items():
        load_official(system.parts()[part], keys[part], read(path, preset.files[part].inside), source=str(path))
    source = {"repo": ", ".join(sorted({f.repo for f in preset.files.values()})), "licence": preset.licence}
    return Loaded(system=system.to(place), slug=slug, name=full, config=config, settings=preset.sampling, source=source)


def with_adapters(model: Loaded, path: str | Path) -> Loaded:
    """A model with a file of LoRA adapters merged into its weights; `model` stays as it is. Raises WeightsError."""
    found = read_adapters(path)
    if found.system != model.slug:
        raise WeightsError(f"{path} was made for {found.base} ({found.system}), not for {model.name} ({model.slug})")
    module = systems.system(model.slug)
    config = from_dict(module.CONFIG, found.config)
    with torch.device("meta"):
        system = module.build(config)
    own = {name: t.cpu() for name, t in model.system.state_dict().items()}
    load_official(system, SAME_NAMES, merged(own, found, path), source=str(path))
    return Loaded(
        system=system.to(next(model.system.parameters()).device),
        slug=model.slug,
        name=found.source.get("name", model.name),
        config=config,
        settings=found.source.get("sampling") or model.settings,
        source=found.source,
    )


def picture_size(system: Any) -> tuple[int, int]:
    """(Y, X) pixels of the pictures of a system."""
    y, x = system.tokenizer.layout().levels[-1]
    return y * system.tokenizer.config.downsample, x * system.tokenizer.config.downsample


def resolve_device(device: str | torch.device) -> torch.device:
    """A device that is there; "auto" is a GPU where one is. ValueError otherwise."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {str(device)!r}; expected auto, cpu, cuda or cuda:0") from None
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"there is no {device} on this machine (`arvis doctor` says what there is); use cpu or auto")
    return found


def _from_hub(
    repo: str, revision: str, cache_dir: str | Path | None, local_files_only: bool, token: str | None
) -> Path:
    """The folder of a model of ours on the hub."""

    def get(file: str) -> Path:
        return fetch(repo, file, revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)

    try:
        found = get("config.json")
    except WeightsError as error:
        raise WeightsError(f"there is no folder {repo} here; on the hub: {error}") from error
    try:
        get("model.safetensors")
    except WeightsError:  # in shards, or not at all
        index = get("model.safetensors.index.json")
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            get(shard)
    return found.parent
