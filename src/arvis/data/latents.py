"""What training needs of pictures, encoded once and kept on disk: codes, bits, moments.

    FOLDER/KEY/part-00000.safetensors ..    PART items each: latents and class_labels as tensors, prompts in the header

Every part is written whole or not at all, so that a killed process goes on with the parts that are missing, and several
processes share the work. Parts are mapped into memory when they are read. The key says what they depend on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arvis.data.batches import Batches, Dataset, collate
from arvis.training.distributed import ALONE, Ranks

PART = 1024
ROWS = 32
"""Pictures that are encoded together."""

OnPicture = Callable[[int, int], object]
"""Told how many pictures of how many are encoded."""

Encode = Callable[[Tensor], dict[str, Tensor]]


@runtime_checkable
class Encodes(Protocol):
    """A system that says what of pictures can be stored."""

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """Entries [B, ...] that stand for "image" [B, 3, Y, X] in a training batch."""
        ...


class Latents:
    """The batches of `Batches`, with the stored latents of its pictures instead of "image"."""

    def __init__(self, batches: Batches, parts: Sequence[Path]) -> None:
        self._batches = batches
        self._parts = [load_file(path) for path in parts]  # mapped: nothing is read before it is asked for
        self._prompts = [prompt for path in parts for prompt in _prompts(path)]

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of `step`; codes are int64 whatever they are stored as."""
        rows = self._batches.indices_at(step)
        items = [{name: t[row % PART] for name, t in self._parts[row // PART].items()} for row in rows]
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        wide = {name: t if t.is_floating_point() else t.long() for name, t in stacked.items()}
        return {**wide, "prompt": [self._prompts[row] for row in rows]}


def encode_once(
    batches: Batches,
    encode: Encode,
    folder: Path,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    on_picture: OnPicture | None = None,
) -> Latents:
    """The latents of all items of a data set, read from `folder` where they are there, else encoded into it.

    Folders beside it are removed: they are those of other pictures or weights. Raises OSError where the disk is full or
    will be.
    """
    dataset, count = batches.dataset, -(-len(batches.dataset) // PART)
    paths = [folder / f"part-{k:05d}.safetensors" for k in range(count)]
    if ranks.first:
        for other in folder.parent.glob("*") if folder.parent.is_dir() else ():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):
            left.unlink()
    ranks.barrier()
    own = [k for k in range(ranks.rank, count, ranks.world) if not paths[k].is_file()]
    for k in own:
        _write(paths[k], dataset, range(k * PART, min((k + 1) * PART, len(dataset))), encode, device, on_picture)
        if k == own[0]:
            _affordable(paths[k], (len(own) - 1) * ranks.world)
    ranks.barrier()
    return Latents(batches, paths)


def key(*parts: str | Tensor) -> str:
    """Sixteen hexadecimal digits that texts and tensors determine."""
    digest = blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()


@torch.no_grad()
def _write(
    path: Path,
    dataset: Dataset,
    items: range,
    encode: Encode,
    device: torch.device | str,
    on_picture: OnPicture | None,
) -> None:
    """One part, whole or not at all."""
    found: list[dict[str, Tensor]] = []
    prompts: list[str] = []
    for first in range(items.start, items.stop, ROWS):
        rows = range(first, min(first + ROWS, items.stop))
        batch = collate([dataset[i] for i in rows])
        latents = encode(batch["image"].to(device))
        found.append({**{name: t.cpu() for name, t in latents.items()}, "class_labels": batch["class_labels"]})
        prompts += batch["prompt"]
        if on_picture is not None:
            on_picture(rows.stop, len(dataset))
    tensors = {name: _narrow(torch.cat([part[name] for part in found])) for name in found[0]}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"prompts": json.dumps(prompts)})
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        full = "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        why = "the disk is full" if full else str(error)
        raise OSError(
            errno.ENOSPC if full else errno.EIO,
            f"{why}: could not write the encoded pictures to {path}; --set cache=off encodes them batch by batch",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _affordable(part: Path, more: int) -> None:
    """OSError where as many further parts of the size of this one will not fit on the disk."""
    needed, free = part.stat().st_size * more, shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: the encoded pictures take {needed / 1e9:.1f} GB more in {part.parent}, and "
            f"{free / 1e9:.1f} are free; --set cache=off encodes them batch by batch",
        )


def _narrow(values: Tensor) -> Tensor:
    """Integers in the smallest type that holds them."""
    if values.is_floating_point() or not values.numel():
        return values.contiguous()
    low, high = int(values.min()), int(values.max())
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return values.to(next(k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max)).contiguous()


def _prompts(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prompts"])
