"""Distances between pictures, each with its convention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a_BCYX: Tensor, b_BCYX: Tensor, data_range: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, float64 [B]: 10 log10(range^2 / mean squared error).

    Inputs are on the scale of `data_range` (255 for bytes, 2 for [-1, 1]). Equal pictures give infinity.
    """
    _alike(a_BCYX, b_BCYX)
    mse = (a_BCYX.double() - b_BCYX.double()).square().flatten(1).mean(1)
    return 10 * (data_range**2 / mse).log10()


def ssim(a_BCYX: Tensor, b_BCYX: Tensor, data_range: float = 255.0) -> Tensor:
    """Structural similarity of each picture, float64 [B]: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03,
    valid windows only, mean over windows and channels (Wang et al. 2004)."""
    _alike(a_BCYX, b_BCYX)
    if min(a_BCYX.shape[2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(a_BCYX.shape[2:])}")
    offset = torch.arange(11, dtype=torch.float64, device=a_BCYX.device) - 5
    line = (-(offset**2) / (2 * 1.5**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window).unflatten(0, x.shape[:2])[:, :, 0]

    a, b = a_BCYX.double(), b_BCYX.double()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def _alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"expected two batches [B, C, Y, X] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
