"""SAR: models over scales that are trained, for a short while at the end, on what they predict themselves.

Rethinking Training Dynamics in Scale-wise Autoregressive Generation, arXiv 2512.06421. Weights: MIT.

A training objective alone: nothing changes at sampling. The published models are FlexVAR, and so is what is built here;
any other model over scales learns by the same objective (`arvis train NAME --init MODEL --set objective=sar`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from arvis.config import override
from arvis.published import File, Preset, Result
from arvis.systems import flexvar
from arvis.systems.flexvar import FlexVAR, FlexVARConfig, Objective
from arvis.training.refinement import RefinementConfig, refine
from arvis.weights import Key


@dataclass(frozen=True, kw_only=True)
class SARConfig:
    """The model and how it learns from itself."""

    base: FlexVARConfig
    refinement: RefinementConfig = field(default_factory=RefinementConfig)


def build(config: SARConfig) -> FlexVAR:
    """A FlexVAR with freshly initialised weights whose loss is that of its refinement."""
    return flexvar.build(config.base, partial(refine, config=config.refinement))


def objective(settings: Sequence[str] = ()) -> Objective:
    """The objective for any model over scales, with "name=value" changes of `RefinementConfig`."""
    return partial(refine, config=override(RefinementConfig(), settings))


# -- presets ------------------------------------------------------------------------------------------------------

_REPO = "ZGZzz/SAR"


def _preset(depth: int, epochs: int, adaln_init: float, base_lr: float, final: float, scale: float) -> Preset:
    """A published size: the last ten of `epochs` epochs, at the learning rate to which the base's schedule has come."""
    learned = flexvar.training(10, base_lr * final, 1.0)["generator"]
    return Preset(
        config=lambda: SARConfig(base=flexvar.preset(depth, adaln_init)),
        files={
            "tokenizer": File(repo="jiaosiyu1999/FlexVAR", name="FlexVAE.pth", inside="model"),
            "transformer": File(repo=_REPO, name=f"SARd{depth}-epo{epochs - 11}.pth", inside="trainer.var_wo_ddp|"),
        },
        licence="MIT",
        sampling={"cfg_scale": scale},
        training={"generator": {**learned, "warmup": 0, "schedule": "constant"}},
    )


def emoji_64() -> SARConfig:
    """The FlexVAR of the emoji world."""
    return SARConfig(base=flexvar.emoji_64())


CONFIG = SARConfig

PRESETS = {
    "sar-d16": _preset(16, 190, 1e-3, 1e-4, 0.1, 2.2),
    "sar-d20": _preset(20, 260, 1e-3, 1e-4, 0.1, 2.6),
    "sar-d24": _preset(24, 360, 1e-4, 8e-5, 0.01, 3.3),
    "sar-emoji-64": Preset(
        config=emoji_64, licence="Apache-2.0", sampling=flexvar.EMOJI_SAMPLING, training=flexvar.EMOJI_TRAINING
    ),
}

RESULTS = tuple(
    Result(
        preset=name,
        metric=metric,
        value=value,
        settings=f"10 steps, cfg {scale}, top_k 900, top_p 0.95, 50k, at 256",
        source="official README",
    )
    for name, fid, score, scale in (
        ("sar-d16", 2.89, 266.6, 2.2),
        ("sar-d20", 2.35, 293.3, 2.6),
        ("sar-d24", 2.14, 315.5, 3.3),
    )
    for metric, value in (("FID", fid), ("IS", score))
)


def keys(config: SARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part, which are those of the base."""
    return flexvar.keys(config.base)


def tiny() -> FlexVAR:
    """The smallest complete one, for the laws."""
    return build(SARConfig(base=flexvar.tiny_config()))
