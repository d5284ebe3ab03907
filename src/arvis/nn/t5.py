"""Frozen text features: the encoder of a T5 (arXiv 1910.10683) from the hub, through the package transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def t5_features(
    prompts: Sequence[str], repo: str, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(features [B, T, C] float32, which of them are text, bool [B, T]) of prompts, T = `length`; text comes first.

    Longer prompts are cut. The encoder `repo` (a hub name, or a folder) is loaded once per device and kept, on a GPU in
    bfloat16. Raises ImportError without transformers, and ValueError where the encoder cannot be loaded.
    """
    tokenize, encoder = _encoder(repo, str(device))
    told = tokenize(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    ids, visible = told["input_ids"].to(device), told["attention_mask"].to(device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        features = encoder(input_ids=ids, attention_mask=visible).last_hidden_state
    return features.float(), visible.bool()


@lru_cache(maxsize=2)
def _encoder(repo: str, device: str) -> tuple[Any, Any]:
    """(tokenizer, encoder), the encoder frozen."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ImportError(f"prompts are read by {repo}, which needs transformers: pip install 'arvis[text]'") from error
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        tokenize = transformers.AutoTokenizer.from_pretrained(repo)
        encoder = transformers.T5EncoderModel.from_pretrained(repo, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the text encoder {repo} cannot be loaded, from the hub or as a folder: {reason}") from error
    return tokenize, encoder.to(device).eval().requires_grad_(False)
