"""Discretisations: one file per idea, all on channel-last vectors [..., D] -> Quantized."""

from arvis.quant.base import Quantized, Quantizer
from arvis.quant.bins import Bins, gaussian_bins, lloyd_bins, lloyd_max, uniform_bins
from arvis.quant.ema import EMAVQ, EMAVQConfig
from arvis.quant.factorised import Factorised, disentanglement
from arvis.quant.kmeans import KMeans, KMeansConfig, kmeans
from arvis.quant.lookup_free import LFQ, LFQConfig
from arvis.quant.multiscale import MultiScaleVQ, MultiScaleVQConfig, area_target, residual_encode
from arvis.quant.product import Product, join_ids, split_ids
from arvis.quant.projected import Projected
from arvis.quant.residual import Residual
from arvis.quant.rotation import rotate_to
from arvis.quant.scalar import FSQ, FSQConfig
from arvis.quant.simvq import SimVQ, SimVQConfig
from arvis.quant.sphere import BSQ, BSQConfig
from arvis.quant.vq import VQ, CosineVQ, VQConfig, nearest, nearest_cosine, straight_through

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "LFQ",
    "VQ",
    "BSQConfig",
    "Bins",
    "CosineVQ",
    "EMAVQConfig",
    "FSQConfig",
    "Factorised",
    "KMeans",
    "KMeansConfig",
    "LFQConfig",
    "MultiScaleVQ",
    "MultiScaleVQConfig",
    "Product",
    "Projected",
    "Quantized",
    "Quantizer",
    "Residual",
    "SimVQ",
    "SimVQConfig",
    "VQConfig",
    "area_target",
    "disentanglement",
    "gaussian_bins",
    "join_ids",
    "kmeans",
    "lloyd_bins",
    "lloyd_max",
    "nearest",
    "nearest_cosine",
    "residual_encode",
    "rotate_to",
    "split_ids",
    "straight_through",
    "uniform_bins",
]
