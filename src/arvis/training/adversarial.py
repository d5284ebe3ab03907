"""A patch discriminator with the hinge loss, and the weight that balances it against reconstruction.

PatchGAN (arXiv 1611.07004) with spectral normalisation (arXiv 1802.05957) in place of batch norm, so that it works with
any batch size and number of processes; hinge loss (arXiv 1705.02894); adaptive weight of VQGAN (arXiv 2012.09841).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """`width` channels in the first of `layers` halving convolutions; silent for the first `start` updates."""

    channels: int = 3
    width: int = 64
    layers: int = 3
    start: int = 0


class Adversary(nn.Module):
    """Judges overlapping patches of an image: positive is real.

    Its two losses feed two optimisers, so each leaves the other side without gradient: in a FitConfig
    `parts=(Part(names=("adversary.",), loss="loss_adversary"),)`.
    """

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels, *(min(config.width * 2**i, 8 * config.width) for i in range(config.layers + 1))]
        layers: list[nn.Module] = []
        for i in range(config.layers + 1):  # the last one keeps the size
            layers.append(spectral_norm(nn.Conv2d(widths[i], widths[i + 1], 4, 2 if i < config.layers else 1, 1)))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 4, 1, 1)))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """One score per patch, [B, 1, y, x]; images in [-1, 1], at least 2^(layers+1) + 8 pixels wide."""
        return self.layers(x_BCYX)

    def generator(
        self,
        fake: Tensor,
        step: int | None = None,
        reconstruction: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The hinge loss of the images' maker, a scalar; 0 before `config.start`. This module's parameters get none.

        With `reconstruction` (the other loss) and `last` (the weight of the maker's last layer) it is scaled by
        `adaptive_weight`.
        """
        if step is not None and step < self.config.start:
            return fake.new_zeros((), dtype=torch.float32)
        loss = -frozen(self, fake).float().mean()
        return loss if reconstruction is None or last is None else adaptive_weight(reconstruction, loss, last) * loss

    def discriminator(self, real: Tensor, fake: Tensor, step: int | None = None) -> Tensor:
        """The hinge loss of the judge, a scalar; 0 before `config.start`. The images get no gradient."""
        if step is not None and step < self.config.start:
            return torch.stack([p.sum() for p in self.parameters()]).sum() * 0.0
        return hinge(self(real.detach()), self(fake.detach()))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss on the scores of real and made images, a scalar."""
    return 0.5 * ((1.0 - real.float()).relu().mean() + (1.0 + fake.float()).relu().mean())


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` with gradient to x and none to the module's parameters."""
    return torch.func.functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor, most: float = 1e4) -> Tensor:
    """The ratio of both losses' gradient norms at the weight `last`: equal pulls there; in [0, most], no gradient."""
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (pulls[0] / (pulls[1] + 1e-4)).clamp(0.0, most).detach()
