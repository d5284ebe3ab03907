"""A stage is a module to train: which part of a system learns, by which loss, and what its pictures show.

TokenizerStage    pictures -> tokens -> pictures: the tokenizer learns
GeneratorStage    the system's own loss on the tokens of the frozen tokenizer: everything else learns
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from arvis import systems
from arvis.config import from_dict
from arvis.data.batches import Batches, BatchesConfig, Dataset
from arvis.data.images import grid, save_image, to_bytes
from arvis.evaluation.metrics import psnr
from arvis.nn.lora import adapt
from arvis.noise import Noise
from arvis.recipes.request import TrainRequest
from arvis.state import Staged
from arvis.training.adversarial import Adversary, AdversaryConfig
from arvis.training.optimizers import Part
from arvis.training.perceptual import perceptual
from arvis.training.tokenizer_losses import tokenizer_loss
from arvis.walk import finish, generate

SHOWN = 12
"""Pictures in a sample sheet."""
MEASURED = 64
"""Pictures on which a stage is measured while it is trained, of those it learns from and of those held out."""


@runtime_checkable
class Begins(Protocol):
    """A system whose training has stages of its own: what it does to its parameters before the first update."""

    def begin_(self) -> None: ...


class TokenizerStage(nn.Module):
    """Reconstruction of pictures: pixel, quantiser, perceptual and adversarial terms, with codebook upkeep."""

    def __init__(self, system: Any, request: TrainRequest, batches: Batches, heldout: Dataset | None = None) -> None:
        super().__init__()
        self.tokenizer, self._system, first = system.tokenizer, [system], batches.batch_at(0)["image"]
        self.adversary = Adversary(AdversaryConfig(start=request.gan_start)) if request.gan_start >= 0 else None
        self.parts = (Part(names=("adversary.",), loss="loss_adversary"),) if self.adversary else ()
        self._config, self._shown = request.loss, first[:SHOWN]
        if request.freeze or request.only:
            self._config = replace(request.loss, revive_every=0)  # tokens keep their meaning
        if request.init is None:
            with torch.no_grad():
                layout = self.tokenizer.layout(tuple(first.shape[2:]))
                self.tokenizer.init_(self.tokenizer.features(first), layout, Noise.of(request.fit.seed))
        self._perceptual = [perceptual(request.lpips)] if request.lpips else []  # in a list: no part of checkpoints
        self._measured = _measured(batches.dataset, heldout)

    @property
    def system(self) -> Any:
        """The whole system; only its tokenizer is part of this module."""
        return self._system[0]

    tokens = 0

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [self.tokenizer.encoder, self.tokenizer.decoder]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        measure = next((m.to(batch["image"].device) for m in self._perceptual), None)
        return tokenizer_loss(self.tokenizer, batch, noise, self._config, batch["step"], measure, self.adversary)

    def draw(self, step: int, folder: Path) -> dict[str, float]:
        """Pictures of the first batch above their reconstructions; PSNR of pictures seen and held out."""
        x = self._shown.to(next(self.parameters()).device)
        save_image(grid(torch.cat((x, reconstruction(self.tokenizer, x))), len(x)), folder / f"{step:06}.png")
        return {f"psnr_{name}": self._psnr(batches) for name, batches in self._measured.items()}

    def _psnr(self, batches: Batches) -> float:
        x = batches.batch_at(0)["image"]
        return float(torch.cat([reconstruction_psnr(self.tokenizer, part) for part in x.split(SHOWN)]).mean())


class GeneratorStage(nn.Module):
    """The system's own loss on the tokens of its frozen tokenizer, with adapters where the request has a rank."""

    parts: tuple[Part, ...] = ()

    def __init__(self, system: Any, request: TrainRequest, batches: Batches, heldout: Dataset | None = None) -> None:
        super().__init__()
        self.system, first = system, batches.batch_at(0)
        self._more = {"levels": request.levels} if request.levels else {}
        self._objective = objective(request, system)
        self._sampling = sampling(system, request.sampling or {})
        self._shown = {"prompt": first["prompt"][:SHOWN], "class_labels": first["class_labels"][:SHOWN]}
        system.tokenizer.requires_grad_(False)
        _begin(system)
        if request.lora.rank:
            adapt(system, request.lora, self.blocks(system))
        if classes := getattr(batches.dataset, "classes", ()):  # the last label of the data, before the first step
            system.prepare({"prompt": [""], "class_labels": [len(classes) - 1]})
        self._measured = _measured(batches.dataset, heldout)

    @property
    def tokens(self) -> int:
        """Tokens of a picture, of the levels that are learned."""
        sizes = self.system.tokenizer.layout().sizes
        return sum(sizes[: self._more.get("levels", len(sizes))])

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [part for name, part in self.system.parts().items() if name != "tokenizer"]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return self._objective(self.system, {**batch, **self._more}, noise)

    def draw(self, step: int, folder: Path) -> dict[str, float]:
        """A picture for each condition of the first batch, always from the same seeds; the loss on pictures seen and
        held out, with the same noise each time."""
        device = next(self.parameters()).device
        noise = Noise.of(0, len(self._shown["prompt"]), device)
        last = finish(generate(self.system, self.system.prepare(self._shown), self._sampling, noise))
        save_image(grid(self.system.tokenizer.decode(last.tokens, last.layout), 6), folder / f"{step:06}.png")
        return {f"loss_{name}": self._loss(batches, device) for name, batches in self._measured.items()}

    def _loss(self, batches: Batches, device: torch.device) -> float:
        batch, total = batches.batch_at(0), 0.0
        rows = torch.arange(len(batch["prompt"]))
        for part in rows.split(SHOWN):
            taken = {n: v[part].to(device) if isinstance(v, Tensor) else [v[i] for i in part] for n, v in batch.items()}
            total += float(self.loss(taken, Noise((1 + part).to(device)))["loss"]) * len(part)
        return total / len(rows)


def objective(request: TrainRequest, system: Any) -> Callable[[Any, dict[str, Any], Noise], dict[str, Tensor]]:
    """The loss of a generator: its own, or that of the method that the request names.

    Raises KeyError for an unknown name, ValueError where it is no training method, or none for this system.
    """
    if not request.objective:
        return lambda system, batch, noise: system.loss(batch, noise)
    name, *settings = request.objective
    method = getattr(systems.system(name), "objective", None)
    if method is None:
        raise ValueError(f"objective is the name of a training method, and {name!r} is none")
    if not isinstance(system, Staged):
        raise ValueError(f"{name} trains models over scales that run on any inputs, and {request.name} is none")
    return method(settings)


def _begin(system: object) -> None:
    if isinstance(system, Begins):
        system.begin_()


def sampling(system: Any, settings: Any) -> Any:
    """Sampling settings of a system, those among `settings` that it knows."""
    known = {f.name for f in fields(system.Sampling)}
    return from_dict(system.Sampling, {name: value for name, value in settings.items() if name in known})


@torch.no_grad()
def reconstruction_psnr(tokenizer: Any, x: Tensor) -> Tensor:
    """PSNR in dB, at most 99, of what a tokenizer keeps of each picture [B, 3, Y, X] in [-1, 1]."""
    x = x.to(next(tokenizer.parameters()).device)
    return psnr(to_bytes(x), to_bytes(reconstruction(tokenizer, x))).clamp_max(99.0).cpu()


def reconstruction(tokenizer: Any, x: Tensor) -> Tensor:
    """Pictures of the tokens of pictures."""
    layout = tokenizer.layout(tuple(x.shape[2:]))
    return tokenizer.decode(tokenizer.encode(x, layout), layout)


def _measured(seen: Dataset, heldout: Dataset | None) -> dict[str, Batches]:
    """As many pictures of those that are learned from as of those held out; nothing where none are."""
    if heldout is None or tuple(heldout.classes) != tuple(seen.classes):
        return {}
    count = min(MEASURED, len(seen), len(heldout))
    return {name: Batches(d, BatchesConfig(batch=count)) for name, d in (("seen", seen), ("heldout", heldout))}
