"""The KL autoencoder of latent diffusion (arXiv 2112.10752): pictures <-> maps of real vectors, near a unit Gaussian.

The encoder gives the mean and the log variance of every cell ("moments"); a latent is a sample of that Gaussian, scaled
to about unit deviation, and a token is a patch of p x p latents. State dict names are those of the published files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from arvis.noise import Source
from arvis.quant.base import Quantized
from arvis.quant.usage import summed_over_ranks
from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import Layout, Space


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """`z_channels` channels of a latent, `patch_size` latents along each side of a token, `grid` tokens of a picture.

    Latents are multiplied by `scale`; None: they get mean 0 and deviation 1 in each channel, by statistics that are
    measured while the tokenizer trains and saved with it. Log variances are clamped to `logvar_range`. Exactly one of
    `cnn` and `patch` is the backbone (with `double_z`). `variational` False: the encoder gives means alone.
    """

    z_channels: int = 16
    patch_size: int = 1
    grid: tuple[int, int] = (16, 16)
    scale: float | None = 0.2325
    logvar_range: tuple[float, float] = (-30.0, 20.0)
    variational: bool = True
    cnn: CNNConfig | None = None
    patch: PatchConfig | None = None

    def __post_init__(self) -> None:
        if not self.backbone.double_z:
            raise ValueError("the encoder gives a mean and a log variance: the backbone needs double_z=true")
        if self.patch_size < 1 or min(self.grid) < 1 or (self.scale is not None and self.scale <= 0):
            raise ValueError(f"patch_size, grid, scale are positive, got {self.patch_size}, {self.grid}, {self.scale}")

    @property
    def backbone(self) -> Backbone:
        return chosen(self.cnn, self.patch)

    @property
    def downsample(self) -> int:
        """Pixels per token along each axis."""
        return self.backbone.downsample * self.patch_size


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents [B, C, Y, X]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, unit: Tensor) -> Tensor:
        """The latents of unit noise of the same shape."""
        return self.mean + (self.logvar / 2).exp() * unit.to(self.mean)

    def kl(self) -> Tensor:
        """KL to the unit Gaussian in nats [B], summed over all channels and cells."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Scaled(nn.Module):
    """Latents times a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor) -> Tensor:
        return z * self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.scale

    def record_(self, posterior: Posterior, updates: int) -> None:
        """A constant measures nothing."""


class Standardized(nn.Module):
    """Latents with mean 0 and deviation 1 in each channel, by moving averages that the state dict holds."""

    mean: Tensor
    square: Tensor

    def __init__(self, channels: int, window: int = 20) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))

    def _moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (self.square - self.mean.square()).clamp_min(1e-8).sqrt()
        return self.mean.to(z)[:, None, None], deviation.to(z)[:, None, None]

    def forward(self, z: Tensor) -> Tensor:
        mean, deviation = self._moments(z)
        return (z - mean) / deviation

    def inverse(self, z: Tensor) -> Tensor:
        mean, deviation = self._moments(z)
        return z * deviation + mean

    @torch.no_grad()
    def record_(self, posterior: Posterior, updates: int) -> None:
        """Moves the averages towards a batch: the mean of all batches at first, then over about `window` of them."""
        square = posterior.mean.square() + posterior.logvar.exp()
        cells = torch.full_like(posterior.mean[0, :, 0, 0], posterior.mean[:, 0].numel())
        sums = torch.stack((posterior.mean.sum((0, 2, 3)), square.sum((0, 2, 3)), cells))
        mean, square, cells = summed_over_ranks(sums)
        share = max(1 / (updates + 1), 1 / self.window)
        self.mean.lerp_((mean / cells).to(self.mean), share)
        self.square.lerp_((square / cells).to(self.square), share)


def patchify(z_BCYX: Tensor, p: int) -> Tensor:
    """Tokens [B, N, C p^2] of maps, row-major; inside a token the channel is slowest, then row, then column."""
    return rearrange(z_BCYX, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)


def unpatchify(tokens_BNS: Tensor, grid: tuple[int, ...], p: int) -> Tensor:
    """The maps of tokens on a grid (Y, X): the inverse of `patchify`."""
    y, x = grid
    return rearrange(tokens_BNS, "b (y x) (c p q) -> b c (y p) (x q)", y=y, x=x, p=p, q=p)


class KLAutoencoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> tokens [B, N, C p^2], real vectors of about unit deviation, row-major."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = coder(config.backbone)
        inner, z = config.backbone.z_channels, config.z_channels
        self.quant_conv = nn.Conv2d(2 * inner, (2 if config.variational else 1) * z, 1)
        self.post_quant_conv = nn.Conv2d(z, inner, 1)
        self.normal = Standardized(z) if config.scale is None else Scaled(config.scale)

    @property
    def space(self) -> Space:
        return Space(width=self.config.z_channels * self.config.patch_size**2)

    def layout(self, shape: tuple[int, ...] | None = None) -> Layout:
        """The grid of the configuration, or that of images of `shape` (H, W) pixels."""
        if shape is None:
            return Layout((self.config.grid,))
        cell = self.config.downsample
        if len(shape) != 2 or any(side % cell or side < cell for side in shape):
            raise ValueError(f"image sides must be multiples of {cell}, got {shape}")
        return Layout((tuple(side // cell for side in shape),))

    # -- images, moments, latents, tokens -------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """The moments [B, 2 C, Y, X] of images: means, then log variances not yet clamped; at least float32."""
        moments = self.quant_conv(self.encoder(x))
        if not self.config.variational:  # Compat: the official code takes a log variance of 1 here
            moments = torch.cat((moments, torch.ones_like(moments)), 1)
        return moments.to(torch.promote_types(moments.dtype, torch.float32))

    def posterior(self, moments: Tensor) -> Posterior:
        """The Gaussian of moments, log variances clamped."""
        mean, logvar = moments.chunk(2, 1)
        return Posterior(mean, logvar.clamp(*self.config.logvar_range))

    def sampled(self, moments: Tensor, noise: Source | None) -> Tensor:
        """Tokens of moments: of a sample of the Gaussian, without noise of its mean."""
        posterior = self.posterior(moments)
        z = posterior.mean
        if noise is not None:
            z = posterior.sample(noise.normal("posterior", 0, z.shape[1:]))
        return patchify(self.normal(z), self.config.patch_size)

    @torch.no_grad()
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        """Tokens of images: of the mean, or with noise of a sample."""
        return self.sampled(self.features(x), noise)

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        """Images in [-1, 1] of tokens; those not `known` [B, N] are taken as the mean latent, zero."""
        layout = layout or self.layout()
        if known is not None:
            tokens = tokens.where(known[..., None].to(tokens.device), 0)
        z = unpatchify(tokens, layout.levels[-1], self.config.patch_size)
        return self.reconstruct(self.normal.inverse(z)).clamp(-1, 1)

    # -- training -------------------------------------------------------------------------------------------------

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of latents [B, C, Y, X] (not normalised) with gradients, not clamped, at least float32."""
        x = self.decoder(self.post_quant_conv(f.to(self.post_quant_conv.weight.dtype)))
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        """A sample of the Gaussian of moments f; losses["kl"] in nats per picture, as latent diffusion weighs it."""
        posterior = self.posterior(f)
        z = posterior.sample(noise.normal("posterior", 0, posterior.mean.shape[1:]))
        tokens = patchify(self.normal(z), self.config.patch_size).detach()
        stats = {"deviation": tokens.std(), "noise": (posterior.logvar.detach() / 2).exp().mean()}
        return Quantized(z, tokens, {"kl": posterior.kl().mean()}, stats)

    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        """Measure the latents of the first batch."""
        self.normal.record_(self.posterior(f), 0)

    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        """Measure the latents of a batch, unless the encoder is frozen: then tokens keep their meaning.

        There is no codebook, so nothing is revived.
        """
        if any(p.requires_grad for part in (self.encoder, self.quant_conv) for p in part.parameters()):
            self.normal.record_(self.posterior(f), updates)
        return 0

    def metrics(self) -> dict[str, Tensor]:
        """There is no codebook to tell of."""
        return {}
