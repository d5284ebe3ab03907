"""Draw the picture that opens the README: prompts painted coarse to fine by the model in the box.

.venv/bin/python scripts/draw_readme.py docs/images/painted.png
"""

import sys

from PIL import Image

import arvis
from arvis.data.images import grid, save_image

PROMPTS = (
    "red apple",
    "woman astronaut: medium-dark skin tone",
    "pizza",
    "grinning face",
    "a red car on a green background",
    "man firefighter: light skin tone",
    "Christmas tree",
    "a blue guitar",
)


def main(out: str) -> None:
    model = arvis.load("brush")
    steps = [step.pictures() for step in model.stream(PROMPTS, seed=3)]
    cells = [picture.resize((96, 96), Image.Resampling.NEAREST) for pictures in steps for picture in pictures]
    save_image(grid(cells, len(PROMPTS)), out, {"prompts": PROMPTS, "model": model.name, "seed": 3})


if __name__ == "__main__":
    main(*sys.argv[1:])
