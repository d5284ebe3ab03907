"""Discretisations: one file per idea, all on channel-last vectors."""

from arvis.quant.base import Quantized, Quantizer
from arvis.quant.multiscale import MultiScaleVQ, MultiScaleVQConfig, area_target, residual_encode
from arvis.quant.vq import VQ, CosineVQ, VQConfig, nearest, nearest_cosine, straight_through

__all__ = [
    "VQ",
    "CosineVQ",
    "MultiScaleVQ",
    "MultiScaleVQConfig",
    "Quantized",
    "Quantizer",
    "VQConfig",
    "area_target",
    "nearest",
    "nearest_cosine",
    "residual_encode",
    "straight_through",
]
