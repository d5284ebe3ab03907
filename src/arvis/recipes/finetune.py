"""A model continued on a folder of pictures: first how well its tokenizer can show them, then the request to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis import systems
from arvis.config import to_dict
from arvis.data.batches import Batches, BatchesConfig
from arvis.data.images import grid, save_image
from arvis.data.pictures import Pictures
from arvis.data.views import Views
from arvis.loading import picture_size
from arvis.nn.lora import LoraConfig
from arvis.recipes.classes import class_count, with_classes
from arvis.recipes.request import Stage, TrainRequest, request_for
from arvis.recipes.stages import SHOWN, reconstruction, reconstruction_psnr
from arvis.training import metrics
from arvis.weights import SAME_NAMES, load_official, save_pretrained

GOOD = 24.0
"""PSNR in dB from which a tokenizer is not what holds a fine-tuned model back."""
LARGE = 100_000_000
"""Parameters of a generator from which adapters are trained if nothing is said."""
RANK = 16
"""Their rank."""
LORA_LR = 1e-3
"""Their learning rate, at least; else that of the preset."""
MOST = 256
"""Pictures on which a tokenizer is looked at."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How well a tokenizer shows pictures: PSNR in dB of each, the name of the worst, and pairs to look at."""

    values: tuple[float, ...]
    worst: str
    pairs: Tensor

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, and what to do where it is bad."""
        told = f"it shows them at {self.mean:.1f} dB on average, {min(self.values):.1f} dB at worst ({self.worst})"
        if self.mean >= GOOD:
            return f"the tokenizer is good enough: {told}"
        return (
            f"the tokenizer is the bottleneck at {self.mean:.1f} dB: {told}, and no generator paints better than its "
            "tokenizer shows. Train its decoder on them first (--stage tokenizer), or choose a model with a better one"
        )

    def save(self, path: Path) -> None:
        """Originals above reconstructions; the worst comes first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(grid(self.pairs, len(self.pairs) // 2), path)


@torch.no_grad()
def fidelity(system: Any, pictures: Pictures) -> Fidelity:
    """Look at the first pictures of a folder, at most MOST of them; they have the longer side of the system's."""
    views, count = Views(pictures, picture_size(system)), min(MOST, len(pictures))
    batches = Batches(views, BatchesConfig(batch=1, shuffle=False))
    values = [float(reconstruction_psnr(system.tokenizer, batches.batch_at(i)["image"])) for i in range(count)]
    worst = min(range(count), key=values.__getitem__)
    shown = torch.cat([batches.batch_at(i)["image"] for i in [worst, *(i for i in range(count) if i != worst)][:SHOWN]])
    shown = shown.to(next(system.parameters()).device)
    pairs = torch.cat((shown, reconstruction(system.tokenizer, shown))).cpu()
    return Fidelity(values=tuple(values), worst=pictures.name(worst), pairs=pairs)


def finetuning(
    model: Any, pictures: Pictures, folder: Path, run: Path, *, stage: Stage = "generator", lora: int | None = None
) -> TrainRequest:
    """The request that continues a `Model` on a folder of pictures; the model is written to `run/start`.

    The preset's settings at a fifth of its learning rate (of adapters: all of it), batches of at most 64. `lora` is the
    rank of adapters, 0 for none; None chooses them for generators of more than a hundred million parameters. A
    class-conditional model gets a class table of the folder's classes, where those of equal names keep their rows.
    Stage "tokenizer" trains the decoder alone, so that tokens keep their meaning and the generator goes on working.
    """
    slug, config, start = model.slug, model.config, run / "start"
    tensors, tables = dict(model.system.state_dict()), list[str]()
    wanted = tuple(pictures.classes) or (folder.resolve().name,)
    known = tuple(model.source.get("classes", ()))
    if "class_labels" in model.system.conditions and class_count(config) and known != wanted and stage == "generator":
        config, tensors, tables = with_classes(slug, config, tensors, known, wanted)
    with torch.device("meta"):
        system = systems.system(slug).build(config)
    load_official(system, SAME_NAMES, {name: t.cpu() for name, t in tensors.items()}, source=model.name)
    about = {**model.source, "name": model.name, "sampling": model.settings, "classes": wanted if tables else known}
    save_pretrained(system, to_dict(config), start, system=slug, source=about)
    plain = request_for(_preset(model), stage, str(folder), run)
    batch = min(plain.fit.batch, 64)
    fit = replace(plain.fit, lr=plain.fit.lr / 5, warmup=20, batch=batch)
    request = replace(plain, init=start, config=config, sampling=model.settings)
    if stage == "tokenizer":
        return replace(request, fit=fit, only=("tokenizer.decoder.",))
    size = sum(p.numel() for n, part in model.system.parts().items() if n != "tokenizer" for p in part.parameters())
    rank = lora if lora is not None else RANK if size > LARGE else 0
    if rank:
        fit = replace(fit, lr=max(plain.fit.lr, LORA_LR), muon=(), weight_decay=0.0, weight_decay_final=None)
    return replace(request, fit=fit, lora=LoraConfig(rank=rank, also=tuple(tables)), base=model.name)


def outcome(run: Path) -> str:
    """What training changed, on pictures it learned from and on others, from the metrics of a run; "" without others.

    Says so where the loss on the others was lower earlier: that is overfitting.
    """
    rows = [row for row in metrics.read(run) if any(name.endswith("_heldout") for name in row)]
    if not rows:
        return ""
    name = next(name for name in rows[-1] if name.endswith("_heldout")).removesuffix("_heldout")
    first, last = rows[0], rows[-1]
    seen, held = (f"{first[f'{name}_{k}']:.2f} -> {last[f'{name}_{k}']:.2f}" for k in ("seen", "heldout"))
    text = f"{name}: {seen} on pictures it learned from, {held} on pictures held out"
    values = [row[f"{name}_heldout"] for row in rows]
    best = (max if name == "psnr" else min)(range(len(rows)), key=values.__getitem__)
    if abs(values[best] - values[-1]) > 0.01 * abs(values[-1]):
        text += (
            f"; it was best at step {rows[best]['step']}: fewer --steps, --lora or more pictures prevent overfitting"
        )
    return text


def _preset(model: Any) -> str:
    """The preset a model was made from, or the first of its system."""
    try:
        return systems.preset(model.name)[1]
    except KeyError:
        return systems.preset(model.slug)[1]
