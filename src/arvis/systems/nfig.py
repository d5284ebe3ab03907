"""NFIG: class-conditional images by next-frequency prediction, from the lowest band of the picture to the highest.

NFIG: Multi-Scale Autoregressive Image Generation via Frequency Ordering, arXiv 2503.07076. No weights are published.

VAR with one component exchanged: what the scales of the tokenizer code. Scale k codes the picture's features up to its
frequency (`quant.bands`) instead of a blurred residual of all of them. The transformer, its mask, guidance and training
are VAR's, and so is the quantiser's loss term.

Deviation: the paper weighs the distance of the features and their final sum alone; VAR's term has that of every partial
sum.
"""

from __future__ import annotations

from arvis.nn.scales import ClassConditioner
from arvis.published import Preset, Result
from arvis.quant.bands import BandTarget
from arvis.systems.var import PATCH_NUMS_256, VAR, VARConfig, VARSampling, assemble
from arvis.systems.var import PRESETS as VAR_PRESETS
from arvis.systems.var import preset as sizes
from arvis.systems.var import tiny_config as smallest

NFIGConfig = VARConfig
NFIGSampling = VARSampling


def build(config: NFIGConfig) -> VAR:
    """A VAR over frequency bands with freshly initialised weights."""
    return assemble(config, ClassConditioner(config.num_classes, config.width), target=BandTarget())


def _preset(depth: int, epochs: int) -> Preset:
    """A published size at ImageNet's 256 pixels, and its official training."""
    return Preset(
        config=lambda: sizes(depth, PATCH_NUMS_256, shared=False, adaln_init=1e-3),
        sampling={"cfg_scale": 4.5, "top_k": 990, "top_p": 0.0},
        training={
            "generator": {
                "steps": epochs * (1_281_167 // 768),
                "batch": 768,
                "lr": 8e-5,
                "weight_decay": 0.0,
            }
        },
    )


CONFIG = NFIGConfig

PRESETS = {
    "nfig-310m": _preset(16, epochs=350),
    "nfig-600m": _preset(20, epochs=55),
    "nfig-emoji-64": VAR_PRESETS["var-emoji-64"],
}

RESULTS = tuple(
    Result(
        preset="nfig-310m",
        metric=metric,
        value=value,
        settings="cfg 4.5, top_k 990, 50k",
        source="paper, as others quote it",
    )
    for metric, value in (("FID", 2.81), ("IS", 332.42), ("precision", 0.77), ("recall", 0.59), ("rFID", 0.85))
)


def tiny() -> VAR:
    """The smallest complete NFIG, for the laws."""
    return build(smallest())
