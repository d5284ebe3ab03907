"""Images <-> tokens: one file per idea."""

from arvis.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder
from arvis.tokenizers.patch import PatchConfig, PatchDecoder, PatchEncoder
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig

__all__ = [
    "CNNConfig",
    "CNNDecoder",
    "CNNEncoder",
    "PatchConfig",
    "PatchDecoder",
    "PatchEncoder",
    "PyramidVQ",
    "PyramidVQConfig",
]
