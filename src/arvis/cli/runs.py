"""Commands that train: train, finetune."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from arvis import systems
from arvis.cli.settings import Set
from arvis.cli.terminal import first_process, log_lines, place_for_folder, progress


def train(
    name: Positional[str],
    /,
    stage: Literal["tokenizer", "generator"] | None = None,
    data: str | None = None,
    run: Path = Path("runs/new"),
    init: Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    device: str = "auto",
    set: Set = (),
) -> None:
    """Train a model, its tokenizer and then its generator; run folders keep settings, curves, pictures, checkpoints.

    Args:
        name: A preset, such as brush-64, or a system: then its small preset is trained.
        stage: One stage alone. With --init and nothing else it is the generator.
        data: "emoji", "scenes", "emoji+scenes", a folder of pictures, .parquet or .tar files.
        run: The run folder.
        init: A folder with weights to start from (RUN/model of an earlier stage); then one stage is trained.
        steps: Updates of a stage; the length of the schedule. The preset knows how many.
        minutes: The time for both stages, whose schedules are made to fit; of one stage, the time after which it stops.
        resume: Go on where the run in this folder stopped, for whatever reason, with its settings.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Further settings: fit.lr=3e-4 fit.batch=32 generator.fit.batch=16 model.scale.depth=6 levels=4 flip=true.
    """
    from arvis import recipes

    full = recipes.trainable(name)
    _positive(minutes)
    if resume and (plan := recipes.planned(run)) is not None:
        if full != plan.name or stage is not None or init is not None or data not in (None, plan.data) or steps or set:
            raise ValueError(f"{run} is a run of both stages of {plan.name} on {plan.data}; --resume takes no changes")
        return _whole(plan, run, minutes, device, resume=True)
    if not resume and stage is None and init is None:
        place_for_folder(run)
        plan = recipes.plan_for(full, data, steps=_steps(steps) or 0, minutes=minutes or 0.0, set=tuple(set))
        return _whole(plan, run, minutes, device, resume=False)
    request = recipes.resumed(run) if resume else None
    if request is None:
        plain = recipes.request_for(full, stage or "generator", data or recipes.default_data(full), run)
        request = replace(plain, resume=resume)
    if full != request.name or stage not in (None, request.stage):
        asked = f"{full} --stage {stage}" if stage else full
        raise ValueError(f"{run} is a run of {request.name} --stage {request.stage}, not of {asked}")
    request = replace(request, data=data or request.data, init=init or request.init, device=device)
    _train(recipes.changed(request, set, _steps(steps)), minutes)


def finetune(
    folder: Positional[Path],
    /,
    model: str = systems.DEFAULT,
    run: Path = Path("runs/finetune"),
    stage: Literal["tokenizer", "generator"] = "generator",
    lora: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    device: str = "auto",
    set: Set = (),
) -> None:
    """Continue the training of a model on your own pictures; says first how well its tokenizer can show them.

    Args:
        folder: Pictures: one sub-folder per class, or captions beside them (captions.jsonl, or a .txt per picture).
        model: The model to start from, by name or folder.
        run: The run folder.
        stage: The generator; or the tokenizer's decoder, where the tokenizer is the bottleneck.
        lora: Train adapters of this rank instead of the weights (0: the weights). Large models do if nothing is said.
        steps: Updates, 500 if nothing is said.
        minutes: Stop after this time, and save.
        resume: Go on where the run stopped, with its settings.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Further settings, as in `arvis train`.
    """
    import arvis
    from arvis import recipes
    from arvis.data.folders import open_folder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"finetune is for one process; torchrun takes arvis train --init MODEL --data {folder}")
    _positive(minutes)
    if lora is not None and lora < 0:
        raise ValueError(f"--lora is the rank of the adapters, 1 or more, or 0 for none, got {lora}")
    open_folder(folder, 1)  # what is wrong with it is told before a model is loaded
    recipes.refuse_among(run, folder)
    request = recipes.resumed(run) if resume else None
    if request is None:
        loaded = arvis.load(model, device=device)
        recipes.refuse_existing(run)
        place_for_folder(run)
        pictures = open_folder(folder, max(loaded.size))
        shown = recipes.fidelity(loaded.system, pictures)
        shown.save(run / "tokenizer.png")
        broken = f", {len(pictures.skipped)} of them unreadable or missing" * bool(pictures.skipped)
        held = len(open_folder(folder, 1, "all")) - len(pictures)
        others = f" and {held} held out" if held else ", too few to hold some out"
        print(f"{len(pictures)} pictures{others}{broken}; {shown.sentence}")
        print(f"originals and what the tokenizer makes of them: {run / 'tokenizer.png'}", flush=True)
        request = recipes.finetuning(loaded, pictures, folder, run, stage=stage, lora=lora)
        base = str(Path(model).resolve()) if Path(model).exists() and request.base != model else model
        request = replace(request, base=base, pictures={"tokenizer.png": shown.sentence})
        request = recipes.changed(request, (), _steps(steps) or 500)
        _tell(loaded, pictures, request)
    elif _steps(steps):
        request = recipes.changed(request, (), steps)
    request = recipes.changed(replace(request, data=str(folder), device=device), set)
    _train(request, minutes, before=True)
    if told := recipes.outcome(run):
        print(told)
    pictures = open_folder(folder, 1)
    print(f"try: arvis generate {_example(pictures, folder, request)} --model {run / 'model'}")


def _tell(loaded: Any, pictures: Any, request: Any) -> None:
    """What will be learned, where a user may expect something else."""
    from arvis import recipes

    if request.lora.rank:
        print(f"adapters of rank {request.lora.rank} are trained; they are kept in {request.run / 'lora.safetensors'}")
    if "class_labels" in loaded.system.conditions and (count := recipes.class_count(request.config)):
        names = ", ".join(f"{k} = {name}" for k, name in enumerate(pictures.classes[:8]))
        more = ", .." * (len(pictures.classes) > 8)
        print(f"the model has the classes of the folder now, {count}: {names + more or 'one for all pictures'}")
    if "prompt" in loaded.system.conditions and not pictures[0]["caption"]:
        print("no captions and no class folders: they are learned without a prompt, and painted by the prompt ''")


def _positive(minutes: float | None) -> None:
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is a time to train for, more than 0, got {minutes}")


def _steps(steps: int | None) -> int | None:
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


class _Bars:
    """A bar for each stage, and one for the pictures encoded before it; without a terminal, a line a minute."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.kind: tuple[str, int] | None = None
        self.told = -60.0

    def at(self, unit: str, done: int, total: int, text: str) -> None:
        """Draw `done` of `total`; another unit or total is another bar."""
        if self.kind != (unit, total):
            self.close()
            self.kind = (unit, total)
            self.bar = progress(total, unit, "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and (time.monotonic() - self.told >= 60 or done == total):
            self.told = time.monotonic()
            print(f"{unit} {done} of {total}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.kind = None, None

    def picture(self, done: int, total: int) -> None:
        self.at("picture", done, total, "encoded once")

    def step(self, info: Any) -> None:
        self.at("step", info.step, info.steps, info.line)


@contextmanager
def _bars() -> Iterator[_Bars]:
    bars = _Bars()
    with log_lines():
        try:
            yield bars
        finally:
            bars.close()


def _train(request: Any, minutes: float | None, before: bool = False) -> None:
    """Train one stage with a bar on stderr, and last lines on stdout."""
    from arvis import recipes

    request = replace(request, fit=replace(request.fit, minutes=minutes))
    place_for_folder(request.run)
    with _bars() as bars:
        result = recipes.train(request, bars.step, bars.picture, before=before)
    if first_process():
        _end(result, request.run)


def _whole(plan: Any, run: Path, minutes: float | None, device: str, resume: bool) -> None:
    """Train both stages, each announced by a line on stdout."""
    from arvis import recipes

    def announce(request: Any) -> None:
        bars.close()
        if first_process():
            print(f"{request.name}: the {request.stage} on {request.data}, in {request.run}", flush=True)

    with _bars() as bars:
        result = recipes.train_whole(
            plan,
            run,
            resume=resume,
            minutes=minutes,
            device=device,
            on_stage=announce,
            on_step=bars.step,
            on_picture=bars.picture,
        )
    if not first_process():
        return
    if result.stopped == "interrupted" or not (run / "model").is_dir():
        return _end(result, result.run)
    print(_line(result))
    print(f"model: {run / 'model'}, report: {run / 'report.html'}")
    print(f"pictures: {run / 'samples.png'}, {run / 'reconstructions.png'}")


def _end(result: Any, run: Path) -> None:
    print(_line(result))
    print(f"model: {run / 'model'}, report: {run / 'report.html'}")


def _line(result: Any) -> str:
    """How a run ended, with its last measures."""
    again = "" if result.stopped == "done" else "; --resume goes on"
    done = f"{result.stopped} at step {result.step} of {result.steps}{again}"
    return f"{done}: {_measures(result.metrics)}, peak {result.peak_mb:.0f} MB"


def _measures(metrics: Any) -> str:
    """The loss, and what tells most beside it: PSNR, use of the codebook (mean over levels), accuracy."""
    out = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    for name, unit, scale in (("psnr", "dB", 1), ("usage", "%", 100), ("perplexity", "", 1), ("accuracy", "%", 100)):
        values = [v for key, v in metrics.items() if key == name or key.rpartition("_")[0] == name]
        if values:
            out.append(f"{name} {scale * sum(values) / len(values):.4g}{' ' * (unit == 'dB')}{unit}")
    return ", ".join(out)


def _example(pictures: Any, folder: Path, request: Any) -> str:
    """A request for the first picture of a folder, as one would type it."""
    import torch

    slug, _, _ = systems.preset(request.name)
    with torch.device("meta"):
        system = systems.system(slug).build(request.config)
    item, names = pictures[0], pictures.classes
    said = item["caption"] if "prompt" in system.conditions else names[item["label"]] if names else str(item["label"])
    return json.dumps(said, ensure_ascii=False)
