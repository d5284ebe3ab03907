"""What a user asks for ("class_labels", "prompt"), checked and as tensors, and the same without the condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def class_labels(request: dict[str, Any], num_classes: int, device: torch.device) -> dict[str, Tensor]:
    """The classes of a request, int64 [B]; `num_classes` itself is "no class". ValueError for others, or none."""
    labels = request.get("class_labels")
    if labels is None:
        raise ValueError(f"class_labels are needed: integers 0..{num_classes} ({num_classes} = no class)")
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device).reshape(-1)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise ValueError(f"class_labels lie in 0..{num_classes}, got {int(labels.min())}..{int(labels.max())}")
    return {"class_labels": labels}


def labels_where(cond: dict[str, Tensor] | None, null_B: Tensor, num_classes: int) -> Tensor:
    """The classes of conditions [B], "no class" where `null_B` is True, and everywhere without conditions."""
    labels = torch.full_like(null_B, num_classes, dtype=torch.int64)
    return labels if cond is None else torch.where(null_B, labels, cond["class_labels"])


def prompts(request: dict[str, Any]) -> list[str]:
    """The prompts of a request. ValueError where there are none."""
    prompt = request.get("prompt")
    if prompt is None:
        raise ValueError('a prompt is needed, such as "a red apple"; "" paints without one')
    return [prompt] if isinstance(prompt, str) else list(prompt)
