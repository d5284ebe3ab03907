"""Commands that train: train, finetune."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from arvis import systems
from arvis.cli.settings import Set
from arvis.cli.terminal import first_process, log_lines, place_for_folder, progress
from arvis.config import override

GOOD = 24.0
"""PSNR in dB from which a tokenizer is not what holds a fine-tuned model back."""


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
    """Train one stage of a model; the run folder keeps settings, curves, pictures, checkpoints and the model.

    Args:
        name: A preset, such as brush-64.
        stage: The tokenizer first, then the generator on its tokens (what is trained if nothing is said).
        data: "emoji", "scenes", "emoji+scenes" (if nothing is said), a folder of pictures, .parquet or .tar files.
        run: The run folder.
        init: A folder with weights to start from (RUN/model of an earlier stage).
        steps: Updates; the length of the schedule. The preset knows how many.
        minutes: Stop after this time, and save; --resume goes on.
        resume: Go on where the run in this folder stopped, for whatever reason, with its settings.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Further settings: fit.lr=3e-4 fit.batch=32 model.scale.depth=6 levels=4 size=64.
    """
    from arvis import recipes

    _, full, _ = systems.preset(name)
    request = recipes.resumed(run) if resume else None
    if request is None:
        plain = recipes.request_for(full, stage or "generator", data or "emoji+scenes", run)
        request = replace(plain, init=init, resume=resume)
    if full != request.name or stage not in (None, request.stage):
        asked = f"{full} --stage {stage}" if stage else full
        raise ValueError(f"{run} is a run of {request.name} --stage {request.stage}, not of {asked}")
    request = replace(request, data=data or request.data, init=init or request.init)
    _train(replace(request, device=device), steps, minutes, set)


def finetune(
    folder: Positional[Path],
    /,
    model: str = systems.DEFAULT,
    run: Path = Path("runs/finetune"),
    steps: int = 500,
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
        steps: Updates.
        minutes: Stop after this time, and save.
        resume: Go on where the run stopped, with its settings.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Further settings, as in `arvis train`.
    """
    import arvis
    from arvis import recipes
    from arvis.data.folders import FolderSource, open_folder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"finetune is for one process; torchrun takes arvis train --init MODEL --data {folder}")
    source, start = FolderSource(folder), run / "start"
    request = recipes.resumed(run) if resume else None
    if request is None:
        loaded = arvis.load(model, device=device)
        recipes.refuse_existing(run)
        place_for_folder(run)
        request = recipes.finetuning(loaded, folder, run, loaded.save_pretrained(start))
        pictures = open_folder(folder, loaded.size[0])
        psnr = recipes.tokenizer_psnr(loaded.system, pictures)
        verdict = "good" if psnr >= GOOD else "it will be the bottleneck: a tokenizer trained on them would show more"
        broken = f", {len(pictures.skipped)} of them unreadable" * bool(pictures.skipped)
        print(f"{len(source)} pictures{broken}; the tokenizer shows them at {psnr:.1f} dB ({verdict})")
        if "prompt" in loaded.system.conditions and not source.record(0).caption:
            print("no captions and no class folders: they are learned without a prompt, and painted by the prompt ''")
    _train(replace(request, data=str(folder), device=device), steps, minutes, set)
    print(f"try: arvis generate {_example(source, request)} --model {run / 'model'}")


def _train(request: Any, steps: int | None, minutes: float | None, set: Sequence[str]) -> None:
    """Train with the changes that flags ask for, a bar or a line a minute on stderr, and a last line on stdout."""
    from arvis import recipes

    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is a time to train for, more than 0, got {minutes}")
    fit = {key: value for key, value in (("steps", steps), ("minutes", minutes)) if value is not None}
    model = [text.removeprefix("model.") for text in set if text.startswith("model.")]
    request = replace(request, fit=replace(request.fit, **fit), set=(*request.set, *model))
    request = override(request, [text for text in set if not text.startswith("model.")])
    place_for_folder(request.run)
    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    with log_lines(), progress(request.fit.steps, "step", layout) as bar:
        told = -60.0

        def show(info: Any) -> None:
            nonlocal told
            bar.update(info.step - bar.n)
            bar.set_postfix_str(info.line, refresh=False)
            if bar.disable and (time.monotonic() - told >= 60 or info.step == info.steps):
                told = time.monotonic()
                print(f"step {info.step} of {info.steps}: {info.line}", file=sys.stderr, flush=True)

        result = recipes.train(request, on_step=show)
    if not first_process():
        return
    again = "" if result.stopped == "done" else "; --resume goes on"
    print(f"{result.stopped} at step {result.step} of {request.fit.steps}{again}")
    print(f"model: {request.run / 'model'}, report: {request.run / 'report.html'}")


def _example(source: Any, request: Any) -> str:
    """A request for the first picture of a folder, as one would type it."""
    import torch

    slug, _, _ = systems.preset(request.name)
    with torch.device("meta"):
        system = systems.system(slug).build(request.config)
    record = source.record(0)
    return str(record.label) if "class_labels" in system.conditions else json.dumps(record.caption, ensure_ascii=False)
