"""Plain pre-norm transformer blocks: text encoders, masked encoders and decoders, patch autoencoders."""

from __future__ import annotations

from torch import Tensor, nn

from arvis.nn.attention import attend
from arvis.nn.trunk import Call


class ViTBlock(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)), with biases and affine norms.

    In training a part `attn_dropout` of the attention weights is dropped, and a part `dropout` of the hidden units and
    of what both branches add.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        eps: float = 1e-5,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.attn_dropout, self.drop = attn_dropout, nn.Dropout(dropout)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [R, H, n, h]
        if call.cache is not None:
            k, v = call.cache.join(layer, k, v)
        seen = attend(q, k, v, call.mask, self.scale, self.attn_dropout if self.training else 0.0)
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        up, gelu, down = self.mlp
        return x + self.drop(down(self.drop(gelu(up(self.norm2(x))))))
