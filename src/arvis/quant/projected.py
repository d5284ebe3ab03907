"""Look-up in few channels: a linear map in front of a quantiser and one behind it (ViT-VQGAN, arXiv 2110.04627)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from arvis.quant.base import Quantized


class Projected(nn.Module):
    """[..., width] -> `project_in` -> a quantiser of `inner` channels -> `project_out` -> [..., width].

    Codes are those behind the second map: quantising a code again need not find it.
    """

    quantizer: Any

    def __init__(self, quantizer: nn.Module, width: int, inner: int, bias: bool = True) -> None:
        super().__init__()
        self.project_in = nn.Linear(width, inner, bias=bias)
        self.quantizer = quantizer
        self.project_out = nn.Linear(inner, width, bias=bias)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.quantizer.sizes

    def encode(self, z: Tensor) -> Tensor:
        return self.quantizer.encode(self.project_in(z))

    def codes(self, tokens: Tensor) -> Tensor:
        return self.project_out(self.quantizer.codes(tokens))

    def forward(self, z: Tensor) -> Quantized:
        out = self.quantizer(self.project_in(z))
        return out._replace(values=self.project_out(out.values))
