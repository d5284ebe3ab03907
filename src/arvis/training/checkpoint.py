"""Checkpoints of a run: one folder per step, written whole or not at all, of safetensors and JSON only.

    RUN/checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  ema.safetensors  state.json

A run sharded over ranks has `shards/*.safetensors` in place of the three. A folder gets its name by one rename after
all its files are on the disk, so a killed process leaves either a complete checkpoint or a `.partial-*` folder that the
next save removes. `state.json` holds the CRC-32 of every file. Nothing here unpickles.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arvis.training.distributed import ALONE, Ranks, names, place
from arvis.training.distributed import load as load_shards
from arvis.training.distributed import read as read_shards
from arvis.training.distributed import save as save_shards

_log = logging.getLogger("arvis")
_PARTS = ("model", "optimizer", "ema")


class CheckpointError(OSError):
    """A checkpoint that could not be written or read."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved moment: `step` updates are done; `state` is the plain rest (config, seed, best metrics, ...)."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Any]


def paths(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, complete or not."""
    found = [p for p in (Path(run) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
    ranks: Ranks = ALONE,
    sharded: bool = False,
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`; the older ones stay until it is complete.

    Every rank calls it; rank 0 writes, and with `sharded` each rank its shards. Raises CheckpointError, with the
    previous checkpoint intact, where the disk is full or cannot be written.
    """
    folder = Path(run) / "checkpoints"
    target, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    parts = dict(zip(_PARTS, (model, optimizer, ema), strict=True))
    try:
        if ranks.first:
            for left in folder.glob(".partial-*"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        if sharded:
            ranks.barrier()
            save_shards(partial / "shards", {f"{p}/{name}": t for p, own in parts.items() for name, t in own.items()})
            ranks.barrier()
        if ranks.first:
            for part, tensors in parts.items() if not sharded else ():
                save_file(storable(tensors), partial / f"{part}.safetensors", metadata={"format": "pt"})
            files = sorted(partial.rglob("*.safetensors"))
            for file in files:
                file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
                _flush(file)
            sums = {str(file.relative_to(partial)): checksum(file) for file in files}
            write_text(partial / "state.json", json.dumps({"step": step, "crc32": sums, **state}, indent=1))
            if target.exists():  # a damaged one
                shutil.rmtree(target)
            os.replace(partial, target)
            _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, target, paths(run)) from error
    if ranks.first:
        for old in paths(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def verify(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose files are all there and unaltered; CheckpointError otherwise."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name, crc in state.pop("crc32").items():
            if checksum(path / name) != crc:
                raise CheckpointError(f"{path / name} does not match its checksum: truncated or altered since")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    return state


def load(path: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None) -> Checkpoint:
    """Read one checkpoint, whole or sharded, onto the CPU, or as the tensors of `into` (model, optimizer, ema) lie.

    Shards are read straight into `into`. Raises CheckpointError where a file is missing, truncated or altered.
    """
    return _read(Path(path), verify(Path(path)), into)


def latest(
    run: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None, ranks: Ranks = ALONE
) -> Checkpoint | None:
    """The newest readable checkpoint of a run, or None where it has none; a damaged one is passed over with a log line.

    Rank 0 chooses it. Raises CheckpointError where checkpoints exist and none can be read.
    """
    chosen = ranks.share(_newest(run) if ranks.first else None)
    return None if chosen is None else _read(*chosen, into)


def _newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    found = paths(run)
    for path in reversed(found):
        try:
            return path, verify(path)
        except CheckpointError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {Path(run) / 'checkpoints'} can be read")
    return None


def _read(path: Path, state: dict[str, Any], into: Mapping[str, Mapping[str, Tensor]] | None) -> Checkpoint:
    try:
        if (path / "shards").is_dir():
            wanted = {f"{p}/{name}": t for p, own in (into or {}).items() for name, t in own.items()}
            flat = load_shards(path / "shards", wanted) if into else read_shards(path / "shards")
            unknown = [name for name in names(path / "shards") if name.startswith("model/") and name not in flat]
            if unknown:
                raise CheckpointError(f"{path} has a tensor {unknown[0][6:]} that the model lacks")
            cut = {p: len(p) + 1 for p in _PARTS}
            parts = {p: {n[cut[p] :]: t for n, t in flat.items() if n.startswith(f"{p}/")} for p in _PARTS}
        else:
            parts = {p: load_file(path / f"{p}.safetensors") for p in _PARTS}
            for p, own in (into or {}).items():
                parts[p] = {name: place(t, own[name]) if name in own else t for name, t in parts[p].items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    return Checkpoint(path=path, step=int(state["step"]), state=state, **parts)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as safetensors asks for; tied weights are stored twice."""
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"a checkpoint holds tensors only, {name} is a {type(tensor).__name__}")
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored


def checksum(file: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all: a temporary file in the same folder, then one rename."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def assign(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load weights strictly. Raises CheckpointError naming the first missing, unknown or misshapen tensor."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"{source} lacks the tensor {name} of the model; is it from another model?")
        if name not in own:
            raise CheckpointError(f"{source} has a tensor {name} that the model lacks; is it from another model?")
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
            raise CheckpointError(f"{source}: {name} has the shape {shapes}")
    module.load_state_dict(dict(tensors))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: Exception, target: Path, good: list[Path]) -> CheckpointError:
    kept = f"the checkpoint {good[-1]} is intact" if good else "there is no earlier checkpoint"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC or "os error 28" in str(error) or "No space left" in str(error):
        free = shutil.disk_usage(next(p for p in target.parents if p.exists())).free
        text = f"the disk is full ({free / 1e6:.0f} MB free), could not write {target}; {kept}"
        return CheckpointError(errno.ENOSPC, f"{text}. Free some space and resume")
    return CheckpointError(f"could not write {target}: {error}; {kept}")
