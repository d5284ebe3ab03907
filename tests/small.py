"""The tiny systems as models, with the configurations they are built from."""

from functools import cache
from unittest import mock

import numpy as np
import torch
from PIL import Image

from arvis import systems
from arvis.model import Model


@cache
def built(slug: str):
    """(system, config) of a system's `tiny()`."""
    module, configs = systems.system(slug), []
    build = module.build

    def seen(config):
        configs.append(config)
        return build(config)

    torch.manual_seed(0)
    with mock.patch.object(module, "build", seen):
        system = module.tiny()
    return system, configs[-1]


def small(slug: str) -> Model:
    """A fresh `Model` of the tiny system; all of them share the same weights."""
    system, config = built(slug)
    return Model(system, slug=slug, name=f"{slug}-tiny", config=config, settings={}, source={"licence": "MIT"})


def request(slug: str) -> dict[str, str | int]:
    """A condition that the tiny system takes."""
    return {"prompt": "red apple"} if "prompt" in built(slug)[0].conditions else {"class_labels": 1}


def picture(size: int = 40, seed: int = 0) -> Image.Image:
    """Random blobs."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST)


def halves(size: int = 48) -> Image.Image:
    """A mask, white in its right half."""
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 2, 0, size, size))
    return mask
