"""Measure the data sets in the package: sizes, splits, and how fast they are read, in processor time of one core."""

import time
from importlib.resources import files

import torch

from arvis.data import open_data
from arvis.data.batches import Batches, BatchesConfig
from arvis.data.emoji import load_emoji
from arvis.data.scenes import Scenes


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    emoji = load_emoji()
    emoji.all_images()
    print(f"emoji: {len(emoji)} pictures decoded in {time.process_time() - start:.2f} s")
    train, held = emoji.split("train"), emoji.split("heldout")
    compositions = sum(row.is_composition for row in emoji.rows)
    print(f"splits: {len(train)} train, {len(held)} held out, of {compositions} compositions")
    size = len(files("arvis.data").joinpath("emoji64.zip").read_bytes())
    print(f"file: {size / 1e6:.2f} MB; {emoji.sources['font']}; {emoji.sources['names']}")
    scenes = Scenes()
    for label, first in (("first", 0), ("later", 10_000)):
        start = time.process_time()
        for i in range(first, first + 10_000):
            scenes[i]
        print(f"scenes: {10_000 / (time.process_time() - start):,.0f} a second ({label} 10,000)")
    batches = Batches(open_data("emoji", 64), BatchesConfig(batch=64))
    start = time.process_time()
    for step in range(100):
        batches(step)
    print(f"batches of emoji: {6400 / (time.process_time() - start):,.0f} pictures a second")


if __name__ == "__main__":
    main()
