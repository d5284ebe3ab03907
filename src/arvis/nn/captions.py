"""Text as a condition: features pooled into the vector that starts and modulates, and projected for cross-attention.

Features come from a frozen encoder, or from one that is trained along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.pool import AttentivePool
from arvis.nn.scales import Condition
from arvis.nn.t5 import t5_features
from arvis.nn.text import TextConfig, TextEncoder


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The frozen encoder `repo` of the hub, `channels` wide; prompts are cut after `length` tokens."""

    repo: str = "google/flan-t5-xl"
    channels: int = 2048
    length: int = 512


class TextPath(nn.Module):
    """Features [B, T, C] of which some are text -> a condition: pooled they start the sequence and modulate, projected
    they are what cross-attention reads."""

    def __init__(self, channels: int, width: int, pool_heads: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps)
        self.pool = AttentivePool(channels, width, pool_heads)
        self.project = nn.Sequential(nn.Linear(channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))

    def forward(self, features: Tensor, visible: Tensor) -> Condition:
        features = self.norm(features)
        pooled = self.pool(features, visible)
        return Condition(pooled, pooled, (self.project(features), visible))


def null_rows(length: int, channels: int) -> Tensor:
    """The official initial features of "no prompt" [length, channels]: fixed numbers, on the host."""
    rows = torch.empty(length, channels, device="cpu")
    nn.init.trunc_normal_(rows, std=1.2, generator=torch.Generator("cpu").manual_seed(0))
    return rows / channels**0.5


def longest(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose "text", where it says what of it is "visible", is as long as the longest text.

    Nothing reads padding, so what a model makes of the batch is the same; it cannot be joined with others any more.
    """
    if "visible" not in cond:
        return cond
    some = cond["visible"].any(0).nonzero()
    count = int(some[-1]) + 1 if len(some) else 1
    return {**cond, "text": cond["text"][:, :count], "visible": cond["visible"][:, :count]}


class CaptionConditioner(nn.Module):
    """Prompts as features of a frozen encoder; "no prompt" has learned ones, cut to the length of the item's prompt.

    A request has a "prompt", or "text_features" [B, T, C] with "text_visible" [B, T] where not all are text; a
    "negative_prompt" (or "negative_features", "negative_visible") takes the place of "no prompt".
    """

    conditions = ("prompt",)

    def __init__(self, config: CaptionConfig, width: int, pool_heads: int, eps: float) -> None:
        super().__init__()
        self.config = config
        self.null = nn.Parameter(torch.empty(config.length, config.channels))
        self.null.data.copy_(null_rows(config.length, config.channels))
        self.path = TextPath(config.channels, width, pool_heads, eps)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        features, visible = self._read(request, "text_features", "text_visible", "prompt")
        if features is None:
            raise ValueError('a prompt is needed, such as "a red apple"')
        out = {"text": features, "visible": visible}
        features, visible = self._read(request, "negative_features", "negative_visible", "negative_prompt")
        if features is not None:
            items = len(out["text"])
            out |= {"negative": features.expand(items, -1, -1), "negative_visible": visible.expand(items, -1)}
        return out

    def _read(self, request: dict[str, Any], name: str, shown: str, prompt: str) -> tuple[Any, Any]:
        """(features, visible) of a request, or (None, None)."""
        features, visible, told = request.get(name), request.get(shown), request.get(prompt)
        if features is None:
            if told is None:
                return None, None
            prompts = [told] if isinstance(told, str) else list(told)
            features, visible = t5_features(prompts, self.config.repo, self.config.length, self.null.device)
        features = torch.as_tensor(features).to(self.null)
        most, channels = self.config.length, self.config.channels
        if features.dim() != 3 or features.shape[2] != channels or not 0 < features.shape[1] <= most:
            raise ValueError(f"{name} are [B, 1 to {most}, {channels}], got shape {tuple(features.shape)}")
        visible = torch.ones(features.shape[:2]) if visible is None else torch.as_tensor(visible)
        visible = visible.to(features.device, torch.bool)
        if visible.shape != features.shape[:2]:
            raise ValueError(f"{shown} says of each row whether it is text, got shape {tuple(visible.shape)}")
        return features, visible

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition:
        if cond is None:
            every = torch.ones(len(null_B), len(self.null), dtype=torch.bool, device=self.null.device)
            return self.path(self.null.expand(len(null_B), -1, -1), every)
        text, visible = cond["text"], cond["visible"]
        other, shown = self.null[: text.shape[1]].expand_as(text), visible
        if "negative" in cond:
            more = cond["negative"].shape[1] - text.shape[1]
            text, visible = F.pad(text, (0, 0, 0, max(0, more))), F.pad(visible, (0, max(0, more)))
            other = F.pad(cond["negative"], (0, 0, 0, max(0, -more)))
            shown = F.pad(cond["negative_visible"], (0, max(0, -more)))
        return self.path(torch.where(null_B[:, None, None], other, text), torch.where(null_B[:, None], shown, visible))


class WordConditioner(nn.Module):
    """Prompts as rows of an encoder that is trained along; "no prompt" is the empty prompt."""

    conditions = ("prompt",)

    def __init__(self, config: TextConfig, width: int, pool_heads: int, eps: float) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        self.path = TextPath(config.width, width, pool_heads, eps)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        return self.encoder.prepare(request)

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition:
        return self.path(*self.encoder.read(cond, null_B))
