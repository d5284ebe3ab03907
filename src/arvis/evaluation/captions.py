"""Captions as the CLIP scores of papers want them: with a prefix, put in as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

END = 49407
"""The end token of CLIP's text encoders."""


def prefixed(tokens_BL: Tensor, prefix: Sequence[int], end: int = END) -> Tensor:
    """Padded captions with the tokens of a prefix ("a photo depicts") behind their start token, as long as before.

    What no longer fits is cut off, and the last token of a caption that fills its row is then `end`: the text encoder
    reads its output there. Padding is 0. This is how LlamaGen (arXiv 2406.06525) scores text-to-image models; a prefix
    before the text itself is cut at another word where captions are long.
    """
    if tokens_BL.shape[1] < len(prefix) + 2:
        raise ValueError(f"{len(prefix)} tokens of a prefix leave no room in captions of {tokens_BL.shape[1]}")
    start, rest = tokens_BL[:, :1], tokens_BL[:, 1 : tokens_BL.shape[1] - len(prefix)]
    middle = torch.as_tensor(list(prefix), dtype=tokens_BL.dtype, device=tokens_BL.device).expand(len(tokens_BL), -1)
    out = torch.cat((start, middle, rest), 1)
    out[:, -1] = torch.where(out[:, -1] != 0, end, out[:, -1])
    return out
