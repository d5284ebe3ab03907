"""Speed of generation on this machine, with random weights: `python scripts/bench.py [PRESET ...] [--batch 1 4]`.

Without names: the first preset of every system. Prints one line per preset and batch size: parameters, seconds until
the first step, seconds in all, pictures per second, decoding included. The best of three runs counts.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from arvis import systems
from arvis.noise import Noise
from arvis.training.precision import Precision, pick
from arvis.walk import generate


def measure(system: torch.nn.Module, batch: int, precision: Precision) -> tuple[float, float]:
    """Seconds until the first step and until the pictures are there."""
    cond = system.prepare({"prompt": ["a red apple"] * batch, "class_labels": [0] * batch})
    start, first = time.perf_counter(), 0.0
    with precision.around(), torch.inference_mode():
        for step in generate(system, cond, system.Sampling(), Noise(torch.arange(batch))):
            first = first or time.perf_counter() - start
            last = step.state
        system.tokenizer.decode(last.tokens, last.layout)
    if precision.device == "cuda":
        torch.cuda.synchronize()
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="such as var-d16; see `arvis systems`")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    runs = [name for name, row in systems.SYSTEMS.items() if row.kind == "system"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    precision = pick(device)
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}; {precision.reason}")
    for name in given.presets or runs:
        slug, preset, found = systems.preset(name)
        system = systems.system(slug).build(found.config()).eval().to(device)
        size = sum(p.numel() for p in system.parameters()) / 1e6
        for batch in given.batch:
            first, total = min((measure(system, batch, precision) for _ in range(3)), key=lambda seconds: seconds[1])
            told = f"first step {first:7.3f} s, all {total:7.3f} s, {batch / total:8.2f} pictures/s"
            print(f"{preset:16} {size:8.1f} M parameters, batch {batch}: {told}", flush=True)


if __name__ == "__main__":
    main()
