"""Where a model comes from: the package, a folder, the hub, official files; and the device it goes to."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arvis import systems
from arvis.config import from_dict
from arvis.published import Preset
from arvis.state import Compilable
from arvis.training import compiled
from arvis.weights import (
    SAME_NAMES,
    Hub,
    Official,
    WeightsError,
    affordable,
    holds_adapters,
    load_official,
    locate,
    merged,
    read,
    read_adapters,
    read_header,
    takes,
)
from arvis.weights.official import listed, room_on_disk, summed

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
    anyway: bool = False,
) -> Loaded:
    """A folder of ours, a safetensors file of one or of LoRA adapters to some model, or "owner/name" on the hub.

    Networks are built on the meta device; tensors stored in fewer bits are widened to float32. Raises WeightsError.
    """
    place, where = resolve_device(device), Path(path)
    if holds_adapters(where):
        options = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token, "anyway": anyway}
        return with_adapters(by_name(read_adapters(where).base, device, **options), where)
    hub = None
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not where.exists():
        refuse_official_repository(str(path))
        hub = Hub(cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        try:
            where = hub.fetch(hub.find(str(path), "config.json", revision)).parent
        except WeightsError as error:
            raise WeightsError(f"there is no folder {path} here; on the hub: {error}") from error
    found = read_header(where)
    config = from_dict(systems.system(found.system).CONFIG, found.config)
    system = empty(found.system, config)
    if hub is not None:
        files = hub.find(str(path), "", revision)
        licence = found.source.get("licence") or "unknown"
        _log.info("%s, licence %s: %s%s", path, licence, listed(files, files[0].name), summed(files, hub))
        _log.info("%s: %s", path, takes(system, place))
        if not anyway:
            room_on_disk(str(path), files, hub)
    if not anyway:
        affordable(str(path), system, place)
    if hub is not None:
        hub.fetch(files)
    load_official(system, SAME_NAMES, read(where), source=str(where), device=place)
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
    weights: Mapping[str, str | Path] | str | Path | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    anyway: bool = False,
) -> Loaded:
    """A registered model, else a folder; `arvis.load` says the rest."""
    hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    a_path = isinstance(name, Path) or "/" in name or "\\" in name
    try:
        slug, full, preset = systems.preset("" if a_path else str(name))
    except KeyError:
        if not a_path and not (name and Path(name).exists()):
            raise
        if weights:
            raise WeightsError(f"weights are for models by name, and {name} is a folder with its own") from None
        return from_folder(name, device, **hub, anyway=anyway)
    if (SHIPPED / full).is_dir() and not weights:
        return from_folder(SHIPPED / full, device)
    found = published(slug, full, preset, device, Hub(**hub), weights, anyway)
    found.fill(found.fetch(), resolve_device(device))
    return Loaded(
        system=found.system,
        slug=slug,
        name=full,
        config=found.config,
        settings=preset.sampling,
        source=found.source(),
    )


def published(
    slug: str,
    name: str,
    preset: Preset,
    device: str | torch.device,
    hub: Hub,
    weights: Mapping[str, str | Path] | str | Path | None = None,
    anyway: bool = False,
) -> Official:
    """The official weights of a preset, found, told in the log, and not yet fetched.

    Raises WeightsError where there are none, or where they cannot fit (but `anyway`).
    """
    if not preset.files:
        raise WeightsError(f"no weights of {name} are published: train it (arvis train {name}) and load its folder")
    place, module, config = resolve_device(device), systems.system(slug), preset.config()
    system = empty(slug, config)
    if not anyway:
        affordable(name, system, place)
    found = locate(slug, name, preset, config, system, module.keys(config), hub, weights)
    for line in found.lines(place):
        _log.info("%s", line)
    if not anyway:
        room_on_disk(name, found.remotes, hub)
    return found


def refuse_official_repository(name: str) -> None:
    """WeightsError with the names of the models whose official files a hub repository holds; there are several in one,
    and none of them says which. A model that borrows its tokenizer from there is none of them."""
    presets = {n: p for slug in systems.SYSTEMS for n, p in getattr(systems.system(slug), "PRESETS", {}).items()}

    def own(preset: Preset) -> set[str]:
        return {file.repo for part, file in preset.files.items() if part != "tokenizer" or len(preset.files) == 1}

    names = [n for n, preset in presets.items() if name in own(preset)]
    if names:
        raise WeightsError(f"{name} holds the official files of {', '.join(names)}: load one of these by its name")


def with_adapters(model: Loaded, path: str | Path) -> Loaded:
    """A model with a file of LoRA adapters merged into its weights; `model` stays as it is. Raises WeightsError."""
    found = read_adapters(path)
    if found.system != model.slug:
        raise WeightsError(f"{path} was made for {found.base} ({found.system}), not for {model.name} ({model.slug})")
    config = from_dict(systems.system(model.slug).CONFIG, found.config)
    system = empty(model.slug, config)
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


def compile_steps(system: Any, name: str) -> None:
    """Let the steps of a system run as one compiled graph, where the machine can compile. ValueError for a system whose
    steps have no one shape."""
    device = next(system.parameters()).device
    if not isinstance(system, Compilable):
        raise ValueError(f"compile is for systems of one code per step, and {name} is none: leave it out")
    if lack := compiled.missing(device):
        _log.warning("torch.compile is off: %s; steps run as they are", lack)
    else:
        system.compile_step()


def empty(slug: str, config: Any) -> Any:
    """The network of a configuration without values, on the meta device."""
    with torch.device("meta"), _Valueless():
        return systems.system(slug).build(config)


class _Valueless(TorchFunctionMode):
    """Draws nothing on the meta device: there are no values, but asking for them imports a second of compiler.

    Numbers that a network makes on the host while it is built are drawn as ever.
    """

    DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS and (tensor := (*args, *kwargs.values())[0]).is_meta:
            return tensor
        return func(*args, **kwargs)
