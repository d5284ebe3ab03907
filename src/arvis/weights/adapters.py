"""LoRA adapters on disk: one small safetensors file that knows its model and the weights it was trained on.

Tensors are NAME.down and NAME.up of each adapted layer, and parameters that were trained whole under their own names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from arvis.nn.lora import adapters, changed
from arvis.weights.files import metadata, read
from arvis.weights.keys import WeightsError

FORMAT = 1
_KEY = "arvis-lora"


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """What a file of adapters holds: `base` names the model, `fingerprint` the weights of its adapted layers."""

    system: str
    config: dict[str, Any]
    base: str
    fingerprint: str
    scale: float
    source: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers."""
        return [name.removesuffix(".down") for name in self.tensors if name.endswith(".down")]


def save_adapters(
    module: nn.Module,
    path: str | Path,
    *,
    system: str,
    config: Mapping[str, Any],
    base: str,
    scale: float,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapters of a module, and its other trainable parameters, whole or not at all.

    `base` is the name or folder of the model that was adapted, `config` the plain configuration of the result. Raises
    WeightsError where the file cannot be written.
    """
    path, layers = Path(path), adapters(module)
    tensors = {f"{name}.{half}": getattr(layer, half) for name, layer in layers.items() for half in ("down", "up")}
    tensors |= {name: p for name, p in module.named_parameters() if p.requires_grad and name not in tensors}
    header = {
        "format": FORMAT,
        "system": system,
        "config": config,
        "base": base,
        "fingerprint": fingerprint((name, layer.base.weight) for name, layer in layers.items()),
        "scale": scale,
        "source": dict(source or {}),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata={"format": "pt", _KEY: json.dumps(header)})
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"could not write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def holds_adapters(path: str | Path) -> bool:
    """Whether a path is a file of adapters."""
    return Path(path).is_file() and _KEY in metadata(path)


def read_adapters(path: str | Path) -> AdapterFile:
    """A file that `save_adapters` wrote; WeightsError for everything else."""
    if not Path(path).is_file():
        raise WeightsError(f"there is no file of adapters {path}")
    if not holds_adapters(path):
        raise WeightsError(f"{path} holds no LoRA adapters of arvis; `arvis finetune --lora 8` writes lora.safetensors")
    header = json.loads(metadata(path)[_KEY])
    if header.pop("format") > FORMAT:
        raise WeightsError(f"{path} is of a newer format than this arvis reads; upgrade arvis")
    return AdapterFile(**header, tensors=read(path))


def merged(own: Mapping[str, Tensor], found: AdapterFile, path: str | Path) -> dict[str, Tensor]:
    """The tensors `own` of the model that was adapted, with the adapters added and the whole parameters replaced.

    Raises WeightsError where a layer is missing, has another shape, or other weights than the adapters were made for.
    """
    layers = found.layers
    absent = next((name for name in layers if f"{name}.weight" not in own), None)
    if absent is not None:
        raise WeightsError(f"{path} adapts {absent}, which this model lacks; it was made for {found.base}")
    if (print_ := fingerprint((name, own[f"{name}.weight"]) for name in layers)) != found.fingerprint:
        raise WeightsError(
            f"{path} was made for the weights {found.fingerprint} of {found.base}, these are {print_}; load that model"
        )
    halves = {f"{name}.{half}" for name in layers for half in ("down", "up")}
    out = {**own, **{name: tensor for name, tensor in found.tensors.items() if name not in halves}}
    for name in layers:
        down, up = found.tensors[f"{name}.down"], found.tensors[f"{name}.up"]
        out[f"{name}.weight"] = changed(own[f"{name}.weight"], down, up, found.scale)
    return out


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Sixteen hexadecimal digits that weights, as float32, and their names determine."""
    digest = blake2b(digest_size=8)
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
