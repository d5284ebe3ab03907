"""CLIP score (arXiv 2104.08718): how well a picture goes with a text, by a CLIP of the package transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.data.images import to_bytes

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP has learned from (arXiv 2103.00020)."""


class ClipReward:
    """2.5 max(0, cos) of the embeddings of pictures and texts, by a model of the hub or in a folder.

    Texts are put as they are, without a prefix. Raises ImportError without transformers, and ValueError where the model
    cannot be loaded; both at the first pictures.
    """

    def __init__(self, model: str = "openai/clip-vit-base-patch32") -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor:
        tokenize, clip = _loaded(self.model, str(image.device))
        size = clip.config.vision_config.image_size
        told = tokenize(list(asked), padding=True, truncation=True, return_tensors="pt").to(image.device)
        with torch.autocast(image.device.type, enabled=False):
            out = clip(
                input_ids=told["input_ids"],
                attention_mask=told["attention_mask"],
                pixel_values=normalised(image, size).to(clip.dtype),
            )
        a, b = (F.normalize(x.double(), dim=-1) for x in (out.image_embeds, out.text_embeds))
        texts = torch.arange(len(asked), device=a.device)
        return 2.5 * (a * b[texts]).sum(-1).clamp_min(0).cpu()


def normalised(image: Tensor, size: int) -> Tensor:
    """Pictures as CLIP reads them: the shorter side brought to `size`, the middle, mean and deviation gone."""
    x = to_bytes(image).float() / 255
    y, w = x.shape[2:]
    scale = size / min(y, w)
    sides = (max(size, round(y * scale)), max(size, round(w * scale)))
    x = F.interpolate(x, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    mean, deviation = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (x[:, :, top : top + size, left : left + size] - mean) / deviation


@lru_cache(maxsize=2)
def _loaded(model: str, device: str) -> tuple[Any, Any]:
    """(tokenizer, CLIP), frozen."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ImportError(f"CLIP scores are of {model}, which needs transformers: pip install 'arvis[text]'") from error
    try:
        tokenize = transformers.AutoTokenizer.from_pretrained(model)
        clip = transformers.CLIPModel.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the CLIP {model} cannot be loaded, from the hub or as a folder: {reason}") from error
    return tokenize, clip.to(device).eval().requires_grad_(False)
