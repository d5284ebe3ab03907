"""Weights on disk: official files of any kind read safely, ours written in the hub's layout.

Ours is a folder of config.json and model.safetensors (shards and an index above 5 GB); the configuration also lies in
each file's metadata. Nothing is ever unpickled but tensors and plain values (`weights.plain`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arvis.weights.keys import WeightsError
from arvis.weights.plain import first_line, refuse_packed, unpickle

FORMAT = 1
SHARD_BYTES = 5_000_000_000
HEADER_BYTES = 25_000_000
"""No safetensors file has a longer header; what states one is something else, or hostile."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""Prefixes that parallel and compiling wrappers put before every name."""

INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
SINGLES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def read(path: str | Path, inside: str = "", prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file, a torch file, or a hub folder (shards by their index), on the CPU.

    `inside` says where in a torch file the tensors lie, dotted, with alternatives: "trainer.var_wo_ddp", "ema|model",
    "model|" (in "model", else at the top). Safetensors files are flat, so it does not matter there. Of the names, only
    those that begin with `prefix` are taken, without it; then wrappers' prefixes that all names have are removed.

    Raises WeightsError where the file is missing, truncated, something else than weights, or holds objects that could
    run code.
    """
    path = Path(path)
    if path.is_dir():
        tensors = _read_folder(path, inside)
    elif path.is_file():
        tensors = _read_file(path, inside)
    else:
        raise WeightsError(f"there is no file or folder {path}")
    if prefix:
        chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not chosen:
            raise WeightsError(
                f"{path} has no names that begin with {prefix}; the first is {next(iter(tensors), 'none')}"
            )
        tensors = chosen
    while tensors and (wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), "")):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _read_file(path: Path, inside: str) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    start = head.lstrip().lower()
    size = path.stat().st_size
    if not head:
        raise WeightsError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer of {size} bytes, not the weights; fetch the file itself (git lfs pull)"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page, not weights: probably an error page saved by a download; get it again"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < HEADER_BYTES:
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        refuse_packed(path)
        return _select(unpickle(path, mmap=True), inside, path)
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return _select(unpickle(path, mmap=False), inside, path)
    raise WeightsError(f"{path} is neither a safetensors nor a torch file: it begins with {head[:16]!r}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is a truncated or damaged safetensors file; get it again ({error})") from error


def _select(tree: Any, inside: str, path: Path) -> dict[str, Tensor]:
    """The state dict at the first of the places `inside` that exists."""
    for place in inside.split("|"):
        node = _at(tree, place)
        if node is None or (not place and inside and not _is_state_dict(node)):
            continue
        if not _is_state_dict(node):
            where = f"at {place} of {path}" if place else f"at the top of {path}"
            others = _places(tree)
            hint = f"; they lie at {', '.join(others)}: say inside={others[0]!r}" if others else ""
            raise WeightsError(f"there are no plain tensors {where}, but {_told(node)}{hint}")
        return {str(name): tensor for name, tensor in node.items()}
    others = _places(tree)
    raise WeightsError(
        f"{path} has nothing at {inside}; tensors lie at {', '.join(o or 'the top' for o in others) or 'no place'}"
    )


def _at(node: Any, place: str) -> Any:
    """The entry at a dotted place, whose parts may have dots themselves; None where there is none."""
    if not place:
        return node
    if not isinstance(node, Mapping):
        return None
    if place in node:
        return node[place]
    parts = place.split(".")
    for n in range(1, len(parts)):
        head = ".".join(parts[:n])
        if head in node and (found := _at(node[head], ".".join(parts[n:]))) is not None:
            return found
    return None


def _is_state_dict(node: Any) -> bool:
    return isinstance(node, Mapping) and bool(node) and all(isinstance(value, Tensor) for value in node.values())


def _places(node: Any, at: str = "", depth: int = 4) -> list[str]:
    """Where state dicts lie."""
    if _is_state_dict(node):
        return [at]
    if not isinstance(node, Mapping) or depth == 0:
        return []
    inner = ((str(name), value) for name, value in node.items() if isinstance(value, Mapping))
    return [place for name, value in inner for place in _places(value, f"{at}.{name}" if at else name, depth - 1)]


def _told(node: Any) -> str:
    if not isinstance(node, Mapping):
        return f"a {type(node).__name__}"
    if not node:
        return "nothing"
    name, value = next((item for item in node.items() if not isinstance(item[1], Tensor)), next(iter(node.items())))
    return f"a {type(value).__name__} named {name}"


def _read_folder(folder: Path, inside: str) -> dict[str, Tensor]:
    for name in INDEXES:
        if (folder / name).is_file():
            shards = read_index(folder / name)
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                if not (folder / shard).is_file():
                    raise WeightsError(f"{folder} lacks {shard}, which {name} lists; the download is incomplete")
                tensors |= _read_file(folder / shard, inside)
            absent = next((tensor for tensor in shards if tensor not in tensors), None)
            if absent is not None:
                raise WeightsError(f"{folder / shards[absent]} lacks {absent}, which {name} lists")
            return tensors
    for name in SINGLES:
        if (folder / name).is_file():
            return _read_file(folder / name, inside)
    raise WeightsError(f"{folder} has no weights; looked for {', '.join((*SINGLES, *INDEXES))}")


def read_index(path: Path) -> dict[str, str]:
    try:
        shards = json.loads(path.read_text())["weight_map"]
        if any(Path(shard).name != shard for shard in shards.values()):
            raise ValueError("it names files outside its folder")
        return shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is not an index of shards: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a folder or a single file of ours says of itself."""

    system: str
    config: dict[str, Any]
    source: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a folder or a single file of ours holds."""

    system: str
    config: dict[str, Any]
    source: dict[str, Any]
    tensors: dict[str, Tensor]


def save_pretrained(
    module: torch.nn.Module,
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    system: str,
    source: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    card: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a module in the hub's layout: config.json and model.safetensors, or shards of at most `shard_bytes`.

    `config` is the plain form of the system's configuration, `source` where the weights come from (repo, licence),
    `dtype` the number format of what is stored where it is another one, `card` a README.md. The folder appears whole or
    not at all; one that holds a model of ours is replaced, its other files stay. Raises WeightsError where the folder
    holds something else.
    """
    folder = Path(folder).resolve()
    header = {"library": "arvis", "format": FORMAT, "system": system, "config": config, "source": dict(source or {})}
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())):
        raise WeightsError(f"{folder} exists and holds no model of arvis; choose an empty or a new folder")
    text = json.dumps(header, indent=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)
        _write_text(partial / "config.json", text + "\n")
        if card:
            _write_text(partial / "README.md", card)
        about = {"format": "pt", "arvis": json.dumps(header)}
        _write_shards(partial, module.state_dict(), about, shard_bytes, dtype)
        _swap(partial, folder)
    except SafetensorError as error:
        raise WeightsError(f"could not write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_shards(
    folder: Path, state: Mapping[str, Tensor], about: dict[str, str], shard_bytes: int, dtype: torch.dtype | None
) -> None:
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor in state.items():
        size = tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):  # one shard after another, so that one lies in memory
        _save(storable({name: state[name] for name in names}, dtype), folder / file, about)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_text(folder / INDEXES[0], json.dumps(index, indent=2) + "\n")


def storable(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, contiguous, none in the memory of another (tied ones twice).

    Copies are made only where that is needed; `dtype` is the number format of floating ones.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        out[name] = plain
    return out


def _save(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that nobody but their owner can read
    save_file(tensors, path, metadata=about)
    path.chmod(mode)
    _flush(path)


def write(tensors: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write one safetensors file; it appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        _save(storable(tensors), partial)
        partial.replace(path)
    except SafetensorError as error:
        raise WeightsError(f"could not write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _swap(partial: Path, folder: Path) -> None:
    """Give the new folder its name; files of the old one that are not a model's, or are not new, move along."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        os.replace(old, folder)
        raise
    for entry in old.iterdir():
        of_model = re.fullmatch(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", entry.name)
        if not of_model and not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    shutil.rmtree(old)


def read_pretrained(path: str | Path) -> Pretrained:
    """A folder that `save_pretrained` wrote, or one of its safetensors files alone, which names its system itself.

    Raises WeightsError where it is not one of ours, of a newer format, or incomplete.
    """
    header = read_header(path)
    return Pretrained(system=header.system, config=header.config, source=header.source, tensors=read(path))


def read_header(path: str | Path) -> Header:
    """What such a folder or file says of itself, without its tensors. Raises WeightsError."""
    path = Path(path)
    if path.is_dir():
        try:
            text = (path / "config.json").read_text(encoding="utf-8")
        except OSError as error:
            raise WeightsError(f"{path} has no readable config.json, so it is no model of arvis") from error
    elif path.is_file():
        text = metadata(path).get("arvis", "")
        if not text:
            raise WeightsError(
                f"{path} does not say which system it is for; name one, or give a folder with a config.json"
            )
    else:
        raise WeightsError(f"there is no file or folder {path}")
    try:
        header = json.loads(text)
        library, number, system, config = (header[name] for name in ("library", "format", "system", "config"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"the configuration of {path} is not one of arvis: {first_line(error)}") from error
    if library != "arvis" or not isinstance(system, str) or not isinstance(config, dict):
        raise WeightsError(f"the configuration of {path} is not one of arvis: library is {library!r}")
    if not isinstance(number, int) or number > FORMAT:
        raise WeightsError(f"{path} has the format {number}, and this arvis reads up to {FORMAT}; upgrade arvis")
    return Header(system=system, config=config, source=header.get("source") or {})


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for a torch file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return {}
