"""brush: the model in the box, a small text-to-image painter of the emoji world.

VAR's three verbs over scales (arXiv 2404.02905), with a text encoder trained from scratch where VAR has a class table:
its summary row starts the sequence and modulates every block, its words are read by cross-attention, as in STAR
(arXiv 2406.10797). Not a published system: the smallest complete one, made to be trained and run on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from arvis.nn.scales import Condition
from arvis.nn.text import TextConfig, TextEncoder
from arvis.published import Preset
from arvis.state import Cond
from arvis.systems.var import VAR, VARConfig, assemble
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig


@dataclass(frozen=True, kw_only=True)
class BrushConfig:
    """The transformer over scales (its classes are not used) and the text encoder."""

    scale: VARConfig
    text: TextConfig


class TextConditioner(nn.Module):
    """Prompts as start row, modulation and cross-attention context; "no prompt" is the empty prompt."""

    conditions = ("prompt",)

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        self.start = nn.Linear(config.width, width)
        self.vector = nn.Linear(config.width, width)

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.encoder.prepare(request)

    def forward(self, cond: Cond | None, null_B: Tensor) -> Condition:
        rows, visible = self.encoder.read(cond, null_B)
        return Condition(self.start(rows[:, 0]), self.vector(rows[:, 0]), (rows, visible))


def build(config: BrushConfig) -> VAR:
    """A brush with freshly initialised weights."""
    system = assemble(config.scale, TextConditioner(config.text, config.scale.width), config.text.width)
    system.transformer.conditioner.encoder.init_weights()
    return system


def brush_64() -> BrushConfig:
    """64x64 pixels, 8x8 cells at the last of five scales: 103 tokens."""
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 5, 8), vocab_size=1024, z_channels=32, patch=PatchConfig())
    scale = VARConfig(
        tokenizer=tokenizer, depth=8, width=192, heads=6, num_classes=0, shared_aln=True, adaln_init=0.1, label_drop=0.1
    )
    return BrushConfig(scale=scale, text=TextConfig())


CONFIG = BrushConfig

_SCHEDULE = {"warmup": 50, "schedule": "cosine", "final": 0.02, "ema": 0.995}

PRESETS = {
    "brush-64": Preset(
        config=brush_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 2.0, "top_k": 200, "top_p": 0.9},
        training={
            "tokenizer": {"steps": 2000, "batch": 64, "lr": 1e-3, **_SCHEDULE, "clip": 1.0, "weight_decay": 0.01},
            "generator": {"steps": 2500, "batch": 64, "lr": 3e-3, **_SCHEDULE, "muon": ("trunk",)},
        },
    )
}


def tiny() -> VAR:
    """The smallest complete brush, for the laws."""
    patch = PatchConfig(grid=(3, 3), z_channels=4, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3), vocab_size=5, z_channels=4, patch=patch)
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=0, adaln_init=1.0)
    return build(BrushConfig(scale=scale, text=TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2)))
