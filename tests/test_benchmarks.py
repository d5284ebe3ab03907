"""What the pairs of benchmarks compare, count and print, as far as no official checkout is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks.pairs import infinity, known, named, same_update, updated
from benchmarks.pairs.__main__ import best, table
from benchmarks.pairs.mar import Block
from torch import nn

from arvis import systems
from arvis.loading import empty

COUNTED = [name for name in known() if named(name).preset]


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_is_the_preset_but_for_what_a_pair_says(name: str) -> None:
    """A pair with less depth or other settings must not be counted as the whole model."""
    pair = named(name)
    slug, config, settings = pair.generation()
    system = empty(slug, config)
    assert system.Sampling(**settings)
    whole = systems.preset(pair.preset)[2].config()
    differing = {field for field in vars(whole) if vars(whole)[field] != vars(config)[field]}
    assert differing <= set(pair.changed)
    assert settings.items() >= pair.settings.items()


@pytest.mark.parametrize("name", [name for name in COUNTED if "blocks" in name])
def test_a_reduced_model_has_so_many_of_the_whole_ones_blocks(name: str) -> None:
    slug, config, _ = named(name).generation()
    trunk, whole = (empty(slug, c).transformer.trunk for c in (config, systems.preset(named(name).preset)[2].config()))
    sizes = [sum(p.numel() for p in t.parameters()) for t in (trunk, whole)]
    assert sizes[0] * len(whole) == sizes[1] * len(trunk)
    assert f"{len(trunk)} of {len(whole)} blocks" in name


def test_packed_texts_do_not_see_each_other() -> None:
    """The stand-in of the kernel equals dense attention under a mask that lets each item see its own text."""
    torch.manual_seed(0)
    q, kv = torch.randn(6, 2, 8), torch.randn(7, 2, 2, 8)
    ends_q, ends_k = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 7])
    mask = (torch.arange(6)[:, None] >= 3) == (torch.arange(7) >= 5)
    k, v = kv.transpose(0, 2).unbind(1)
    want = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask, scale=0.3).transpose(0, 1)
    got = infinity.packed_attention(q, kv, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, softmax_scale=0.3)
    torch.testing.assert_close(got, want)


def test_the_stand_in_of_a_block_equals_torchs_own() -> None:
    torch.manual_seed(0)
    ours = Block(16, 2, 4.0, nn.LayerNorm).eval()
    theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1": "mlp.fc1"}
    names |= {"linear2": "mlp.fc2"}
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        value.copy_(state[name])
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_an_update_is_not_the_same_when_only_its_loss_is() -> None:
    layer = nn.Linear(3, 5)
    first = updated(100 + layer(torch.eye(3)).square().sum(), layer, layer)
    assert same_update(first, first) == 1
    wrong = torch.cat((first[:1], -first[1:]))
    assert same_update(wrong, first) < 0
    assert same_update(torch.cat((2 * first[:1], first[1:])), first) == 0


def test_the_table_divides_by_the_quicker_official_format() -> None:
    common = {"name": "a", "batch": 1, "machine": "m", "date": "d", "versions": {"torch": "t"}}
    wide = common | {"precision": "float32", "official_s": 6.0, "ours_s": 2.0, "ratio": 3.0}
    half = common | {"precision": "bfloat16", "official_s": 3.0, "ours_s": 1.0, "ratio": 3.0}
    half |= {"floor_s": 0.5, "floor_share": 0.5, "peak_mb": 7, "kept_mb": 6}
    other = wide | {"machine": "n", "official_s": 1.0}
    assert best([wide, half, other], wide) == 1.5
    assert best([wide, other], wide) is None
    lines = table([wide, half]).splitlines()
    assert lines[2] == "| a | 1 | float32 | 6.00 s | 2.00 s | 3.00 | 1.50 | - | - | - |"
    assert lines[3] == "| a | 1 | bfloat16 | 3.00 s | 1.00 s | 3.00 | 3.00 | 0.50 s | 50% | 7 MB, 6 MB |"
    assert lines[-1] == "m; torch t; d"
