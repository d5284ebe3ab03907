"""Training from a name: which part of a system a stage trains, on which data, starting from which weights.

A run leaves the whole system in `run/model`, so that the next stage, sampling and evaluation start from that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arvis import systems
from arvis.config import from_dict, override, to_dict
from arvis.data import open_data
from arvis.data.batches import Batches, BatchesConfig, Dataset
from arvis.data.emoji import load_emoji
from arvis.data.images import grid, save_image, to_bytes, to_pil, to_tensor
from arvis.evaluation.emoji import EmojiEvaluation, EmojiReport, evaluate
from arvis.evaluation.metrics import psnr
from arvis.loading import picture_size, resolve_device
from arvis.noise import Noise
from arvis.training import checkpoint, distributed, folder
from arvis.training.adversarial import Adversary, AdversaryConfig
from arvis.training.fit import FitConfig, FitResult, fit
from arvis.training.fit_config import load_config
from arvis.training.optimizers import Part
from arvis.training.perceptual import perceptual
from arvis.training.progress import OnStep
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate
from arvis.weights import SAME_NAMES, load_official, read_pretrained, save_pretrained

Stage = Literal["tokenizer", "generator"]

_KEPT = ("stage", "data", "size", "levels", "tokenizer", "freeze", "lpips", "gan_start")
"""Fields of a request that its run folder keeps as they are."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: one stage of the preset `name` on the data set `data`, for `fit`, in the run folder `run`.

    `init` is a folder with weights of the same system (the generator stage needs a trained tokenizer); `set` overrides
    the preset ("scale.depth=4"), or `config` where one is given. `tokenizer` is a folder whose tokenizer replaces the
    one in `init`; parameters whose names hold a fragment of `freeze` are not trained ("encoder", "quant": a better
    decoder for the same tokens). Pictures have `size` pixels, by default the model's. `sampling` are the settings that
    the trained model is used with, by default the preset's.

    `levels` teaches a generator only so many coarse levels first, at a fraction of the cost. A tokenizer is trained
    with the terms of `loss`: LPIPS where its weight files are in `lpips`, a PatchGAN from step `gan_start` on (-1:
    none).
    """

    name: str
    stage: Stage
    data: str
    run: Path
    fit: FitConfig
    device: str = "auto"
    size: int = 0
    tokenizer: str = ""
    freeze: tuple[str, ...] = ()
    levels: int = 0
    loss: TokenizerLossConfig = field(default_factory=lambda: TokenizerLossConfig(edges=1.0))
    lpips: tuple[str, ...] = ()
    gan_start: int = -1
    init: Path | None = None
    config: Any = None
    sampling: Mapping[str, Any] | None = None
    set: tuple[str, ...] = ()
    resume: bool = False


def request_for(name: str, stage: Stage, data: str, run: Path) -> TrainRequest:
    """The request with the preset's own settings for a stage."""
    _, _, preset = systems.preset(name)
    config = from_dict(FitConfig, {"steps": 1000, "batch": 64, **preset.training.get(stage, {})})
    return TrainRequest(name=name, stage=stage, data=data, run=run, fit=config)


def resumed(run: Path) -> TrainRequest | None:
    """The request that a run folder keeps, to go on with; None for a folder that keeps none (of an early version).

    Raises FileNotFoundError where there is no run.
    """
    if not folder.exists(run):
        raise FileNotFoundError(f"{run} holds no run to resume; leave --resume out to start one")
    config, saved = load_config(run)
    kept = saved.get("request")
    if kept is None:
        return None
    slug, name, _ = systems.preset(saved["preset"])
    fields: dict[str, Any] = {k: tuple(kept[k]) if isinstance(kept[k], list) else kept[k] for k in _KEPT}
    return TrainRequest(
        name=name,
        run=run,
        fit=replace(config, minutes=None),
        init=Path(kept["init"]) if kept["init"] else None,
        config=from_dict(systems.system(slug).CONFIG, saved["model"]),
        sampling=saved.get("sampling"),
        loss=from_dict(TokenizerLossConfig, kept["loss"]),
        resume=True,
        **fields,
    )


def finetuning(model: Any, pictures: Path, run: Path, start: Path) -> TrainRequest:
    """The request that continues the generator of a `Model`, saved in the folder `start`, on a folder of pictures.

    The preset's settings at a fifth of its learning rate, batches of at most 64.
    """
    _, name, _ = systems.preset(model.name if _registered(model.name) else model.slug)
    plain = request_for(name, "generator", str(pictures), run)
    gentle = replace(plain.fit, lr=plain.fit.lr / 5, warmup=20, batch=min(plain.fit.batch, 64))
    return replace(plain, fit=gentle, init=start, config=model.config, sampling=model.settings, size=model.size[0])


def refuse_existing(run: Path) -> None:
    """FileExistsError where a folder holds a run, which a new one would overwrite."""
    if folder.exists(run):
        raise FileExistsError(f"{run} already holds a run; go on with --resume, or choose another --run")


def _registered(name: str) -> bool:
    try:
        return bool(systems.preset(name))
    except KeyError:
        return False


def train(request: TrainRequest, on_step: OnStep | None = None) -> FitResult:
    """Train one stage of a system; `run/model` holds the whole system with the averaged weights afterwards.

    Raises ValueError for a generator without a trained tokenizer, labels that the model has no classes for, and what
    `fit` raises.
    """
    if not request.resume:
        refuse_existing(request.run)
    slug, name, preset = systems.preset(request.name)
    config = override(preset.config() if request.config is None else request.config, list(request.set))
    with torch.device("meta"):
        system = systems.system(slug).build(config)
    own = picture_size(system)[0]
    size = request.size or own
    if request.stage == "generator" and size != own:
        raise ValueError(f"{name} paints pictures of {own} pixels, got size={size}")
    if request.levels < 0:
        raise ValueError(f"levels is how many coarse levels are learned (0: all), got {request.levels}")
    system.tokenizer.layout((size, size))  # refuses sizes that are no pictures of it
    data = open_data(request.data, size, request.fit.seed)
    batches = Batches(data, BatchesConfig(batch=request.fit.batch, seed=request.fit.seed))
    device = resolve_device(request.device)
    ranks = distributed.init(device.type)
    stage = _stage(request, slug, config, batches).to(ranks.device if ranks.world > 1 else device)
    sampling = dict(preset.sampling if request.sampling is None else request.sampling)
    kept = {"init": str(request.init or ""), "loss": to_dict(request.loss), **{k: getattr(request, k) for k in _KEPT}}
    result = fit(
        stage,
        stage.loss,
        batches,
        replace(request.fit, parts=stage.parts),
        request.run,
        resume=request.resume,
        sample=stage.draw,
        on_step=on_step,
        settings={
            "system": slug,
            "preset": name,
            "data": request.data,
            "request": kept,
            "sampling": sampling,
            "model": to_dict(config),
        },
        blocks=stage.blocks,
    )
    if ranks.first:
        trained, found = _stage(request, slug, config, batches), checkpoint.load(result.checkpoint)
        checkpoint.assign(trained, {**found.model, **found.ema}, found.path)
        source = {
            "trained_by": "arvis",
            "name": name,
            "data": request.data,
            "steps": result.step,
            "licence": preset.licence,
            "sampling": sampling,
        }
        save_pretrained(trained.system, to_dict(config), request.run / "model", system=slug, source=source)
    ranks.barrier()
    return result


def _stage(request: TrainRequest, slug: str, config: Any, batches: Batches) -> TokenizerStage | GeneratorStage:
    """The module to train, from `init` or fresh."""
    if request.init is None and request.stage == "generator":
        raise ValueError("a generator is trained on the tokens of a trained tokenizer: give its folder with --init")
    torch.manual_seed(request.fit.seed)
    system = systems.system(slug).build(config)
    if request.init is not None:
        load_official(system, SAME_NAMES, _own(request.init), source=str(request.init))
    if request.tokenizer:
        own = {
            n.removeprefix("tokenizer."): t for n, t in _own(request.tokenizer).items() if n.startswith("tokenizer.")
        }
        load_official(system.tokenizer, SAME_NAMES, own, source=request.tokenizer)
    for parameter_name, parameter in system.named_parameters():
        parameter.requires_grad_(not any(fragment in parameter_name for fragment in request.freeze))
    return (TokenizerStage if request.stage == "tokenizer" else GeneratorStage)(system, batches, request)


def _own(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model of ours, those in fewer bits widened to float32."""
    return {n: t.float() if t.is_floating_point() else t for n, t in read_pretrained(path).tensors.items()}


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
                layout = self.tokenizer.layout(tuple(first.shape[2:]))
                self.tokenizer.init_(self.tokenizer.features(first), layout, Noise.of(request.fit.seed))
        self._perceptual = [perceptual(request.lpips)] if request.lpips else []  # in a list: no part of checkpoints

    @property
    def system(self) -> Any:
        """The whole system; only its tokenizer is part of this module."""
        return self._system[0]

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [self.tokenizer.encoder, self.tokenizer.decoder]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        measure = next((m.to(batch["image"].device) for m in self._perceptual), None)
        return tokenizer_loss(self.tokenizer, batch, noise, self._config, batch["step"], measure, self.adversary)

    def draw(self, step: int, folder: Path) -> None:
        """Pictures of the first batch above their reconstructions."""
        x = self._shown.to(next(self.parameters()).device)
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
        if classes := getattr(batches.dataset, "classes", ()):  # the last label of the data, before the first step
            system.prepare({"prompt": [""], "class_labels": [len(classes) - 1]})

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return [part for name, part in self.system.parts().items() if name != "tokenizer"]

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return self.system.loss({**batch, "levels": self.levels}, noise)

    def draw(self, step: int, folder: Path) -> None:
        """A picture for each condition of the first batch."""
        cond = self.system.prepare(self._shown)
        noise = Noise.of(0, len(self._shown["prompt"]), next(self.parameters()).device)
        last = finish(generate(self.system, cond, self.system.Sampling(), noise))
        save_image(grid(self.system.tokenizer.decode(last.tokens, last.layout), 6), folder / f"{step:06}.png")


@torch.no_grad()
def tokenizer_psnr(system: Any, data: Dataset, most: int = 256) -> float:
    """How well the tokenizer shows pictures of a data set: mean PSNR in dB of the first ones, at most `most`."""
    pictures = Batches(data, BatchesConfig(batch=1, shuffle=False))
    device, layout, values = next(system.parameters()).device, system.tokenizer.layout(), []
    for step in range(min(most, len(data))):
        x = pictures.batch_at(step)["image"].to(device)
        y = system.tokenizer.decode(system.tokenizer.encode(x, layout), layout)
        values.append(float(psnr(to_bytes(x), to_bytes(y))))
    return sum(values) / len(values)


def evaluate_emoji(
    model: Any,
    settings: dict[str, Any],
    *,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    on_picture: Callable[[int], object] = lambda n: None,
) -> EmojiReport:
    """The emoji benchmark of a text-to-image `Model`; report.md, report.json and a sheet of samples go to `out`.

    ValueError for a model that takes no prompts or has pictures of another size.
    """
    if "prompt" not in model.system.conditions or model.size != (64, 64):
        raise ValueError(f"the emoji benchmark is for models of prompts at 64 x 64 pixels, {model.name} is not one")

    def paint(prompts: list[str], painted: int) -> Tensor:
        return torch.stack([to_tensor(p) for p in model.generate(prompts, seed=painted, settings=settings)])

    def reconstruct(images: Tensor) -> Tensor:
        return torch.stack([to_tensor(p) for p in model.reconstruct([to_pil(x) for x in images])])

    config = EmojiEvaluation(seed=seed)
    if quick:
        config = replace(config, names=100, scenes=12, pictures=50)
    about = {"model": model.name, **model.settings, **settings}
    report = evaluate(paint, reconstruct, config, about, on_picture)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rows = load_emoji(64).split("train").rows
        names = [rows[i].name for i in Noise.of(seed).uniform("sheet", 0, (len(rows),))[0].argsort()[:24].tolist()]
        save_image(grid(paint(names, seed), 8), out / "samples.png", {"prompts": names, "settings": about})
        checkpoint.write_text(out / "report.md", report.to_markdown() + f"\nSamples: {', '.join(names)}.\n")
        checkpoint.write_text(out / "report.json", report.to_json())
    return report
