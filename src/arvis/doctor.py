"""What arvis finds on this machine: versions, device, number format, compiler, extras, cache, room on the disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from arvis.training import compiled, precision

LITTLE_DISK = 5e9
"""Bytes free on a disk below which a warning is given: less than one larger official file."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found: under which heading, its name and value, and what to do about it where something is to be done.

    `broken` marks what keeps arvis from working; any other `fix` is advice.
    """

    heading: str
    name: str
    value: str
    fix: str = ""
    broken: bool = False


def examine(device: str = "auto", folder: str | Path = ".") -> list[Finding]:
    """All findings, for a device ("auto": the one that would be used) and the folder where pictures and runs would go.

    Takes about a second: the speed of number formats is measured. Asks no network.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return [*versions(), *hardware(torch.device(device)), *extras(), *storage(Path(folder))]


def versions() -> Iterator[Finding]:
    """Python, arvis, and the packages it cannot do without."""
    yield Finding(heading="versions", name="python", value=platform.python_version())
    yield Finding(
        heading="versions", name="system", value=f"{platform.system()} {platform.release()} {platform.machine()}"
    )
    yield Finding(heading="versions", name="arvis", value=_version("arvis") or "not installed, running from its folder")
    for name, least in _needed(""):
        found = _version(name)
        fix = "" if found and _at_least(found, least) else f"{sys.executable} -m pip install '{name}>={least}'"
        value = found or "missing"
        yield Finding(heading="versions", name=name, value=value, fix=fix, broken=bool(fix))


def hardware(device: torch.device) -> Iterator[Finding]:
    """The device, its number format and why, threads, memory, and whether code can be compiled."""
    if device.type == "cuda" and not torch.cuda.is_available():
        fix = "use --device cpu, or install a driver and a CUDA build of torch"
        yield Finding(heading="device", name="device", value=f"{device}: torch finds no GPU", fix=fix, broken=True)
        return
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        value = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    else:
        value = f"{device.type}: {_processor()}" if device.type == "cpu" else str(device)
    yield Finding(heading="device", name="device", value=value)
    chosen = precision.pick(device)
    yield Finding(heading="device", name="number format", value=chosen.reason)
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0)) if _linux() else os.cpu_count() or 1
    fix = f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down" if threads > cores else ""
    yield Finding(heading="device", name="threads", value=f"{threads} of {cores} usable cores", fix=fix)
    memory = _memory()
    if memory is not None:
        yield Finding(heading="device", name="memory", value=f"{memory / 2**30:.1f} GiB free")
    lack = compiled.missing(device)
    fix = "install g++ (Debian: apt-get install g++); without it everything runs, uncompiled" if lack else ""
    yield Finding(heading="device", name="compiler", value=lack or "torch.compile can be used", fix=fix)


def extras() -> Iterator[Finding]:
    """The optional groups of packages: which are there, and how to install the others."""
    try:
        names = metadata.metadata("arvis").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        names = []
    for extra in names:
        lacking = [f"{name}>={least}" if least else name for name, least in _needed(extra) if _version(name) is None]
        value = f"without {', '.join(lacking)}" if lacking else "installed"
        fix = f"{sys.executable} -m pip install 'arvis[{extra}]'" if lacking else ""
        yield Finding(heading="extras", name=extra, value=value, fix=fix)


def storage(folder: Path) -> Iterator[Finding]:
    """Where downloads are cached and pictures go, whether both can be written, and the room there."""
    from huggingface_hub import constants

    for name, path in (("cache", Path(constants.HF_HUB_CACHE)), ("folder", folder.resolve())):
        present = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(present).free
        fix = ""
        if not os.access(present, os.W_OK):
            elsewhere = "HF_HOME=folder" if name == "cache" else "another folder"
            fix = f"{present} cannot be written; use {elsewhere}"
        elif free < LITTLE_DISK:
            fix = "there is little room; large models need 2 to 40 GB each"
        yield Finding(heading="storage", name=name, value=f"{path}, {free / 1e9:.1f} GB free", fix=fix)
    if constants.HF_HUB_OFFLINE:
        yield Finding(heading="storage", name="network", value="HF_HUB_OFFLINE is set: nothing will be downloaded")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needed(extra: str) -> list[tuple[str, str]]:
    """(package, least version) of the core ("") or of an extra, from the installed metadata."""
    try:
        lines = metadata.requires("arvis") or []
    except metadata.PackageNotFoundError:
        return []
    out = []
    for line in lines:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\w.]+))?", line)
        of = re.search(r"extra == [\"'](\w+)[\"']", line)
        if found and found[1] != "arvis" and (of[1] if of else "") == extra:
            out.append((found[1], found[2] or ""))
    return out


def _at_least(version: str, least: str) -> bool:
    numbers = [tuple(int(n) for n in re.findall(r"\d+", text)[:3]) for text in (version.partition("+")[0], least)]
    return numbers[0] >= numbers[1]


def _linux() -> bool:
    return hasattr(os, "sched_getaffinity")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of memory that can be had, where the system says so."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
