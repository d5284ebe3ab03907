"""Gaussian diffusion in discrete steps: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, its tables and its loss.

DDPM (arXiv 2006.11239), the cosine schedule and the learned range of variances of improved DDPM (arXiv 2102.09672). The
tables are float64; step 0 is the cleanest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["cosine", "linear"]


def betas(kind: Kind, steps: int) -> Tensor:
    """The part of the variance that each of `steps` steps replaces by noise, float64 [steps].

    cosine: 1 - abar(i + 1) / abar(i), at most 0.999, with abar(i) = cos((i / steps + 0.008) / 1.008 pi / 2)^2; linear:
    from 0.1 / steps to 20 / steps. Tables are no weights: they lie on the host, also of a model on the meta device.
    """
    if steps < 1:
        raise ValueError(f"a diffusion has at least one step, got {steps}")
    if kind == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu").clamp(max=0.999)
    if kind != "cosine":
        raise ValueError(f"a schedule is cosine or linear, got {kind!r}")
    abar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    kept = [min(1 - abar[i + 1] / abar[i], 0.999) for i in range(steps)]
    return torch.tensor(kept, dtype=torch.float64, device="cpu")


def even(steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps, the first and the last among them, as evenly as whole numbers allow; all at most."""
    return sections(steps, (min(count, steps),))


def sections(steps: int, counts: Sequence[int]) -> tuple[int, ...]:
    """The steps cut into equal parts, in each of which so many are kept, evenly and with both ends."""
    size, longer = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for part, count in enumerate(counts):
        length = size + (part < longer)
        if not 1 <= count <= length:
            raise ValueError(f"of {length} steps between 1 and {length} can be kept, got {count}")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        at = 0.0
        for _ in range(count):
            kept.append(start + round(at))
            at += stride  # added up, not multiplied: Compat with lists that were made so
        start += length
    return tuple(kept)


def strided(steps: int, count: int) -> tuple[int, ...]:
    """Steps from 0 on at the smallest equal whole distance that gives at most `count` of them (arXiv 2010.02502).

    The last step is not among them: there hardly anything is left of x_0, so that what a network says of it is
    multiplied by a very large number, which only networks trained for long survive.
    """
    if count < 1:
        raise ValueError(f"at least one step is kept, got {count}")
    return tuple(range(0, steps, -(-steps // count)))


class Diffusion:
    """The tables of a schedule, float64 [T]. `times` are the steps as the network was trained to be told them."""

    def __init__(self, betas: Tensor, times: Sequence[int] | None = None) -> None:
        self.betas = betas.double()
        self.times = tuple(range(len(betas))) if times is None else tuple(times)
        self.abar = (1 - self.betas).cumprod(0)
        self.before = torch.cat((self.abar.new_ones(1), self.abar[:-1]))
        """abar of the step before."""

    def __len__(self) -> int:
        return len(self.betas)

    def sub(self, times: Sequence[int]) -> Diffusion:
        """The diffusion that visits only the given steps, rising, with the same abar there."""
        if not times or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"the steps to keep rise, got {tuple(times)}")
        abar = self.abar[list(times)]
        before = torch.cat((abar.new_ones(1), abar[:-1]))
        return Diffusion(1 - abar / before, [self.times[i] for i in times])

    @cached_property
    def of_clean(self) -> Tensor:
        """The weight of x_0 in the mean of x_{t-1} given x_t and x_0."""
        return self.betas * self.before.sqrt() / (1 - self.abar)

    @cached_property
    def of_noisy(self) -> Tensor:
        """The weight of x_t in it."""
        return (1 - self.before) * (1 - self.betas).sqrt() / (1 - self.abar)

    @cached_property
    def least(self) -> Tensor:
        """The log of the variance of x_{t-1} given x_t and x_0; at step 0, where it is zero, that of step 1."""
        variance = self.betas * (1 - self.before) / (1 - self.abar)
        return torch.cat((variance[1:2] if len(self) > 1 else self.betas[:1], variance[1:])).log()

    @cached_property
    def most(self) -> Tensor:
        """The log of beta, the variance of x_{t-1} given x_t alone where the data have unit variance."""
        return self.betas.log()

    # -- arithmetic: t is one step, or one per row [...] of x [..., S] ---------------------------------------------

    def _at(self, table: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(t, int):
            return table[t].to(x)
        return table.to(x.device)[t].to(x.dtype)[..., None]

    def noisy(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t."""
        return self._at(self.abar.sqrt(), t, x0) * x0 + self._at((1 - self.abar).sqrt(), t, x0) * noise

    def clean(self, x: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """The x_0 that x_t comes from if its noise is eps; not clipped."""
        return self._at((1 / self.abar).sqrt(), t, x) * x - self._at((1 / self.abar - 1).sqrt(), t, x) * eps

    def eps(self, x: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """The noise of x_t that comes from x_0."""
        return (self._at((1 / self.abar).sqrt(), t, x) * x - x0) / self._at((1 / self.abar - 1).sqrt(), t, x)

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv 2202.00512)."""
        return self._at(self.abar.sqrt(), t, x0) * noise - self._at((1 - self.abar).sqrt(), t, x0) * x0

    def eps_of_velocity(self, x: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """The noise of x_t whose velocity is v."""
        return self._at(self.abar.sqrt(), t, x) * v + self._at((1 - self.abar).sqrt(), t, x) * x

    def mean(self, x: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """The mean of x_{t-1} given x_t and x_0."""
        return self._at(self.of_clean, t, x) * x0 + self._at(self.of_noisy, t, x) * x

    def log_variance(self, share: Tensor, t: int | Tensor) -> Tensor:
        """The learned log variance between the least (share -1) and the most (1), not clamped."""
        share = (share + 1) / 2
        return share * self._at(self.most, t, share) + (1 - share) * self._at(self.least, t, share)

    # -- the loss -------------------------------------------------------------------------------------------------

    def terms(self, out: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of improved DDPM for rows x_0 [..., S] at steps t [...]: each [...], means over channels.

        `out` [..., 2 S] is what the network said of `noisy(x0, noise, t)`: the noise, then the share of the variance.
        The first is the squared error of the noise. The second, in bits, teaches the variance alone: KL between the
        true and the predicted x_{t-1}, at step 0 the likelihood of x_0 in bins of 2/255, as for pictures in [-1, 1].
        """
        wide = torch.promote_types(torch.promote_types(out.dtype, x0.dtype), torch.float32)
        (eps, share), x0, noise = out.to(wide).chunk(2, -1), x0.to(wide), noise.to(wide)
        x = self.noisy(x0, noise, t)
        true, true_log = self.mean(x, x0, t), self._at(self.least, t, x)
        mean, log = self.mean(x, self.clean(x, eps.detach(), t), t), self.log_variance(share, t)
        kl = 0.5 * (log - true_log + (true_log - log).exp() + (true - mean).square() * (-log).exp() - 1)
        nats = torch.where((t == 0)[..., None], binned_nll(x0, mean, log / 2), kl)
        return (noise - eps).square().mean(-1), nats.mean(-1) / math.log(2)


def binned_nll(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """-log of the mass that a Gaussian puts on the bin of width 2/255 around x, at least 1e-12, in nats; the bins at -1
    and 1 are open. Its distribution function is the tanh approximation."""
    centred, inverse = x - mean, (-log_deviation).exp()

    def below(z: Tensor) -> Tensor:
        z = z.clamp(-30, 30)  # flat from there on, and the cube of a large z would make its gradient NaN
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())

    upper, lower = below(inverse * (centred + 1 / 255)), below(inverse * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp_min(1e-12).log()
