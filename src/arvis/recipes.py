"""Training from a name: which part of a system a stage trains, on which data, starting from which weights.

A run leaves the whole system in `run/model`, so that the next stage, sampling and evaluation start from that folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arvis import systems
from arvis.config import override, to_dict
from arvis.data import open_data
from arvis.data.batches import Batches, BatchesConfig
from arvis.data.images import grid, save_image, to_bytes
from arvis.noise import Noise
from arvis.training import checkpoint, distributed
from arvis.training.adversarial import Adversary, AdversaryConfig
from arvis.training.fit import FitConfig, FitResult, fit
from arvis.training.optimizers import Part
from arvis.training.perceptual import perceptual
from arvis.training.progress import OnStep
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate
from arvis.weights import SAME_NAMES, load_official, read_pretrained, save_pretrained

Stage = Literal["tokenizer", "generator"]


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: one stage of the preset `name` on the data set `data`, for `fit`, in the run folder `run`.

    `init` is a folder with weights of the same system (the generator stage needs a trained tokenizer); `set` overrides
    the preset ("scale.depth=4"). `tokenizer` is a folder whose tokenizer replaces the one in `init`; parameters whose
    names hold a fragment of `freeze` are not trained ("encoder", "quant": a better decoder for the same tokens).

    `levels` teaches a generator only so many coarse levels first, at a fraction of the cost. A tokenizer is trained on
    the terms of `loss`: LPIPS where its weight files are in `lpips`, a PatchGAN from step `gan_start` on (-1: none).
    """

    name: str
    stage: Stage
    data: str
    run: Path
    fit: FitConfig
    size: int = 64
    tokenizer: str = ""
    freeze: tuple[str, ...] = ()
    levels: int = 0
    loss: TokenizerLossConfig = field(default_factory=lambda: TokenizerLossConfig(edges=1.0))
    lpips: tuple[str, ...] = ()
    gan_start: int = -1
    init: Path | None = None
    set: tuple[str, ...] = ()
    resume: bool = False


def train(request: TrainRequest, on_step: OnStep | None = None) -> FitResult:
    """Train one stage of a system; `run/model` holds the whole system with the averaged weights afterwards."""
    slug, name, preset = systems.preset(request.name)
    config = override(preset.config(), list(request.set))
    data = open_data(request.data, request.size, request.fit.seed)
    batches = Batches(data, BatchesConfig(batch=request.fit.batch, seed=request.fit.seed))
    ranks = distributed.init()
    stage = _stage(request, slug, config, batches)
    result = fit(
        stage,
        stage.loss,
        batches,
        replace(request.fit, parts=stage.parts),
        request.run,
        resume=request.resume,
        sample=stage.draw,
        on_step=on_step,
        settings={"system": slug, "preset": name, "data": request.data, "model": to_dict(config)},
        blocks=stage.blocks,
    )
    if ranks.first:
        trained, found = _stage(request, slug, config, batches), checkpoint.load(result.checkpoint)
        checkpoint.assign(trained, {**found.model, **found.ema}, found.path)
        source = {"trained_by": "arvis", "data": request.data, "steps": result.step, "licence": preset.licence}
        save_pretrained(trained.system, to_dict(config), request.run / "model", system=slug, source=source)
    ranks.barrier()
    return result


def _stage(request: TrainRequest, slug: str, config: Any, batches: Batches) -> TokenizerStage | GeneratorStage:
    """The module to train, from `init` or fresh."""
    torch.manual_seed(request.fit.seed)
    system = systems.system(slug).build(config)
    if request.init is not None:
        load_official(system, SAME_NAMES, read_pretrained(request.init).tensors, source=str(request.init))
    if request.tokenizer:
        found = read_pretrained(request.tokenizer).tensors
        own = {n.removeprefix("tokenizer."): t for n, t in found.items() if n.startswith("tokenizer.")}
        load_official(system.tokenizer, SAME_NAMES, own, source=request.tokenizer)
    for parameter_name, parameter in system.named_parameters():
        parameter.requires_grad_(not any(fragment in parameter_name for fragment in request.freeze))
    if request.stage == "tokenizer":
        return TokenizerStage(system, batches, request)
    if request.init is None:
        raise ValueError("a generator is trained on the tokens of a trained tokenizer: give its folder with --init")
    return GeneratorStage(system, batches, request)


class TokenizerStage(nn.Module):
    """Reconstruction of pictures: pixel, quantiser, perceptual and adversarial terms, with codebook upkeep."""

    def __init__(self, system: Any, batches: Batches, request: TrainRequest) -> None:
        super().__init__()
        self.tokenizer, self._system, first = system.tokenizer, [system], batches.batch_at(0)["image"]
        self.adversary = Adversary(AdversaryConfig(start=request.gan_start)) if request.gan_start >= 0 else None
        self.parts = (Part(names=("adversary.",), loss="loss_adversary"),) if self.adversary else ()
        self._config, self._shown = request.loss, first[:12]
        if request.init is None:
            with torch.no_grad():
                self.tokenizer.quantize.init_(
                    self.tokenizer.features(first),
                    self.tokenizer.layout(tuple(first.shape[2:])),
                    Noise.of(request.fit.seed),
                )
        self._perceptual = [perceptual(request.lpips)] if request.lpips else []  # in a list: no part of checkpoints

    @property
    def system(self) -> Any:
        """The whole system; only its tokenizer is part of this module."""
        return self._system[0]

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [self.tokenizer.encoder, self.tokenizer.decoder]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        measure = next(iter(self._perceptual), None)
        return tokenizer_loss(self.tokenizer, batch, noise, self._config, batch["step"], measure, self.adversary)

    def draw(self, step: int, folder: Path) -> None:
        """Pictures of the first batch above their reconstructions."""
        x = self._shown
        layout = self.tokenizer.layout(tuple(x.shape[2:]))
        pairs = torch.cat((x, self.tokenizer.decode(self.tokenizer.encode(x, layout), layout)))
        save_image(grid(pairs, len(x)), folder / f"{step:06}.png")


class GeneratorStage(nn.Module):
    """The system's own loss on the tokens of its frozen tokenizer."""

    parts: tuple[Part, ...] = ()

    def __init__(self, system: Any, batches: Batches, request: TrainRequest) -> None:
        super().__init__()
        self.levels = request.levels
        self.system, first = system, batches.batch_at(0)
        self._shown = {"prompt": first["prompt"][:12], "class_labels": first["class_labels"][:12]}
        system.tokenizer.requires_grad_(False)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [self.system.transformer]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return self.system.loss({**batch, "levels": self.levels}, noise)

    def draw(self, step: int, folder: Path) -> None:
        """A picture for each condition of the first batch."""
        cond = self.system.prepare(self._shown)
        noise = Noise.of(0, len(self._shown["prompt"]))
        last = finish(generate(self.system, cond, self.system.Sampling(), noise))
        save_image(grid(self.system.tokenizer.decode(last.tokens, last.layout), 6), folder / f"{step:06}.png")


@torch.no_grad()
def tokenizer_psnr(system: Any, data: str, size: int, most: int = 256) -> float:
    """How well the tokenizer shows pictures of a data set: mean PSNR in dB of at most `most` of them."""
    from arvis.evaluation.metrics import psnr

    pictures = Batches(open_data(data, size), BatchesConfig(batch=1, shuffle=False))
    values = []
    for step in range(min(most, len(pictures.dataset))):
        x = pictures.batch_at(step)["image"]
        layout = system.tokenizer.layout()
        y = system.tokenizer.decode(system.tokenizer.encode(x, layout), layout)
        values.append(float(psnr(to_bytes(x), to_bytes(y))))
    return sum(values) / len(values)
