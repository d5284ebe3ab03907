"""Goodness of fit, as p-values."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """Pearson's test of counts [C] against probabilities [C]; cells with an expected count below 5 are pooled."""
    expected = probs.double() / probs.sum() * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """The test of a sample whose values have the given cdf values (asymptotic p-value)."""
    n, u = len(sample), cdf.sort().values
    grid = torch.arange(n, dtype=torch.float64) / n
    d = float(torch.maximum((u - grid).amax(), (grid + 1 / n - u).amax())) * n**0.5
    return min(1.0, 2 * sum((-1) ** (j - 1) * 2.718281828459045 ** (-2 * j * j * d * d) for j in range(1, 40)))
