"""One sheet of what several trained models paint: `python scripts/draw_runs.py OUT.png RUN [RUN ...]`.

A run is a folder of `arvis train`. The first row are true pictures of the emoji world, then one row per run, painted
for the same names (or their groups, where a model takes classes) from the same seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import arvis
from arvis.data.emoji import load_emoji
from arvis.data.images import grid, save_image, to_network, to_tensor

NAMES = (
    "red apple",
    "orange heart",
    "woman pilot",
    "flag: Aruba",
    "pizza",
    "grinning face",
    "dog face",
    "full moon",
    "person in bed",
    "sunflower",
    "bus",
    "man: beard",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    emoji = load_emoji(64)
    items = [emoji[emoji.find(name)] for name in NAMES]
    rows = [to_network(torch.stack([item["image"] for item in items]))]
    for run in given.runs:
        model = arvis.load(run / "model")
        if "prompt" in model.system.conditions:
            pictures = model.generate(NAMES, seed=1)
        else:
            pictures = model.generate(class_labels=[item["label"] for item in items], seed=1)
        rows.append(to_network(torch.stack([to_tensor(picture) for picture in pictures])))
        print(run, flush=True)
    sheet = grid(torch.cat(rows), len(NAMES))
    save_image(sheet.quantize(256, dither=Image.Dither.NONE), given.out)


if __name__ == "__main__":
    main()
