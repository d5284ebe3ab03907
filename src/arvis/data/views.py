"""Several views of each picture: cut at fixed places and mirrored, as LlamaGen's ten-crop codes are made."""

from __future__ import annotations

from typing import Any

from arvis.data.batches import Dataset

MARGIN = 1.1
"""Pictures that are cut have this many times the size of what is cut from them (LlamaGen, official code)."""

PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
"""Where the views lie, as parts of the margin from the top and the left: the middle, then the corners."""


def source_size(size: tuple[int, int], crops: int = 1) -> int:
    """The side of the square pictures that views of `size` (Y, X) are cut from."""
    return max(size) if crops == 1 else round(max(size) * MARGIN)


class Views:
    """A data set each of whose pictures is there `crops` times (1 to 5), and mirrored as often again with `flip`.

    Item i shows view i mod v of picture i div v, v views each, of `size` (Y, X), cut from squares of `source_size`.
    """

    def __init__(self, dataset: Dataset, size: tuple[int, int], crops: int = 1, flip: bool = False) -> None:
        if not 1 <= crops <= len(PLACES):
            raise ValueError(f"crops is the number of views cut from a picture, 1 to {len(PLACES)}, got {crops}")
        self.dataset, self.size, self.crops, self.flip = dataset, size, crops, flip
        self.classes = dataset.classes

    @property
    def views(self) -> int:
        """How many views each picture has."""
        return self.crops * (1 + self.flip)

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture, view = divmod(i, self.views)
        item = self.dataset[picture]
        image, place = item["image"], PLACES[view % self.crops]
        (height, width), sides = self.size, image.shape[-2:]
        top, left = round(place[0] * (sides[0] - height)), round(place[1] * (sides[1] - width))
        image = image[..., top : top + height, left : left + width]
        return {**item, "image": image.flip(-1) if view >= self.crops else image}
