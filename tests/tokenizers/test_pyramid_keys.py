"""The published tokenizer at full size, names and shapes only."""

import json
from pathlib import Path

import pytest
import torch

from arvis.tokenizers import CNNConfig, PyramidVQ, PyramidVQConfig
from arvis.weights import SAME_NAMES, Key, map_shapes

KEYS = (Key("quantize.ema_vocab_hit_SV", "quantize.ema_vocab_hit_SV", optional=True), *SAME_NAMES)
BESIDE = Path(__file__).parents[3] / "shared/keys/var/vae_ch160v4096z32.json"


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return PyramidVQ(PyramidVQConfig(cnn=CNNConfig()))


def test_the_published_tokenizer_has_the_published_number_of_parameters(full_size):
    assert sum(p.numel() for p in full_size.parameters()) == 108_948_355


def test_the_published_names_and_shapes_are_ours(full_size):
    if not BESIDE.exists():
        pytest.skip("the table of official names lies beside the repository and is not here")
    table = {name: tuple(shape) for name, (_, shape) in json.loads(BESIDE.read_text())["tensors"].items()}
    assert {n: tuple(t.shape) for n, t in full_size.state_dict().items()} == table
    assert map_shapes(full_size, KEYS, table).ok


def test_usage_statistics_of_another_list_are_left_alone():
    with torch.device("meta"):
        tokenizer = PyramidVQ(PyramidVQConfig(patch_nums=(1, 2, 4, 16), cnn=CNNConfig()))
    table = {n: tuple(t.shape) for n, t in tokenizer.state_dict().items()} | {"quantize.ema_vocab_hit_SV": (10, 4096)}
    report = map_shapes(tokenizer, KEYS, table)
    assert not report.missing and not report.unexpected
    assert "quantize.ema_vocab_hit_SV" not in report.mapped
