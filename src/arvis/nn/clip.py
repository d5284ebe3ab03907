"""Frozen text features: the text encoder of a CLIP (arXiv 2103.00020) from the hub, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def clip_features(
    prompts: Sequence[str], repo: str, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(states [B, T, C], their summary [B, C], which states are text, bool [B, T]) of prompts, float32, T = `length`.

    The summary is the last state of the text, after the final norm. Longer prompts are cut. The encoder is that of a
    latent diffusion model `repo` (a hub name, or a folder with `tokenizer` and `text_encoder`), loaded once per device
    and kept, on a GPU in bfloat16. Raises ImportError without transformers, and ValueError where it cannot be loaded.
    """
    tokenize, encoder = _encoder(repo, str(device))
    told = tokenize(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    ids, visible = told["input_ids"].to(device), told["attention_mask"].to(device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        out = encoder(input_ids=ids, attention_mask=visible)
    return out.last_hidden_state.float(), out.pooler_output.float(), visible.bool()


@lru_cache(maxsize=2)
def _encoder(repo: str, device: str) -> tuple[Any, Any]:
    """(tokenizer, encoder), the encoder frozen."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ImportError(f"prompts are read by {repo}, which needs transformers: pip install 'arvis[text]'") from error
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        tokenize = transformers.CLIPTokenizer.from_pretrained(repo, subfolder="tokenizer")
        encoder = transformers.CLIPTextModel.from_pretrained(repo, subfolder="text_encoder", dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the text encoder {repo} cannot be loaded, from the hub or as a folder: {reason}") from error
    return tokenize, encoder.to(device).eval().requires_grad_(False)
