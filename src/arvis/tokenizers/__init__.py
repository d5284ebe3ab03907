"""Images <-> tokens: one file per idea."""

from arvis.tokenizers.backbone import Backbone, chosen, coder
from arvis.tokenizers.bits import BitPyramid, BitPyramidConfig
from arvis.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder
from arvis.tokenizers.grid import GridVQ, GridVQConfig
from arvis.tokenizers.patch import PatchConfig, PatchDecoder, PatchEncoder
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig
from arvis.tokenizers.trainable import Trainable

__all__ = [
    "Backbone",
    "BitPyramid",
    "BitPyramidConfig",
    "CNNConfig",
    "CNNDecoder",
    "CNNEncoder",
    "GridVQ",
    "GridVQConfig",
    "PatchConfig",
    "PatchDecoder",
    "PatchEncoder",
    "PyramidVQ",
    "PyramidVQConfig",
    "Trainable",
    "chosen",
    "coder",
]
