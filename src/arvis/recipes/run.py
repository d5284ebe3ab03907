"""One stage of a model from the request to `run/model`, which holds the whole system with the averaged weights."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis import systems
from arvis.config import to_dict
from arvis.data import fingerprint, open_data
from arvis.data.batches import Batches, BatchesConfig, Dataset
from arvis.data.latents import Encodes, OnPicture, encode_once, key
from arvis.data.views import Views, source_size
from arvis.loading import picture_size, resolve_device
from arvis.nn.lora import merge
from arvis.recipes.classes import class_count, class_field
from arvis.recipes.request import TrainRequest, refuse_among, refuse_existing
from arvis.recipes.stages import GeneratorStage, TokenizerStage, objective
from arvis.training import checkpoint, distributed, metrics, report
from arvis.training.fit import FitConfig, FitResult, fit
from arvis.training.progress import OnStep
from arvis.weights import SAME_NAMES, load_official, read_pretrained, save_adapters, save_pretrained

TRIED = 5
"""Updates by which the speed of a machine is measured."""


def train(
    request: TrainRequest,
    on_step: OnStep | None = None,
    on_picture: OnPicture | None = None,
    *,
    within: float | None = None,
    before: bool = False,
) -> FitResult:
    """Train one stage of a system; `run/model` holds the whole system with the averaged weights afterwards.

    `on_picture` is told about pictures that are encoded before the first update. With `within` the schedule gets as
    many updates as fit into so many seconds, at most the request's. `before` draws samples before the first update.

    Raises ValueError for a generator without a trained tokenizer, labels that the model has no classes for, and what
    `fit` raises.
    """
    began = time.monotonic()
    if not request.resume:
        refuse_existing(request.run)
    slug, name, preset = systems.preset(request.name)
    config, data, heldout = opened(request)
    batches = Batches(data, BatchesConfig(batch=request.fit.batch, seed=request.fit.seed))
    device = resolve_device(request.device)
    ranks = distributed.init(device.type)
    device = ranks.device if ranks.world > 1 else device
    request = replace(request, sampling=dict(preset.sampling if request.sampling is None else request.sampling))
    stage = _stage(request, config, batches, heldout).to(device)
    shown = _data(request, stage, batches, device, ranks, on_picture)
    config_of_fit = replace(request.fit, parts=stage.parts)
    if within is not None:
        left = within - (time.monotonic() - began)
        config_of_fit = ranks.share(_fitting(stage, shown, config_of_fit, left, request.run))
    if config_of_fit.minutes is not None:  # what was done before the first update counts
        left = config_of_fit.minutes - (time.monotonic() - began) / 60
        config_of_fit = replace(config_of_fit, minutes=max(left, 1e-6))
    if before and not request.resume and ranks.first:
        metrics.append(request.run, {"step": 0, **_draw(stage, 0, request.run)})
    result = fit(
        stage,
        stage.loss,
        shown,
        config_of_fit,
        request.run,
        resume=request.resume,
        sample=stage.draw,
        on_step=on_step,
        settings={
            "system": slug,
            "preset": name,
            "data": request.data,
            "request": request.kept(),
            "sampling": request.sampling,
            "model": to_dict(config),
            "pictures": dict(request.pictures),
        },
        blocks=stage.blocks,
        tokens=stage.tokens,
    )
    del stage, shown
    if ranks.first:
        trained, found = _stage(request, config, batches, heldout).to(device), checkpoint.load(result.checkpoint)
        checkpoint.assign(trained, {**found.model, **found.ema}, found.path)
        _keep(trained, request, slug, to_dict(config), result, data.classes)
    ranks.barrier()
    return result


def opened(request: TrainRequest) -> tuple[Any, Dataset, Dataset | None]:
    """The configuration, the pictures to learn from, and those held out where there are some; refuses what cannot be
    met."""
    config, slug = request.settled, systems.preset(request.name)[0]
    with torch.device("meta"):
        system = systems.system(slug).build(config)
    own, levels = picture_size(system), system.tokenizer.layout().K
    size = (request.size, request.size) if request.size else own
    if request.stage == "generator" and size != own:
        raise ValueError(f"{request.name} paints pictures of {own[1]}x{own[0]} pixels, got size={request.size}")
    if not 0 <= request.levels <= levels:
        raise ValueError(f"levels is how many coarse levels are learned, 0 (all) to {levels}, got {request.levels}")
    if request.only and not any(f in n for f in request.only for n, _ in system.named_parameters()):
        raise ValueError(f"no parameter's name holds one of only={','.join(request.only)}")
    system.tokenizer.layout(size)  # refuses sizes that are no pictures of it
    objective(request, system)
    refuse_among(request.run, Path(request.data))
    larger = source_size(size, request.crops)
    data = Views(open_data(request.data, larger, request.fit.seed), size, request.crops, request.flip)
    if "class_labels" in system.conditions and (field := class_field(config)):
        count, has = class_count(config), len(data.classes)
        if has > count:
            raise ValueError(f"{request.data} has {has} classes, the model has {count}; --set model.{field}={has}")
    try:
        heldout = Views(open_data(request.data, larger, request.fit.seed, "heldout"), size)
    except ValueError:  # too few to hold some out
        heldout = None
    return config, data, heldout


def _stage(
    request: TrainRequest, config: Any, batches: Batches, heldout: Dataset | None
) -> TokenizerStage | GeneratorStage:
    """The module to train, from `init` or fresh."""
    if request.init is None and request.stage == "generator":
        raise ValueError("a generator is trained on the tokens of a trained tokenizer: give its folder with --init")
    torch.manual_seed(request.fit.seed)
    system = systems.system(systems.preset(request.name)[0]).build(config)
    if request.init is not None:
        load_official(system, SAME_NAMES, _own(request.init), source=str(request.init))
    if request.tokenizer:
        own = {
            n.removeprefix("tokenizer."): t for n, t in _own(request.tokenizer).items() if n.startswith("tokenizer.")
        }
        load_official(system.tokenizer, SAME_NAMES, own, source=request.tokenizer)
    for name, parameter in system.named_parameters():
        if any(f in name for f in request.freeze) or (request.only and not any(f in name for f in request.only)):
            parameter.requires_grad_(False)
    kind = TokenizerStage if request.stage == "tokenizer" else GeneratorStage
    return kind(system, request, batches, heldout)


def _own(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model of ours, those in fewer bits widened to float32."""
    return {n: t.float() if t.is_floating_point() else t for n, t in read_pretrained(path).tensors.items()}


def _data(
    request: TrainRequest,
    stage: TokenizerStage | GeneratorStage,
    batches: Batches,
    device: torch.device,
    ranks: distributed.Ranks,
    on_picture: OnPicture | None,
) -> Callable[[int], dict[str, Any]]:
    """The batches of a stage: pictures, or what its frozen tokenizer makes of them, encoded once."""
    system, count = stage.system, len(batches.dataset)
    worth = request.cache == "on" or (request.cache == "auto" and request.fit.steps * request.fit.batch >= 2 * count)
    if request.stage == "tokenizer" or not worth or not isinstance(system, Encodes):
        return batches
    encode, tokenizer = system.latents, stage.system.tokenizer
    weights = [part for pair in sorted(tokenizer.state_dict().items()) for part in pair]
    views = f"{request.crops} {request.flip} {request.fit.seed} {count}"
    place = request.run / "latents" / key(fingerprint(request.data), str(picture_size(system)), views, *weights)
    stage.eval()
    return encode_once(batches, encode, place, device, ranks, on_picture)


def _fitting(
    stage: TokenizerStage | GeneratorStage,
    data: Callable[[int], dict[str, Any]],
    config: FitConfig,
    seconds: float,
    run: Path,
) -> FitConfig:
    """The settings with as many updates as fit into some seconds, by the speed of a few that leave no trace."""
    if config.shard:
        return config
    began, times = time.monotonic(), []
    kept = {name: t.clone() for name, t in stage.state_dict().items()}
    run.mkdir(parents=True, exist_ok=True)
    for left_over in run.glob(".tried-*"):
        shutil.rmtree(left_over)
    tried = replace(config, steps=TRIED, minutes=None, compile=False, save_minutes=0.0, save_every=0, sample_every=0)
    with tempfile.TemporaryDirectory(prefix=".tried-", dir=run) as place:
        fit(stage, stage.loss, data, tried, place, on_step=lambda info: times.append(time.monotonic()))
    stage.load_state_dict(kept)
    if not times:  # told to the first process alone
        return config
    pace = statistics.median(b - a for a, b in pairwise(times))
    left = seconds - (time.monotonic() - began)
    steps = max(1, min(config.steps, int(0.92 * left / pace)))  # the rest is for saving and drawing
    return replace(config, steps=steps, warmup=min(config.warmup, steps // 5), sample_every=max(steps // 10, 1))


def _draw(stage: TokenizerStage | GeneratorStage, step: int, run: Path) -> dict[str, float]:
    (run / "samples").mkdir(parents=True, exist_ok=True)
    stage.eval()
    with torch.no_grad():
        return stage.draw(step, run / "samples")


def _keep(
    stage: TokenizerStage | GeneratorStage,
    request: TrainRequest,
    slug: str,
    config: dict[str, Any],
    result: FitResult,
    classes: tuple[str, ...],
) -> None:
    """The trained model, its adapters where it has some, its last pictures and the report."""
    own = {"classes": list(classes)} if "class_labels" in stage.system.conditions and classes else {}
    source = {
        "trained_by": "arvis",
        "name": request.name,
        "data": request.data,
        "steps": result.step,
        "licence": systems.preset(request.name)[2].licence,
        "sampling": request.sampling,
        **own,
    }
    if request.lora.rank and request.stage == "generator":
        about = {"system": slug, "config": config, "base": request.base, "scale": request.lora.scale}
        save_adapters(stage.system, request.run / "lora.safetensors", **about, source=source)
        merge(stage.system)
    save_pretrained(stage.system, config, request.run / "model", system=slug, source=source)
    last = _draw(stage, result.step, request.run)
    if last and not any(row["step"] == result.step and last.keys() <= row.keys() for row in metrics.read(request.run)):
        metrics.append(request.run, {"step": result.step, **last})
    report.write(request.run)
