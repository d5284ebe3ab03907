"""The memory that loading official files takes: python scripts/measure_loading.py [MODEL]

Random weights are written under the official names in three kinds of files, in a temporary folder; each is loaded in a
process of its own. Linux only: own memory is what no file backs.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from arvis import load, systems
from arvis.weights import to_official, told

KINDS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32, before torch 1.6": (torch.float32, {"_use_new_zipfile_serialization": False}),
}


def write(name: str, folder: Path, dtype: torch.dtype, options: dict) -> int:
    """The official files of a model with random weights; their size."""
    slug, _, preset = systems.preset(name)
    config = preset.config()
    system, keys = systems.system(slug).build(config), systems.system(slug).keys(config)
    for part, file in preset.files.items():
        official = to_official(system.parts()[part], keys[part])
        tensors = {n: t.to(dtype if t.is_floating_point() else t.dtype).clone() for n, t in official.items()}
        place = file.inside.split("|")[0]
        torch.save({place: tensors} if place else tensors, folder / Path(file.name).name, **options)
    return sum(path.stat().st_size for path in folder.iterdir())


def own() -> int:
    """Bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says what memory is backed by files"
    return int(found[1]) * 1024


def measure(name: str, folder: str) -> None:
    load("brush")  # what the libraries take is not counted
    before, most, done = own(), own(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = load(name, weights=folder)
    spent = time.perf_counter() - began
    done.set()
    watcher.join()
    print(f"{told(max(most - before, 0))} at most, {told(max(own() - before, 0))} after, {spent:.1f} s ({model.name})")


def main(name: str = "var-d16") -> None:
    for kind, (dtype, options) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            size = write(name, Path(folder), dtype, options)
            asked = [sys.executable, __file__, name, folder]
            done = subprocess.run(asked, env={**os.environ}, capture_output=True, text=True, check=True)
            print(f"{name}, {kind}: files of {told(size)}, own memory {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) == 3 else main(*sys.argv[1:])
