"""Text as a condition by a frozen CLIP (arXiv 2103.00020), whose encoder comes from the hub, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.request import prompts
from arvis.nn.scales import Condition


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
        encoder = transformers.CLIPTextModel.from_pretrained(repo, subfolder="text_encoder", dtype=dtype)
        tokenize = transformers.CLIPTokenizer.from_pretrained(repo, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the text encoder {repo} cannot be loaded, from the hub or as a folder: {reason}") from error
    return tokenize, encoder.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The frozen encoder of the latent diffusion model `repo`, `channels` wide; prompts are cut after `length`."""

    repo: str = "stabilityai/stable-diffusion-2-1"
    channels: int = 1024
    length: int = 77


class ClipConditioner(nn.Module):
    """Prompts as features of a frozen CLIP; "no prompt" is the empty prompt, or a negative one.

    A request has a "prompt", or "text_features" [B, T, C], "text_pooled" [B, C] and, where not all are text,
    "text_visible" [B, T]; "negative_prompt", or the same three of "negative", take the place of the empty prompt.
    """

    conditions = ("prompt",)

    def __init__(self, config: CLIPConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.channels, width)

    def prepare(self, request: dict[str, Any]) -> dict[str, Tensor]:
        if "text_features" not in request:
            request = {**request, "prompt": prompts(request)}
        text = self._read(request, "text", "prompt")
        null = self._read({"negative_prompt": "", **request}, "negative", "negative_prompt")
        null = tuple(x.expand(len(text[0]), *x.shape[1:]) for x in null)
        names = ("text", "pooled", "visible", "null_text", "null_pooled", "null_visible")
        return dict(zip(names, (*text, *null), strict=True))

    def _read(self, request: dict[str, Any], name: str, prompt: str) -> tuple[Tensor, ...]:
        """(states, summary, visible) that a request has, or of the prompts in it."""
        like, channels = self.project.weight, self.config.channels
        if f"{name}_features" not in request:
            told = request[prompt]
            return self._features([told] if isinstance(told, str) else list(told))
        states, pooled = (torch.as_tensor(request[f"{name}_{x}"]).to(like) for x in ("features", "pooled"))
        visible = torch.as_tensor(request.get(f"{name}_visible", torch.ones(states.shape[:2])))
        visible = visible.to(like.device, torch.bool)
        shapes = tuple(states.shape), tuple(pooled.shape), tuple(visible.shape)
        if states.dim() != 3 or shapes != ((*shapes[2], channels), (len(states), channels), shapes[0][:2]):
            raise ValueError(
                f"{name}_features are [B, T, {channels}], {name}_pooled [B, {channels}] and {name}_visible [B, T], "
                f"got {shapes}"
            )
        return states, pooled, visible

    def _features(self, told: list[str]) -> tuple[Tensor, ...]:
        like, c = self.project.weight, self.config
        if like.is_meta:  # shapes alone: no encoder is needed for them
            one = like.new_zeros(len(told), c.length, c.channels)
            return one, one[:, 0], torch.ones_like(one[..., 0], dtype=torch.bool)
        states, pooled, visible = clip_features(told, c.repo, c.length, like.device)
        return states.to(like), pooled.to(like), visible

    def forward(self, cond: dict[str, Tensor] | None, null_B: Tensor) -> Condition:
        if cond is None:
            text, pooled, visible = (x.expand(len(null_B), *x.shape[1:]) for x in self._features([""]))
        else:
            text = torch.where(null_B[:, None, None], cond["null_text"], cond["text"])
            pooled = torch.where(null_B[:, None], cond["null_pooled"], cond["pooled"])
            visible = torch.where(null_B[:, None], cond["null_visible"], cond["visible"])
        return Condition(self.project(pooled), pooled, (text, visible))
