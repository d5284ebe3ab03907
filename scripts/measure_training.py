"""What encoding pictures once and adapters save: `python scripts/measure_training.py [PRESET ...]`, random weights.

Processor time of one core for one picture, the better of two: encoding it, an update of the generator on its latents,
and an update of adapters of rank 8. Prints the factor by which updates on stored latents are quicker, and how many
parameters have gradients. Without names: the small preset of every system.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from arvis import systems
from arvis.loading import picture_size
from arvis.nn.lora import LoraConfig, adapt
from arvis.noise import Noise
from arvis.recipes import trainable

ROWS = 4
"""Pictures in an update of a small preset; others get one."""


def best(call: Callable[[], Any]) -> float:
    """Processor seconds of the better of two calls."""
    spent = []
    for _ in range(2):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return min(spent)


def measure(name: str) -> str:
    """One line about a preset."""
    slug, full, preset = systems.preset(name)
    torch.manual_seed(0)
    system = systems.system(slug).build(preset.config()).train()
    system.tokenizer.requires_grad_(False).eval()
    rows, (y, x) = 1 if preset.files else ROWS, picture_size(system)
    image = torch.rand(rows, 3, y, x) * 2 - 1
    with torch.no_grad():
        latents = system.latents(image)
        encode = best(lambda: system.latents(image)) / rows
    batch = {**latents, "prompt": ["a red apple"] * rows, "class_labels": torch.zeros(rows, dtype=torch.int64)}

    def update() -> None:
        system.loss(batch, Noise.of(0, rows))["loss"].backward()
        system.zero_grad(set_to_none=True)

    whole, count = best(update) / rows, sum(p.numel() for p in system.parameters() if p.requires_grad)
    adapt(system, LoraConfig(rank=8), [part for part_name, part in system.parts().items() if part_name != "tokenizer"])
    thin, few = best(update) / rows, sum(p.numel() for p in system.parameters() if p.requires_grad)
    return (
        f"{full:20} encode {1e3 * encode:8.1f} ms   update {1e3 * whole:9.1f} ms   stored: x{1 + encode / whole:.2f}   "
        f"adapters: {1e3 * thin:9.1f} ms, {few / 1e6:.2f} of {count / 1e6:.1f} M parameters"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    slugs = [slug for slug, row in systems.SYSTEMS.items() if row.kind == "system"]
    for name in sys.argv[1:] or [trainable(slug) for slug in slugs]:
        print(measure(name), flush=True)
