"""M-VAR: VAR whose blocks look inside a scale by attention and from scale to scale by a state space.

M-VAR: Decoupled Scale-wise Autoregressive Modeling for High-Quality Image Generation, arXiv 2411.10433.
Weights: Apache-2.0 by their page.

Tokenizer, inputs, head, guidance and loss are VAR's, and so is what a row can depend on: its own scale and every
coarser one. But attention stays inside the scale, and Mamba-2 runs over the whole sequence from coarse to fine, so the
work of a scale does not grow with what came before it, and what is kept of the past does not grow at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.adaln import CosineTemperature, DropPath, FeedForward, FixedTemperature, SelfAttention
from arvis.nn.mamba import Mamba2, Mamba2Config
from arvis.nn.neighbourhood import InsideScales
from arvis.nn.scales import ClassConditioner
from arvis.nn.trunk import Call
from arvis.published import File, Preset, Result
from arvis.rows import same
from arvis.systems import var
from arvis.systems.var import PATCH_NUMS_256, VAR, VARConfig, assemble, scale_keys
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import pyramid
from arvis.weights import Constant, Key


@dataclass(frozen=True, kw_only=True)
class MVarConfig:
    """A VAR and the state space of its blocks. Each block has a modulation of its own."""

    scale: VARConfig
    mamba: Mamba2Config = field(default_factory=Mamba2Config)

    def __post_init__(self) -> None:
        if self.scale.shared_aln:
            raise ValueError(
                "nine vectors modulate a block of M-VAR, a shared projection has six: set shared_aln=False"
            )


class NineVectors(nn.Module):
    """The gates, scales and shifts of three branches from the condition [R, D] -> [R, 9, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(width, 9 * width)

    @property
    def vectors(self) -> Tensor:
        """The weights behind the vectors, [9 D, D]. Compat: VAR's initialisation takes the first two for the gates."""
        return self.project.weight

    def forward(self, vector: Tensor) -> Tensor:
        return self.project(F.silu(vector)).view(-1, 9, self.width)


class DecoupledBlock(nn.Module):
    """x += g1 attn(norm(x) (1 + s1) + b1) inside each scale; x += g2 mamba(norm(x) (1 + s2) + b2) over all scales;
    x += g3 ffn(norm(x) (1 + s3) + b3).

    Nothing of the attention is cached. The mixer's memory is, after each scale.
    """

    def __init__(
        self,
        width: int,
        *,
        modulation: NineVectors,
        attn: SelfAttention,
        mamba: Mamba2,
        ffn: FeedForward,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.modulation, self.attn, self.mamba, self.ffn = modulation, attn, mamba, ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
        inside = replace(call, cache=None)  # of coarser scales only the mixer knows
        g1, g2, g3, s1, s2, s3, b1, b2, b3 = call.modulated(self.modulation, layer)
        x = x + self.drop_path(g1 * self.attn(self.norm(x) * (1 + s1) + b1, inside, layer))
        x = x + self.drop_path(g2 * self.across(self.norm(x) * (1 + s2) + b2, call, layer))
        return x + self.drop_path(g3 * self.ffn(self.norm(x) * (1 + s3) + b3))

    def across(self, x: Tensor, call: Call, layer: int) -> Tensor:
        """The state space over all rows, on from what the cache remembers of the rows before them."""
        if call.cache is None or call.rows is None:
            return self.mamba(x)[0]
        out, memory = [], None
        for step, span in call.rows.runs:
            memory = call.cache.recall(layer, step) if memory is None else memory
            mixed, memory = self.mamba(x[:, span], memory)
            call.cache.remember(layer, step + 1, memory)
            out.append(mixed)
        return torch.cat(out, 1)


# -- assembly and presets -----------------------------------------------------------------------------------------


def block(config: MVarConfig, layer: int) -> DecoupledBlock:
    """Block `layer` of a configuration; stochastic depth grows linearly to `drop_path`."""
    scale = config.scale
    width, heads = scale.width, scale.heads
    layout, plain = pyramid(scale.tokenizer.patch_nums), FixedTemperature(0.25 * (width // heads) ** -0.5)
    return DecoupledBlock(
        width,
        modulation=NineVectors(width),
        attn=SelfAttention(
            width, heads, CosineTemperature(heads) if scale.attn_l2_norm else plain, InsideScales(layout)
        ),
        mamba=Mamba2(width, config.mamba),
        ffn=FeedForward(width, round(width * scale.mlp_ratio)),
        eps=scale.norm_eps,
        drop_path=scale.drop_path * layer / max(scale.depth - 1, 1),
    )


def build(config: MVarConfig) -> VAR:
    """An M-VAR with freshly initialised weights: a VAR with other blocks."""
    scale = config.scale
    blocks = [block(config, i) for i in range(scale.depth)]
    system = assemble(scale, ClassConditioner(scale.num_classes, scale.width), blocks=blocks)
    for part in blocks:  # as the official code has every convolution
        nn.init.trunc_normal_(part.mamba.conv1d.weight, std=0.02)
        nn.init.zeros_(part.mamba.get_parameter("conv1d.bias"))
    return system


def preset(depth: int, adaln_init: float, cosine: bool) -> MVarConfig:
    """VAR's scaling rule. The smaller published sizes have the plain product in their attention."""
    return MVarConfig(scale=replace(var.preset(depth, PATCH_NUMS_256, False, adaln_init), attn_l2_norm=cosine))


def emoji_64() -> MVarConfig:
    """The nine groups of the emoji world at 64x64 pixels, 8x8 cells at the last of five scales: 103 tokens."""
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=1024, z_channels=32, patch=PatchConfig())
    scale = VARConfig(tokenizer=tokenizer, depth=6, width=192, heads=6, num_classes=9, adaln_init=0.1)
    return MVarConfig(scale=scale, mamba=Mamba2Config(d_state=16, headdim=32))


CONFIG = MVarConfig

_REPO = "OliverRen/M-VAR"


def _preset(depth: int, adaln_init: float, cosine: bool, schedule: str, file: str = "") -> Preset:
    """A published size; it is trained as the VAR `schedule`."""
    files = {
        "tokenizer": var.PRESETS["var-d16"].files["tokenizer"],
        "transformer": File(repo=_REPO, name=file),
    }
    return Preset(
        config=lambda: preset(depth, adaln_init, cosine),
        files=files if file else {},
        licence="Apache-2.0" if file else "",
        training=var.PRESETS[schedule].training,
    )


PRESETS = {
    "m-var-d12": _preset(12, 1e-3, False, "var-d16"),
    "m-var-d16": _preset(16, 1e-3, False, "var-d16"),
    "m-var-d20": _preset(20, 1e-3, False, "var-d20"),
    "m-var-d24": _preset(24, 1e-4, True, "var-d24"),
    "m-var-d30": _preset(30, 1e-5, True, "var-d30"),
    "m-var-d32": _preset(32, 1e-5, True, "var-d30", "d32.pth"),
    "m-var-emoji-64": replace(var.PRESETS["var-emoji-64"], config=emoji_64),
}

RESULTS = (
    Result(
        preset="m-var-d32",
        metric="FID",
        value=1.78,
        settings="ImageNet 256; sampled with cfg 1.5, top_k 900, top_p 0.96",
        source="arXiv 2411.10433, abstract",
    ),
)


# -- official names -----------------------------------------------------------------------------------------------


def keys(config: MVarConfig) -> dict[str, tuple[Key, ...]]:
    """VAR's names, those of the mixers, and a buffer of each block that holds the number of tokens of every scale."""
    layout = pyramid(config.scale.tokenizer.patch_nums)

    def sizes(like: Tensor) -> Tensor:
        return torch.tensor(layout.sizes, dtype=torch.int32, device=like.device)

    transformer = (
        Key("trunk.blocks.{i}.mamba.{name*}", "blocks.{i}.mamba.{name*}"),
        Key((), "blocks.{i}.attn.patch_nums", Constant(sizes), like="trunk.blocks.{i}.attn.q_bias"),
        *var.TRANSFORMER_KEYS,
        *scale_keys(layout, same),
    )
    return {"tokenizer": var.TOKENIZER_KEYS, "transformer": transformer}


def tiny() -> VAR:
    """The smallest complete M-VAR, for the laws."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 3),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=3, adaln_init=1.0)
    return build(MVarConfig(scale=scale, mamba=Mamba2Config(d_state=4, headdim=8)))
