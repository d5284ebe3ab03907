"""How different two images look: LPIPS over VGG16 where its weights are given, image gradients where they are not.

LPIPS (arXiv 1801.03924) with the names of the official files: `features.N.*` of torchvision's vgg16 (N from 0 to 28)
and `lin{k}.model.1.weight` of the lpips package's `vgg.pth`. The files are not shipped. `GradientLoss` needs no file:
it compares images and their differences on four scales, which keeps edges sharp but knows nothing of texture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from arvis.weights import WeightsError, read

_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 halves the size
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


class LPIPS(nn.Module):
    """The learned perceptual distance of image pairs; frozen. Make it with `perceptual(files)`."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        self.features = nn.Sequential(*layers)
        for k, width in enumerate((64, 128, 256, 512, 512)):
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            setattr(self, f"lin{k}", head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x_BCYX: Tensor, y_BCYX: Tensor) -> Tensor:
        """The distances [B] of images in [-1, 1], at least 16 pixels wide, in float32."""
        total = torch.zeros(len(x_BCYX), device=x_BCYX.device)
        pairs = zip(self._taps(x_BCYX), self._taps(y_BCYX), strict=True)
        for k, (a, b) in enumerate(pairs):
            weight = getattr(self, f"lin{k}").model[1].weight
            total = total + functional.conv2d((a - b).square(), weight.float()).mean((1, 2, 3))
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        """The features of five layers, each position scaled to norm 1 over the channels."""
        x, taps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _TAPS:
                f = x.float()
                norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)  # has a finite gradient at 0
                taps.append(f / (norm + 1e-10))
        return taps


class GradientLoss(nn.Module):
    """The stand-in without weights: mean l1 of images and of their differences along both axes, on halved scales."""

    def __init__(self, scales: int = 4) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x_BCYX: Tensor, y_BCYX: Tensor) -> Tensor:
        """The distances [B], the mean over the scales, in float32."""
        error = x_BCYX.float() - y_BCYX.float()
        total = torch.zeros(len(error), device=error.device)
        for scale in range(self.scales):
            if scale:
                error = functional.avg_pool2d(error, 2)
            edges = [error.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3) if error.shape[d] > 1]
            total = total + error.abs().mean((1, 2, 3)) + sum(edges, torch.zeros_like(total))
            if min(error.shape[2:]) < 2:
                return total / (scale + 1)
        return total / self.scales


def perceptual(files: Sequence[Path | str] = ()) -> LPIPS | GradientLoss:
    """LPIPS with the weights in `files` (VGG16 and the heads, in one file or two), or GradientLoss without files.

    Names of VGG16's classifier are passed over. Raises WeightsError for a tensor that is missing, unknown or misshapen.
    """
    if not files:
        return GradientLoss()
    found: dict[str, Tensor] = {}
    for file in files:
        found |= {name: tensor for name, tensor in read(file).items() if not name.startswith("classifier.")}
    model = LPIPS()
    own, where = model.state_dict(), " and ".join(str(file) for file in files)
    for name in [*own, *found]:
        if name not in found:
            source = "torchvision's vgg16" if name.startswith("features.") else "the lpips package's vgg.pth"
            raise WeightsError(f"{where}: no tensor {name}; LPIPS needs the weights of {source}")
        if name not in own:
            raise WeightsError(f"{where}: unknown tensor {name}; expected features.N.* and lin0 to lin4")
        if own[name].shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(own[name].shape)}"
            raise WeightsError(f"{where}: {name} has the shape {shapes}")
    model.load_state_dict(found)
    return model
