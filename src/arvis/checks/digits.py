"""The digits that small systems learn to draw: 1,797 real ones, which come with scikit-learn."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10


class Digits(NamedTuple):
    """Images [n, 3, 32, 32] in [-1, 1] and labels [n]; nobody who trains sees the test part."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def recognised(self, images: Tensor, labels: Tensor, neighbours: int = 5) -> float:
        """The share of images that a vote of the nearest real training images takes for their label."""
        distance = torch.cdist(images.mean(1).flatten(1), self.images.mean(1).flatten(1))
        votes = self.labels[distance.topk(neighbours, largest=False).indices]
        return float((votes.mode(1).values == labels).float().mean())


@cache
def digits() -> Digits:
    """The digits that come with scikit-learn; 1,500 to train, 297 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'arvis[dev]'") from error
    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    small = torch.from_numpy(found.images).float()[order, None] / 8 - 1
    images = F.interpolate(small, size=32, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(found.target).long()[order]
    return Digits(images[:1500], labels[:1500], images[1500:], labels[1500:])
