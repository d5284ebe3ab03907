"""`python -m benchmarks.peak PAIR BATCH DTYPE`: the most memory of a generation of ours, as JSON in megabytes.

"peak" is the most resident memory while pictures are made, less that of the process before anything was built; "kept"
are the bytes of weights and caches. Linux.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arvis import systems
from arvis.nn.packed import Packed, pack
from arvis.noise import Noise
from arvis.walk import walk
from benchmarks.pairs import named


def status(name: str) -> int:
    """Kilobytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def weight_bytes(module: nn.Module) -> int:
    stored = [*module.parameters(), *module.buffers()]
    return sum(x.store.bytes if isinstance(x, Packed) else x.numel() * x.element_size() for x in stored)


@torch.inference_mode()
def once(system: Any, batch: int, settings: dict[str, Any]) -> int:
    """Generate and decode a batch under the null condition, which takes as much; returns the bytes of the caches."""
    s = system.start(None, replace(system.Sampling(), **settings), Noise.of(0, batch))
    for _ in walk(system, s):
        pass
    held = sum(x.numel() * x.element_size() for c in s.cache.values() for x in (*c.k.values(), *c.v.values()))
    s.cache.clear()  # as `Model` does
    system.tokenizer.decode(s.tokens, s.layout)
    return held


def main() -> None:
    name, batch, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    before = status("VmRSS")
    slug, config, settings = named(name).generation()
    system = systems.system(slug).build(config).eval()
    del system.tokenizer.encoder  # it does not paint
    pack(system)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        held = once(system, batch, settings)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        once(system, batch, settings)
    kept = weight_bytes(system) + held
    print(json.dumps({"peak": (status("VmHWM") - before) / 1e3, "kept": kept / 1e6}))


if __name__ == "__main__":
    main()
