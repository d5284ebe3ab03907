"""The digits that small systems learn to draw: 1,797 real ones, which come with scikit-learn.

`learn_pictures` and `learn_tokens` are the stages in which they are learned, in run folders that are gone afterwards;
`drawn` and `recognised` say whether a system draws what it was asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most
from arvis.noise import Noise
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate

CLASSES = 10


class Digits(NamedTuple):
    """Images [n, 3, 32, 32] in [-1, 1] and labels [n]; nobody who trains sees the test part."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def first(self, count: int, test_count: int) -> Digits:
        """So many of each part."""
        return Digits(
            self.images[:count], self.labels[:count], self.test_images[:test_count], self.test_labels[:test_count]
        )

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


def learn_pictures(tokenizer: Any, data: Digits, steps: int, on_step: OnStep) -> None:
    """A tokenizer learns the training digits by squared error, from a codebook of their features; then it rests."""
    with torch.no_grad():
        tokenizer.init_(tokenizer.features(data.images[:256]), tokenizer.layout(), Noise.of(0))
    terms = TokenizerLossConfig(l1=0.0, l2=1.0, vq=1.0, revive_every=0)
    config = FitConfig(
        steps=steps,
        batch=32,
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        schedule="constant",
        clip=0.0,
        precision="float32",
    )
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        fit(
            tokenizer,
            lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms, updates=batch["step"]),
            lambda step: {"image": data.images[_rows(step, 32, data)]},
            config,
            Path(folder) / "run",
            on_step=lambda info: on_step(),
        )
    tokenizer.eval().requires_grad_(False)


def learn_tokens(
    module: Any,
    loss: Callable[[dict[str, Any], Noise], dict[str, Tensor]],
    tokens: Tensor,
    data: Digits,
    config: FitConfig,
    on_step: OnStep,
) -> None:
    """A generator learns the tokens of the training digits, with their labels, by its own loss."""

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(step, config.batch, data)
        return {"tokens": tokens[rows], "class_labels": data.labels[rows]}

    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        fit(module, loss, batch, config, Path(folder) / "run", on_step=lambda info: on_step())


def _rows(step: int, batch: int, data: Digits) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


def drawn(system: Any, data: Digits, sampling: Any, each: int = 20, seed: int = 3, told: bool = True) -> float:
    """The share of drawn digits, `each` of every class, that are recognised as theirs; untold nobody says which."""
    labels = torch.arange(CLASSES).repeat(each)
    cond = system.prepare({"class_labels": labels if told else torch.full_like(labels, CLASSES)})
    tokens = finish(generate(system, cond, sampling, Noise.of(seed, len(labels)))).tokens
    return data.recognised(system.tokenizer.decode(tokens), labels)


def recognised(
    system: Any, data: Digits, sampling: Any, least: float, each: int = 20, seed: int = 3
) -> tuple[Claim, Claim]:
    """Drawn digits are taken for their class by their nearest real neighbours, and without a class are not."""
    shares = [drawn(system, data, sampling, each, seed, told) for told in (True, False)]
    return (
        at_least("share of drawn digits recognised as their class", shares[0], least),
        at_most("share recognised as that class when none was given", shares[1], 0.25),
    )
