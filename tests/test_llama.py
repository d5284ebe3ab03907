"""Llama's block and rotary table, conditions as rows; LlamaGen's assembly, names, recordings of other sizes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from arvis import parity
from arvis.config import from_dict, to_dict
from arvis.nn.llama import LlamaBlock, RMSNorm, SwiGLU, rotary_grid, swiglu_width
from arvis.nn.prefix import ClassPrefix, FeaturePrefix, WordPrefix
from arvis.nn.text import TextConfig
from arvis.nn.trunk import Call
from arvis.parity.llamagen import configured
from arvis.parity.llamagen import run as run_recording
from arvis.sampling import nucleus, top_p
from arvis.systems import llamagen
from arvis.tokens import Layout
from arvis.training.fit import FitConfig
from arvis.weights import load_official, to_official

LAYOUTS = Path(__file__).parents[2] / "shared/keys/llamagen"


# -- the block ------------------------------------------------------------------------------------------------------


def test_the_norm_is_computed_wide_and_rounded_before_its_weight():
    norm = RMSNorm(64).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    x = (torch.randn(16, 64) * 30).bfloat16()
    unit = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = unit.bfloat16() * norm.weight
    assert (norm(x) == wanted).float().mean() > 0.99  # float32 and float64 rarely round apart
    assert (norm(x) == (unit * norm.weight.double()).bfloat16()).float().mean() < 0.9
    assert norm.double()(x.double()).dtype == torch.float64


def test_the_hidden_width_is_the_official_one():
    official = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632, 2560: 6912, 3200: 8704, 4096: 11008}
    assert {width: swiglu_width(width) for width in official} == official
    assert swiglu_width(4096, 256, 1.3) == 14336 and swiglu_width(10, 4) == 28  # 14336: Llama 3's
    ffn = SwiGLU(3, 5)
    x = torch.randn(2, 3)
    gate, up = x @ ffn.gate.weight.T, x @ ffn.up.weight.T
    assert torch.allclose(ffn(x), (gate / (1 + (-gate).exp()) * up) @ ffn.down.weight.T, atol=1e-6)


def test_the_table_has_rows_columns_and_a_silent_prefix():
    layout = Layout(((2, 3),))
    table = rotary_grid(layout, 2, 8)
    assert table.shape == (1, 8, 4, 2) and table.dtype == torch.float32
    assert torch.equal(table[0, :2], torch.zeros(2, 4, 2))
    row, column = divmod(4, 3)  # the cell of token 4 stands at row 2 + 4
    angles = torch.tensor([row, row / 100, column, column / 100])
    assert torch.allclose(table[0, 6], torch.stack((angles.cos(), angles.sin()), -1), atol=1e-6)
    still = rotary_grid(layout, 2, 8, still=True)
    assert torch.equal(still[0, :2, :, 0], torch.ones(2, 4)) and torch.equal(still[0, :2, :, 1], torch.zeros(2, 4))
    assert torch.equal(still[0, 2:], table[0, 2:])
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_grid(layout, 1, 6)


def test_keys_that_are_shared_equal_keys_that_are_repeated():
    torch.manual_seed(0)
    shared, full = LlamaBlock(16, 4, hidden=8, kv_heads=2).double(), LlamaBlock(16, 4, hidden=8).double()
    state = shared.state_dict()
    q, k, v = state["attn.qkv.weight"].split((16, 8, 8))
    doubled = [x.view(2, 4, 16).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v)]
    full.load_state_dict({**state, "attn.qkv.weight": torch.cat((q, *doubled))})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    call = Call(table=rotary_grid(Layout(((1, 5),)), 0, 4).double())
    assert torch.allclose(shared(x, call, 0), full(x, call, 0), atol=1e-12)
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        LlamaBlock(16, 4, hidden=8, kv_heads=3)


# -- conditions -----------------------------------------------------------------------------------------------------


def features(rows: int = 4, channels: int = 3, length: int = 6):
    def encode(prompts, device):
        visible = torch.tensor([[i < len(p.split()) for i in range(rows)] for p in prompts])
        return torch.arange(1.0, 1 + len(prompts) * rows * channels).view(-1, rows, channels), visible

    torch.manual_seed(0)
    return FeaturePrefix(channels, 5, length, encode)


def test_text_stands_at_the_right_end_and_padding_is_nothing():
    prefix = features()
    cond = prefix.prepare({"prompt": ["two words", "a b c d", "one"]})
    assert cond["text_visible"].long().tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert cond["text_features"][0, :, 0].tolist() == [0, 0, 0, 0, 1, 4]
    assert cond["text_features"][2, :, 0].tolist() == [0, 0, 0, 0, 0, 25]
    again = prefix.prepare(cond)
    assert all(torch.equal(again[name], x) for name, x in cond.items()), "what is prepared stays as it is"
    whole = prefix.prepare({"text_features": torch.ones(1, 2, 3)})
    assert whole["text_visible"].sum() == 2
    null = torch.tensor([True, False, False])
    rows, visible = prefix(cond, null)
    stored = prefix.fc2(F.gelu(prefix.fc1(prefix.null), approximate="tanh"))
    assert torch.allclose(rows[0], stored) and not torch.allclose(rows[1], stored)
    assert torch.equal(visible, cond["text_visible"]), "also where the text was dropped"
    rows, visible = prefix(None, null)
    assert visible is None and torch.allclose(rows, stored.expand(3, -1, -1))
    assert "null" in dict(prefix.named_buffers()) and "null" not in dict(prefix.named_parameters())


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({}, "a prompt is needed"),
        ({"text_features": torch.ones(1, 7, 3)}, r"at most 6, 3\], got shape \(1, 7, 3\)"),
        ({"text_features": torch.ones(1, 2, 4)}, r"got shape \(1, 2, 4\)"),
        ({"text_features": torch.ones(1, 2, 3), "text_visible": [[True]]}, "text_visible"),
    ],
)
def test_wrong_text_is_told(request_, told):
    with pytest.raises(ValueError, match=told):
        features().prepare(request_)


def test_classes_and_words():
    prefix = ClassPrefix(4, 3)
    cond = prefix.prepare({"class_labels": 2})
    rows, visible = prefix(cond, torch.tensor([False]))
    assert visible is None and torch.equal(rows, prefix.embedding.weight[2].view(1, 1, 3))
    for nothing in (prefix(cond, torch.tensor([True])), prefix(None, torch.tensor([False]))):
        assert torch.equal(nothing.rows, prefix.embedding.weight[4].view(1, 1, 3))
    for wrong, told in (({}, "class_labels are needed"), ({"class_labels": [5]}, r"lie in 0..4, got 5..5")):
        with pytest.raises(ValueError, match=told):
            prefix.prepare(wrong)
    words = WordPrefix(TextConfig(buckets=64, words=3, pieces=4, width=8, depth=1, heads=2), 5).eval()
    cond = words.prepare({"prompt": ["a cat", "a dog"]})
    rows = words(cond, torch.tensor([False, True])).rows
    assert rows.shape == (2, words.length, 5) == (2, 4, 5)
    assert torch.allclose(rows[1], words(words.prepare({"prompt": ""}), torch.tensor([False])).rows[0], atol=1e-6)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    with pytest.raises(ValueError, match="a prompt is needed"):
        words.prepare({})


def test_the_two_nuclei_differ_where_a_sum_is_exact():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None, None, None]
    assert nucleus(logits, 0.5).isfinite().tolist() == [[[[True, True, False]]]]
    assert top_p(logits, 0.5).isfinite().tolist() == [[[[True, False, False]]]]
    for p, kept in ((0.4, 1), (0.6, 2), (0.75, 3), (0.9, 3), (0.0, 3), (1.0, 3), (1e-9, 1)):
        assert int(nucleus(logits, p).isfinite().sum()) == kept
    two = nucleus(logits.expand(2, -1, -1, -1), torch.tensor([0.4, 1.0]))
    assert two.isfinite().sum((1, 2, 3)).tolist() == [1, 3], "a setting per item"


# -- the assembly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", llamagen.PRESETS)
def test_presets_are_plain_data_and_can_be_trained(name):
    preset = llamagen.PRESETS[name]
    config = preset.config()
    assert from_dict(llamagen.CONFIG, json.loads(json.dumps(to_dict(config)))) == config
    assert llamagen.LlamaGenSampling(**preset.sampling).temperature == 1
    for stage in ("tokenizer", "generator"):
        assert FitConfig(**preset.training[stage]).steps > 100
    with torch.device("meta"):
        system = llamagen.build(config)
    assert system.transformer.output.weight.shape == (config.tokenizer.vocab_size, config.width)
    assert set(preset.files) == (set() if name.endswith("emoji-64") else set(system.parts()))


@pytest.mark.parametrize("name", [name for name, preset in llamagen.PRESETS.items() if preset.files])
def test_presets_are_the_official_constructors(name):
    preset = llamagen.PRESETS[name]
    tables = {}
    for part, file in preset.files.items():
        path = LAYOUTS / f"{file.name.removesuffix('.pt')}.json"
        if not path.exists():
            pytest.skip("the layouts of the official files lie beside the repository and are not here")
        tables[part] = json.loads(path.read_text())
        assert (tables[part]["hub_repo"], tables[part]["official_file"]) == (file.repo, file.name)
        assert file.inside.startswith("model|") and file.inside.endswith("|")
    official = configured(tables["tokenizer"]["constructor"], tables["transformer"]["constructor"])
    assert replace(preset.config(), drop=0.0) == official


def test_a_fresh_model_knows_nothing_and_has_the_official_spread():
    torch.manual_seed(0)
    system = llamagen.build(llamagen.emoji_64()).eval()
    t = system.transformer
    assert torch.equal(t.output.weight, torch.zeros_like(t.output.weight))
    for weight in (t.trunk.blocks[0].attn.qkv.weight, t.trunk.blocks[3].ffn.down.weight, t.embedding.weight):
        assert abs(float(weight.detach().std()) - 0.02) < 1e-3
    words = t.conditioner.encoder.piece.weight.detach()[1:]
    assert abs(float(words.std()) - 0.3) < 0.01, "words of unit size"
    tokens = torch.randint(1024, (2, 64, 1))
    nats = -system.teacher(tokens, system.prepare({"prompt": ["a", "b"]})).log_prob(tokens)
    assert torch.allclose(nats, torch.tensor(math.log(1024)))
    with pytest.raises(ValueError, match="the condition is one of"):
        replace(llamagen.emoji_64(), caption=llamagen.CaptionConfig())


# -- official names and recordings of other sizes -------------------------------------------------------------------

OTHER_TOKENIZER = {
    "weights_prefix": "vq.",
    "codebook_size": 24,
    "codebook_embed_dim": 4,
    "codebook_l2_norm": False,
    "commit_loss_beta": 0.5,
    "encoder_ch_mult": [1, 1, 2],
    "decoder_ch_mult": [1, 1, 2],
    "z_channels": 8,
    "ch": 32,
    "num_res_blocks": 1,
}
_SMALL = {"n_layer": 1, "vocab_size": 24, "multiple_of": 8, "ffn_dim_multiplier": 1.5, "norm_eps": 1e-3}
OTHER = {
    "c2i": {"weights_prefix": "c2i.", "model_type": "c2i", "dim": 24, "n_head": 3, "n_kv_head": None}
    | {"block_size": 4, "num_classes": 2, "cls_token_num": 1, "rope_base": 100, **_SMALL},
    "t2i": {"weights_prefix": "t2i.", "model_type": "t2i", "dim": 32, "n_head": 4, "n_kv_head": 2}
    | {"block_size": 9, "cls_token_num": 5, "caption_dim": 6, "rope_base": 50, **_SMALL},
}


def other(part: str):
    """A system of other sizes with lively weights."""
    config = configured(OTHER_TOKENIZER, OTHER[part])
    torch.manual_seed(3)
    system = llamagen.build(config).eval()
    for name, p in system.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return config, system


@pytest.mark.parametrize("part", OTHER)
def test_official_names_and_back_are_exact(part):
    config, system = other(part)
    keys = llamagen.keys(config)["transformer"]
    official = to_official(system.transformer, keys)
    fresh = llamagen.build(config).transformer
    report = load_official(fresh, keys, official)
    assert not report.left_out and not report.kept
    for a, b in zip(fresh.state_dict().values(), system.transformer.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert official["layers.0.attention.wqkv.weight"].shape[0] == (72 if part == "c2i" else 64)
    stale = {**official, "freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    left = load_official(fresh, keys, stale).left_out
    assert left == ("freqs_cis", "layers.0.attention.kv_cache.k_cache"), "left out, and told by name"


def test_a_recording_of_any_size_runs(tmp_path):
    systems = {part: other(part) for part in OTHER}
    weights = {f"vq.{n}": t for n, t in _official(systems["c2i"], "tokenizer").items()}
    for part, made in systems.items():
        weights |= {f"{part}.{n}": t for n, t in _official(made, "transformer").items()}
    save_file({n: t.contiguous().clone() for n, t in weights.items()}, tmp_path / "weights.safetensors")
    settings = {"cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": False}
    runs = {
        "c2i_late": {**settings, "cfg_scale": 3.0, "cfg_interval": 0},
        "c2i_drawn": {**settings, "cfg_scale": 1.0, "top_k": 5, "sample_logits": True},
        "t2i_greedy": {**settings, "cfg_scale": 2.0},
        "t2i_teacher_forcing": {"caption_lens": [5, 1, 3], "padding": "left", "valid": [0, 1, 1]},
        "filter_all": {"top_k": 4, "top_p": 0.5},
    }
    generator = torch.Generator().manual_seed(0)
    io = {
        "vq.image": torch.rand(2, 3, 8, 16, generator=generator) * 2 - 1,
        "vq.codes2": torch.randint(24, (3, 8), generator=generator),
        "vq.loss_codebook": torch.zeros(1),
        "vq.loss_commit": torch.zeros(1),
        "c2i.class": torch.tensor([0, 1, 2, 2]),
        "c2i.tokens": torch.randint(24, (4, 4), generator=generator),
        "c2i.gen_class": torch.tensor([1, 0, 1]),
        "c2i.uniforms": torch.rand(4, 3, generator=generator),
        "filter.logits": torch.randn(2, 24, generator=generator),
        "t2i.tokens": torch.randint(24, (3, 9), generator=generator),
        **{f"t2i.caption_valid{i}": torch.randn(n, 6, generator=generator) for i, n in enumerate((5, 1, 3))},
    }
    save_file(io, tmp_path / "io.safetensors")
    outputs = {"c2i.late": "c2i_late", "c2i.drawn": "c2i_drawn", "t2i.greedy": "t2i_greedy", "filter.all": "filter_all"}
    about = {n: {"role": "output", "run": r, "compare": "exact", "atol": None} for n, r in outputs.items()}
    about["c2i.uniforms"] = {"role": "noise", "run": "c2i_drawn", "compare": "exact", "atol": None}
    model = {"tokenizer": OTHER_TOKENIZER, **OTHER}
    (tmp_path / "config.json").write_text(
        json.dumps({"slug": "llamagen", "model": model, "runs": runs, "tensors": about})
    )
    with torch.no_grad():
        found = dict(run_recording(parity.Fixture(tmp_path)))
        c2i, t2i = systems["c2i"][1], systems["t2i"][1]
        tokens, cond = found["c2i.late"][..., None], c2i.prepare({"class_labels": io["c2i.gen_class"]})
        c, u = (c2i.teacher(tokens, x).logits[:, :, 0] for x in (cond, None))
        guided = torch.where(torch.arange(4)[:, None] <= 1, u + 3 * (c - u), c)
        assert torch.equal(guided.argmax(-1), found["c2i.late"])
        best = c2i.teacher(found["c2i.drawn"][..., None], cond).logits[:, :, 0]
        kept = best.masked_fill(best < best.topk(5).values[..., -1:], -math.inf).softmax(-1)
        assert torch.equal((kept.cumsum(-1) <= io["c2i.uniforms"].T[..., None]).sum(-1), found["c2i.drawn"])
        z = found["vq.pre_quant"].flatten(2).transpose(1, 2)
        table = systems["c2i"][1].tokenizer.quantize.embedding.weight
        assert torch.equal(torch.cdist(z, table).argmin(-1), found["vq.indices"]), "codes by distance, not by angle"
        assert found["vq.decode2"].shape == (3, 3, 8, 16) and found["c2i.rope"].shape == (5, 4, 2)
        assert found["t2i.greedy"].shape == (3, 9) and (found["filter.all"] > 0).sum(-1).max() <= 4
        nats = F.cross_entropy(found["t2i.logits"].transpose(1, 2), io["t2i.tokens"], reduction="none").mean(1)
        assert torch.allclose(found["t2i.loss_valid_0_1_1"], nats[1:].mean()[None], atol=1e-5)
        assert t2i.transformer.trunk.blocks[0].attn.kv_heads == 2


def _official(made, part: str) -> dict[str, torch.Tensor]:
    config, system = made
    return to_official(system.parts()[part], llamagen.keys(config)[part])


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("c2i", {"block_size": 5}, "square grid, got 5"),
        ("c2i", {"vocab_size": 9}, "has 9 codes"),
        ("tokenizer", {"norm_groups": 16}, "norm_groups=32, got 16"),
    ],
)
def test_constructors_that_cannot_be_are_refused(part, change, told):
    values = {"tokenizer": OTHER_TOKENIZER, **OTHER}
    values[part] = {**values[part], **change}
    with pytest.raises(ValueError, match=told):
        configured(values["tokenizer"], values["c2i"])
