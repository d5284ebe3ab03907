"""Weights: official checkpoints <-> our modules, files read safely, folders in the hub's layout."""

from arvis.weights.adapters import AdapterFile, fingerprint, holds_adapters, merged, read_adapters, save_adapters
from arvis.weights.card import card
from arvis.weights.files import (
    Header,
    Pretrained,
    metadata,
    read,
    read_header,
    read_pretrained,
    save_pretrained,
    write,
)
from arvis.weights.hub import Hub, Remote, checksum, fetch
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
from arvis.weights.memory import affordable, free_disk, free_memory, takes, tensor_bytes, told
from arvis.weights.official import Official, locate
from arvis.weights.transforms import Chain, Constant, Either, Fuse, Rearrange, Same, Split, Tied, Transform

__all__ = [
    "SAME_NAMES",
    "AdapterFile",
    "Chain",
    "Constant",
    "Either",
    "Fuse",
    "Header",
    "Hub",
    "Key",
    "Mismatch",
    "Official",
    "Pretrained",
    "Rearrange",
    "Remote",
    "Report",
    "Same",
    "Split",
    "Tied",
    "Transform",
    "WeightsError",
    "affordable",
    "card",
    "checksum",
    "fetch",
    "fingerprint",
    "free_disk",
    "free_memory",
    "holds_adapters",
    "load_official",
    "locate",
    "map_shapes",
    "merged",
    "metadata",
    "read",
    "read_adapters",
    "read_header",
    "read_pretrained",
    "save_adapters",
    "save_pretrained",
    "takes",
    "tensor_bytes",
    "to_official",
    "told",
    "write",
]
