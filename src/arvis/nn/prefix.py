"""Conditions as rows before the sequence: a class, frozen text features, words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.request import class_labels, labels_where, prompts
from arvis.nn.text import TextConfig, TextEncoder


class Prefix(NamedTuple):
    """Rows [B, T, D] that start a sequence; `visible` bool [B, T] where some of them are padding."""

    rows: Tensor
    visible: Tensor | None = None


class Prefixer(Protocol):
    """An nn.Module from raw conditions to `length` rows; `prepare` reads the names in `conditions`."""

    conditions: tuple[str, ...]
    length: int

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]: ...

    def __call__(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Prefix:
        """Rows of the conditions, those of items with `null_B` True (of all without `cond`) as "no condition"."""
        ...


class ClassPrefix(nn.Module):
    """One row: that of the class in a learned table, whose last row is "no class"."""

    conditions = ("class_labels",)
    length = 1

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        return class_labels(request, self.num_classes, self.embedding.weight.device)

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Prefix:
        labels = labels_where(cond, null_B, self.num_classes)
        return Prefix(self.embedding(labels)[:, None])


class FeaturePrefix(nn.Module):
    """`length` rows of frozen text features [B, T, C], moved to the right end, through a small network.

    Rows without text are padding, also where the condition is dropped: "no text" are stored features of every row, and
    those in the place of text are seen. `encode(prompts, device)` gives features and which of them are text; a request
    may hold them itself ("text_features", and "text_visible" where not all rows are text).
    """

    conditions = ("prompt",)
    null: Tensor

    def __init__(
        self, channels: int, width: int, length: int, encode: Callable[[list[str], torch.device], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.length, self.channels, self.encode = length, channels, encode
        self.fc1 = nn.Linear(channels, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("null", nn.init.normal_(torch.empty(length, channels), std=channels**-0.5))

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        features, visible = request.get("text_features"), request.get("text_visible")
        if features is None:
            features, visible = self.encode(prompts(request), self.null.device)
        features = torch.as_tensor(features).to(self.null)
        if features.dim() != 3 or features.shape[2] != self.channels or features.shape[1] > self.length:
            raise ValueError(
                f"text_features are [B, at most {self.length}, {self.channels}], got shape {tuple(features.shape)}"
            )
        visible = torch.ones(features.shape[:2]) if visible is None else torch.as_tensor(visible)
        visible = visible.to(features.device, torch.bool)
        if visible.shape != features.shape[:2]:
            raise ValueError(f"text_visible says of each row whether it is text, got shape {tuple(visible.shape)}")
        room = self.length - features.shape[1]
        features, visible = F.pad(features, (0, 0, room, 0)), F.pad(visible, (room, 0))
        order = visible.long().argsort(dim=1, stable=True)  # padding first, text in its order
        visible = visible.gather(1, order)
        features = features.gather(1, order[..., None].expand_as(features)) * visible[..., None]
        return {"text_features": features, "text_visible": visible}

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Prefix:
        rows, visible = self.null.expand(len(null_B), -1, -1), None
        if cond is not None:
            rows, visible = torch.where(null_B[:, None, None], rows, cond["text_features"]), cond["text_visible"]
        return Prefix(self.fc2(F.gelu(self.fc1(rows), approximate="tanh")), visible)


class WordPrefix(nn.Module):
    """A summary and one row per word, of an encoder that is trained along; "no prompt" is the empty prompt.

    Rows past the last word are seen like any others: they say that there are no more words.
    """

    conditions = ("prompt",)

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.length = 1 + config.words
        self.encoder = TextEncoder(config)
        self.project = nn.Linear(config.width, width, bias=False)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        return self.encoder.prepare(request)

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Prefix:
        return Prefix(self.project(self.encoder.read(cond, null_B)[0]))
