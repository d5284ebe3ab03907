"""Weights: official checkpoints <-> our modules, files read safely, folders in the hub's layout."""

from arvis.weights.files import Pretrained, metadata, read, read_pretrained, save_pretrained
from arvis.weights.hub import checksum, fetch
from arvis.weights.keys import (
    SAME_NAMES,
    Key,
    Mismatch,
    Report,
    WeightsError,
    load_official,
    map_shapes,
    to_official,
)
from arvis.weights.transforms import Chain, Constant, Either, Fuse, Rearrange, Same, Split, Tied, Transform

__all__ = [
    "SAME_NAMES",
    "Chain",
    "Constant",
    "Either",
    "Fuse",
    "Key",
    "Mismatch",
    "Pretrained",
    "Rearrange",
    "Report",
    "Same",
    "Split",
    "Tied",
    "Transform",
    "WeightsError",
    "checksum",
    "fetch",
    "load_official",
    "map_shapes",
    "metadata",
    "read",
    "read_pretrained",
    "save_pretrained",
    "to_official",
]
