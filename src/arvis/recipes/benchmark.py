"""The emoji benchmark of a loaded model: what it paints and reconstructs, as report.md, report.json and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis.data.emoji import load_emoji
from arvis.data.images import grid, save_image, to_pil, to_tensor
from arvis.evaluation.emoji import EmojiEvaluation, EmojiReport, evaluate
from arvis.noise import Noise
from arvis.training import checkpoint


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
