"""What a model takes and what the machine has: bytes of memory and of disk."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from arvis.weights.keys import WeightsError


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones once; also on the meta device."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def free_memory(
    device: torch.device | str = "cpu",
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes that can still be had on a device without swapping; None where the system does not say.

    On the host, what Linux calls available, or less where a container has a limit of its own.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_available(meminfo), _left_in_container(cgroup)]
    return min((free for free in found if free is not None), default=None)


def _available(meminfo: Path) -> int | None:
    try:
        if line := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE):
            return int(line[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # not Linux
        return None


def _left_in_container(cgroup: Path) -> int | None:
    """What the limit of a control group leaves; the file cache it counts is given back when needed."""
    names = ("max", "current"), ("limit_in_bytes", "usage_in_bytes")
    for folder, (most, used) in zip((cgroup, cgroup / "memory"), names, strict=True):
        try:
            limit, taken = (int((folder / f"memory.{name}").read_text()) for name in (most, used))
            stat = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
        cached = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
        return max(limit - max(taken - cached, 0), 0)
    return None


def free_disk(folder: str | Path) -> int | None:
    """Bytes free where a folder lies, or will lie; None where the system does not say."""
    for place in (Path(folder).absolute(), *Path(folder).absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def told(count: int) -> str:
    """Bytes in words, in powers of 1000 as the hub counts: "8.04 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


def takes(module: nn.Module, device: torch.device | str = "cpu") -> str:
    """What a module takes on a device, and what is free there, in words."""
    parameters = sum(p.numel() for p in module.parameters())
    formats = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    free, where = free_memory(device), "" if torch.device(device).type == "cpu" else f" of {device}"
    left = "" if free is None else f"; {told(free)}{where} are free"
    size = told(tensor_bytes(module))
    return f"{parameters / 1e6:,.1f} M parameters take {size} of memory in {', '.join(sorted(formats))}{left}"


def affordable(name: str, module: nn.Module, device: torch.device | str = "cpu") -> None:
    """WeightsError, with numbers and what to do, where a module cannot fit in the memory of a device."""
    needed, free = tensor_bytes(module), free_memory(device)
    if free is not None and needed > free:
        where = "memory" if torch.device(device).type == "cpu" else f"the memory of {device}"
        raise WeightsError(
            f"{name} takes {told(needed)} of {where} and {told(free)} are free: close what else uses it, or take a "
            "smaller model (arvis systems) or another device; anyway=True (arvis convert --anyway) tries it"
        )
