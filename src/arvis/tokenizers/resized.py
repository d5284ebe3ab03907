"""An image as grids of codes of many sizes, each of them the whole picture: no residuals (FlexVAR, arXiv 2502.20313).

One codebook, one encoder and one decoder serve every size. A level is the feature map averaged to its cells and looked
up there; any level by itself is decoded to a picture of its own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded
from arvis.quant.base import Quantized
from arvis.quant.multiscale import area, to_map, to_rows
from arvis.quant.revive import pick, restart_
from arvis.quant.usage import UsageRing, count, dead, perplexity, summed_over_ranks, update_hits_, used
from arvis.quant.vq import VQ, CosineVQ, VQConfig, unit
from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.summing import inputs
from arvis.tokens import Layout, Space, pyramid

if TYPE_CHECKING:
    from arvis.noise import Source


@dataclass(frozen=True, kw_only=True)
class ResizedVQConfig:
    """`patch_nums` are the sides of the default scales; exactly one of `cnn` and `patch` is the backbone.

    A table of `vocab_size` codes of `code_width` channels, looked up by angle if `l2_norm`; `beta` weighs the
    commitment term, `entropy_ratio` the one that keeps choices decided and all codes in use (0: none). The share
    `whole` of the training passes codes the map at its full size, the others at a random smaller one of at least
    `least` cells along its first axis.
    """

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 8912
    code_width: int = 32
    l2_norm: bool = True
    beta: float = 0.25
    entropy_ratio: float = 0.0
    whole: float = 0.5
    least: int = 1
    cnn: CNNConfig | None = None
    patch: PatchConfig | None = None

    def __post_init__(self) -> None:
        chosen(self.cnn, self.patch)

    @property
    def backbone(self) -> Backbone:
        return chosen(self.cnn, self.patch)

    @property
    def downsample(self) -> int:
        """Pixels per cell along each axis, at every size."""
        return self.backbone.downsample


class ResizedVQ(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> tokens [B, N, 1], levels from coarse to fine; the picture is the last one.

    What a generator carries from level to level (`start`, `accumulate`) is the code map of the last level alone, at
    that level's size. `hits` [V] is the moving average of how often codes occur, `recent` the ids of the last 65,536
    tokens; both are kept by `tend_`.
    """

    hits: Tensor

    def __init__(self, config: ResizedVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = coder(config.backbone)
        channels = config.backbone.z_channels
        vq = VQConfig(size=config.vocab_size, width=config.code_width, beta=config.beta, entropy=config.entropy_ratio)
        self.quantize = CosineVQ(vq) if config.l2_norm else VQ(vq)
        self._set(self.quantize.embedding.weight)
        self.register_buffer("hits", torch.zeros(config.vocab_size))
        self.recent = UsageRing()
        self.quant_conv = nn.Conv2d(channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, channels, 1)

    @property
    def space(self) -> Space:
        return Space(sizes=(self.config.vocab_size,))

    @property
    def channels(self) -> int:
        """Of what a generator sees."""
        return self.config.code_width

    def layout(self, shape: tuple[int, ...] | None = None, sides: tuple[int, ...] | None = None) -> Layout:
        """The scales of `sides` (of the configuration), stretched to images of `shape` (H, W) pixels.

        A side of one cell stays a single cell. Without a shape the scales are the squares themselves.
        """
        sides, cell = sides or self.config.patch_nums, self.config.downsample
        if shape is None:
            return pyramid(sides)
        if any(side % cell or side < cell for side in shape):
            raise ValueError(f"image sides must be multiples of {cell}, got {shape}")
        last = [side // cell for side in shape]
        stretched = (tuple(max(1, round(p * to / sides[-1])) for to in last) for p in sides)
        return Layout(tuple((1, 1) if p == 1 else size for p, size in zip(sides, stretched, strict=True)))

    # -- images and codes -----------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """What is averaged and looked up: float32 [B, D, h, w] (float64 of a float64 module)."""
        f = self.quant_conv(self.encoder(x))
        return f.to(torch.promote_types(f.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, x: Tensor, layout: Layout | None = None, noise: Source | None = None) -> Tensor:
        """Tokens [B, N, 1] of images, whose own number of cells does not bind the levels."""
        return self.tokens(self.features(x), layout or self.layout(tuple(x.shape[2:])))

    @torch.no_grad()
    def tokens(self, f: Tensor, layout: Layout) -> Tensor:
        """Tokens [B, N, 1] of features, every level by itself."""
        return torch.cat([self.quantize.encode(to_rows(area(f, level))) for level in layout.levels], 1)

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, layout: Layout | None = None, known: Tensor | None = None, noise: Source | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of the last level; with `known` [B, N] of the finest level that is wholly
        known in an item, enlarged, and grey where none is."""
        layout = layout or self.layout()
        if known is None:
            return self.reconstruct(self.codes(tokens, layout, layout.K - 1)).clamp(-1, 1)
        size = [side * self.config.downsample for side in layout.levels[-1]]
        whole = torch.stack([known[:, layout.span(k)].all(1) for k in range(layout.K)], 1)
        finest = torch.where(whole, torch.arange(layout.K, device=whole.device), -1).amax(1)
        out = torch.zeros(len(tokens), 3, *size, device=tokens.device)
        for k in set(finest.tolist()) - {-1}:
            rows = (finest == k).to(tokens.device)
            image = self.reconstruct(self.codes(tokens[rows], layout, k)).clamp(-1, 1)
            out[rows] = image if k == layout.K - 1 else F.interpolate(image, size=size, mode="bilinear")
        return out

    def reconstruct(self, f: Tensor) -> Tensor:
        """Images of a code map of any size [B, D, h, w] with gradients, not clamped, float32."""
        weight = self.post_quant_conv.weight
        return self.decoder(self.post_quant_conv(f.to(weight.dtype))).float()

    def codes(self, tokens: Tensor, layout: Layout, k: int) -> Tensor:
        """The code map of level k [B, D, h_k, w_k], as it is used (by angle: of length one)."""
        return to_map(self.quantize.codes(tokens[:, layout.span(k)]), layout.levels[k])

    # -- what a generator sees ------------------------------------------------------------------------------------

    def start(self, batch: int, layout: Layout) -> Tensor:
        """Nothing: zeros [B, D, 1, 1]."""
        weight = self.quantize.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(batch, self.config.code_width, 1, 1, dtype=dtype)

    def accumulate(self, f: Tensor, tokens_BnS: Tensor, k: int, layout: Layout) -> Tensor:
        """The code map of level k, which takes the place of the one before."""
        return to_map(self.quantize.codes(tokens_BnS).to(f.dtype), layout.levels[k])

    def next_input(self, f: Tensor, k: int, layout: Layout) -> Tensor:
        """What a generator sees before level k >= 1: the code map of level k - 1, bicubically brought to the size of
        level k and not normalised again, [B, n_k, D] float32."""
        with unrounded(f):
            return to_rows(F.interpolate(f, size=layout.levels[k], mode="bicubic"))

    def inputs(self, tokens: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """The inputs of levels first..last-1 under teacher forcing, [B, sum of n_k, D]; level 0 has none.

        Only tokens of levels below last - 1 are read.
        """
        return inputs(self, tokens, layout, first, layout.K if last is None else last)

    # -- training -------------------------------------------------------------------------------------------------

    def trained_size(self, size: tuple[int, ...], noise: Source) -> tuple[int, ...]:
        """At how many cells a map of `size` is coded in one training pass; a batch shares one draw."""
        u, v = noise.uniform("size", 0, (2,))[0].tolist()
        if u < self.config.whole or size[0] <= self.config.least:
            return size
        rows = self.config.least + int(v * (size[0] - self.config.least))
        return rows, *(max(1, round(rows * side / size[0])) for side in size[1:])

    def quantized(self, f: Tensor, layout: Layout, noise: Source) -> Quantized:
        """The map at a random size; its picture is to be compared with the averaged picture."""
        size = self.trained_size(tuple(f.shape[2:]), noise)
        found = self.quantize(to_rows(area(f, size)))
        return found._replace(values=to_map(found.values, size))

    def _vectors(self, f: Tensor, layout: Layout) -> Tensor:
        """The vectors of all levels [B, N, D] as distances are taken: of length one if codes are looked up by angle."""
        rows = torch.cat([to_rows(area(f.float(), level)) for level in layout.levels], 1)
        return unit(rows) if self.config.l2_norm else rows

    @torch.no_grad()
    def _set(self, vectors: Tensor) -> None:
        self.quantize.embedding.weight.copy_(unit(vectors) if self.config.l2_norm else vectors)

    @torch.no_grad()
    def init_(self, f: Tensor, layout: Layout, noise: Source) -> None:
        """Sets the table to random encoder vectors of all levels."""
        self._set(pick(self._vectors(f, layout), self.config.vocab_size, noise, 0))

    @torch.no_grad()
    def tend_(self, f: Tensor, tokens: Tensor, layout: Layout, noise: Source, updates: int, below: float | None) -> int:
        """A vector of any level is the likelier to become a code the farther it is from its present one."""
        self.recent.add_(tokens)
        update_hits_(self.hits, summed_over_ranks(count(tokens, self.config.vocab_size)), updates)
        if below is None:
            return 0
        gone, vectors = dead(self.hits, below), self._vectors(f, layout)
        error = (vectors - self.quantize.codes(self.quantize.encode(vectors))).square().sum(-1)
        n = restart_(self.quantize.embedding.weight, gone, vectors, noise, updates, error)
        self.hits[gone] = self.hits.mean()
        return n

    def metrics(self) -> dict[str, Tensor]:
        """The share of codes among the last 65,536 tokens, and the perplexity of the moving average."""
        return {"usage": used(self.recent.hits(self.config.vocab_size)), "perplexity": perplexity(self.hits)}
