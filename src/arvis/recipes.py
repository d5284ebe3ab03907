"""Training from a name: which part of a system a stage trains, on which data, starting from which weights.

A run leaves the whole system in `run/model`, so that the next stage, sampling and evaluation start from that folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arvis import systems
from arvis.config import override, to_dict
from arvis.data import open_data
from arvis.data.batches import Batches, BatchesConfig
from arvis.data.images import grid, save_image, to_bytes
from arvis.evaluation.metrics import psnr
from arvis.noise import Noise
from arvis.training import checkpoint
from arvis.training.fit import FitConfig, FitResult, fit
from arvis.training.progress import OnStep
from arvis.walk import finish, generate
from arvis.weights import SAME_NAMES, load_official, read_pretrained, save_pretrained

Stage = Literal["tokenizer", "generator"]


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: one stage of the preset `name` on the data set `data`, for `fit`, in the run folder `run`.

    `init` is a folder with weights of the same system (the generator stage needs a trained tokenizer); `set` overrides
    the preset ("scale.depth=4"). `levels` teaches a generator only so many coarse levels first, at a fraction of the
    cost.
    """

    name: str
    stage: Stage
    data: str
    run: Path
    fit: FitConfig
    size: int = 64
    levels: int = 0
    init: Path | None = None
    set: tuple[str, ...] = ()
    resume: bool = False


def train(request: TrainRequest, on_step: OnStep | None = None) -> FitResult:
    """Train one stage of a system; `run/model` holds the whole system with the averaged weights afterwards."""
    slug, name, preset = systems.preset(request.name)
    config = override(preset.config(), list(request.set))
    torch.manual_seed(request.fit.seed)
    system = systems.system(slug).build(config)
    if request.init is not None:
        load_official(system, SAME_NAMES, read_pretrained(request.init).tensors, source=str(request.init))
    elif request.stage == "generator":
        raise ValueError("a generator is trained on the tokens of a trained tokenizer: give its folder with --init")
    data = open_data(request.data, request.size, request.fit.seed)
    batches = Batches(data, BatchesConfig(batch=request.fit.batch, seed=request.fit.seed))
    stage = (
        TokenizerStage(system, batches)
        if request.stage == "tokenizer"
        else GeneratorStage(system, batches, request.levels)
    )
    result = fit(
        stage,
        stage.loss,
        batches,
        request.fit,
        request.run,
        resume=request.resume,
        sample=stage.draw,
        on_step=on_step,
        settings={"system": slug, "preset": name, "data": request.data, "model": to_dict(config)},
        blocks=stage.blocks,
    )
    found = checkpoint.load(result.checkpoint)
    checkpoint.assign(
        stage, {**found.model, **{n: v.to(found.model[n].dtype) for n, v in found.ema.items()}}, found.path
    )
    source = {"trained_by": "arvis", "data": request.data, "steps": result.step, "licence": preset.licence}
    save_pretrained(system, to_dict(config), request.run / "model", system=slug, source=source)
    return result


class TokenizerStage(nn.Module):
    """Reconstruction and quantiser terms of a pyramid tokenizer, with usage records and dead-code revival."""

    def __init__(self, system: Any, batches: Batches) -> None:
        super().__init__()
        self.tokenizer, self._shown = system.tokenizer, batches.batch_at(0)["image"][:12]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [self.tokenizer.encoder, self.tokenizer.decoder]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        x, tokenizer, step = batch["image"], self.tokenizer, int(self.updates)
        layout = tokenizer.layout(tuple(x.shape[2:]))
        f = tokenizer.features(x)
        quantized = tokenizer.quantize(f, layout)
        y = tokenizer.reconstruct(quantized.values)
        tokenizer.quantize.record_(quantized.tokens, layout, step)
        if step % 10 == 9:
            tokenizer.quantize.revive_(f.detach(), layout, noise, step)
        self.updates += 1
        l1, mse = (y - x).abs().mean(), (y - x).square().mean()
        edges = (y - x).diff(dim=2).abs().mean() + (y - x).diff(dim=3).abs().mean()
        usage = {f"usage_{k}": share for k, share in enumerate(quantized.stats["usage"])}
        vq, psnr = quantized.losses["vq"], 10 * (4 / mse).log10()
        return {"loss": l1 + mse + edges + vq, "l1": l1, "mse": mse, "edges": edges, "vq": vq, "psnr": psnr, **usage}

    def draw(self, step: int, folder: Path) -> None:
        """Pictures of the first batch above their reconstructions."""
        x = self._shown
        layout = self.tokenizer.layout(tuple(x.shape[2:]))
        pairs = torch.cat((x, self.tokenizer.decode(self.tokenizer.encode(x, layout), layout)))
        save_image(grid(pairs, len(x)), folder / f"{step:06}.png")


class GeneratorStage(nn.Module):
    """The system's own loss on the tokens of its frozen tokenizer."""

    def __init__(self, system: Any, batches: Batches, levels: int) -> None:
        super().__init__()
        self.levels = levels
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
    pictures = Batches(open_data(data, size), BatchesConfig(batch=1, shuffle=False))
    values = []
    for step in range(min(most, len(pictures.dataset))):
        x = pictures.batch_at(step)["image"]
        layout = system.tokenizer.layout()
        y = system.tokenizer.decode(system.tokenizer.encode(x, layout), layout)
        values.append(float(psnr(to_bytes(x), to_bytes(y))))
    return sum(values) / len(values)
