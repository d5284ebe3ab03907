"""Recordings of the official code are reproduced, at any size; full-size key layouts map; the harness can fail."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import arvis
from arvis import parity
from arvis.parity import ParityError, allowed, difference
from arvis.parity.var import configured
from arvis.parity.var import run as run_var
from arvis.systems import system as module_of
from arvis.systems import var
from arvis.weights import WeightsError, load_official, to_official

COVERED = parity.runners()
RECORDINGS = [(slug, name) for slug in COVERED for name in parity.recordings(slug)]
LAYOUTS = Path(__file__).parents[2] / "shared/keys"


def recording(slug: str) -> parity.Fixture:
    try:
        return parity.find(slug)
    except ParityError as error:
        pytest.skip(str(error))


@pytest.fixture
def copied(tmp_path):
    """A copy of the recording of VAR, to be spoilt."""
    return shutil.copytree(recording("var").folder, tmp_path / "var")


# -- every system ---------------------------------------------------------------------------------------------------


def test_every_system_with_official_files_has_a_runner():
    published = [slug for slug in arvis.list_systems() if any(p.files for p in module_of(slug).PRESETS.values())]
    assert published and set(published) <= set(COVERED)


@pytest.mark.parametrize(("slug", "name"), RECORDINGS)
def test_every_recorded_tensor_is_reproduced(slug, name):
    fixture = recording(name)
    rows = parity.run(slug, fixture)
    assert [str(row) for row in rows if not row.ok] == []
    outputs = [tensor for tensor, about in fixture.tensors.items() if about["role"] == "output"]
    assert sum(row.verdict == "pass" for row in rows) == len(outputs) > 3


@pytest.mark.parametrize("slug", COVERED)
def test_every_full_size_key_layout_maps_in_both_directions(slug):
    files = sorted((LAYOUTS / slug).glob("*.json"))
    if not files:
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    reports = [parity.map_keys(slug, file) for file in files]
    assert [str(report) for report in reports if not report.ok] == []
    assert not any(report.fit.left_out or report.fit.kept for report in reports)


# -- the harness can fail -------------------------------------------------------------------------------------------


def verdicts(folder: Path) -> dict[str, parity.Row]:
    return {row.name: row for row in parity.run("var", parity.Fixture(folder))}


def spoil(folder: Path, name: str, change) -> None:
    for file in ("weights.safetensors", "io.safetensors"):
        tensors = load_file(folder / file)
        if name in tensors:
            save_file({**tensors, name: change(tensors[name])}, folder / file)


def test_a_changed_weight_of_the_transformer_fails_what_depends_on_it_and_nothing_else(copied):
    spoil(copied, "var.blocks.2.ffn.fc1.weight", lambda w: w * 1.01)
    rows = verdicts(copied)
    for name in ("tf_logits", "tf_logits_uncond", "ar_logits_guided"):
        assert rows[name].verdict == "fail" and rows[name].max_error > rows[name].tolerance
    for name in ("f", "idx_all_scales", "recon_from_idx", "filter_probs", "ar_block0_cached_k_lastpos"):
        assert rows[name].verdict == "pass"


def test_a_changed_weight_of_the_tokenizer_fails(copied):
    spoil(copied, "vae.quantize.quant_resi.qresi_ls.2.weight", lambda w: w * 1.01)
    rows = verdicts(copied)
    assert {rows[name].verdict for name in ("fhat_4", "recon_from_idx", "train_forward_vq_loss")} == {"fail"}
    assert {rows[name].verdict for name in ("f", "fhat_0")} == {"pass"}


def test_a_changed_recording_fails(copied):
    spoil(copied, "edit_keep_per_token", lambda x: x.roll(1))
    spoil(copied, "smooth_exp_noise", lambda x: x.roll(1, -1))
    spoil(copied, "tf_logits", lambda x: x[:1])
    rows = verdicts(copied)
    assert {n for n, row in rows.items() if not row.ok} == {"edit_keep_per_token", "smooth_fhat", "tf_logits"}
    assert math.isinf(rows["tf_logits"].max_error) and "recorded (1, 66, 96)" in rows["tf_logits"].note


def test_what_is_not_covered_is_said(copied):
    config = json.loads((copied / "config.json").read_text())
    config["tensors"]["one_more"] = {"role": "output", "run": None, "what": "", "compare": "exact", "atol": None}
    del config["tensors"]["f"]
    config["runs"]["smooth"]["guidance"] = "constant"
    (copied / "config.json").write_text(json.dumps(config))
    spoil(copied, "f", lambda x: x)
    rows = verdicts(copied)
    assert rows["tf_logits"].ok
    for name, told in (("one_more", "does not hold it"), ("f", "does not list it"), ("edit_image01", "var_ramp")):
        assert rows[name].verdict == "not covered" and told in rows[name].note and not rows[name].ok


def test_a_missing_weight_is_named(copied):
    tensors = load_file(copied / "weights.safetensors")
    del tensors["var.blocks.1.attn.proj.bias"]
    save_file(tensors, copied / "weights.safetensors")
    assert "blocks.1.attn.proj.bias" in verdicts(copied)["tf_logits"].note


def test_absent_recordings_are_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setenv("ARVIS_PARITY", str(tmp_path))
    with pytest.raises(ParityError, match=r"no recording of the official code of 'brush'.*looked in"):
        parity.find("brush")
    with pytest.raises(ParityError, match="'brush' has no comparison"):
        parity.run("brush", recording("var"))
    with pytest.raises(ParityError, match="holds no recording"):
        parity.Fixture(tmp_path)
    shutil.copytree(recording("var").folder, tmp_path / "elsewhere")
    assert tmp_path / "elsewhere" in parity.places("elsewhere")
    assert parity.find("elsewhere").slug == "var"


def test_differences_and_tolerances():
    inf, nan = math.inf, math.nan
    assert difference(torch.tensor([1.0, -inf, nan]), torch.tensor([1.5, -inf, nan])) == 0.5
    assert difference(torch.tensor([nan]), torch.tensor([0.0])) == inf
    assert difference(torch.tensor([True]), torch.tensor([0])) == 1
    assert difference(torch.zeros(0), torch.zeros(0)) == 0
    assert allowed("exact", None, torch.ones(1)) == 0
    assert allowed("close", 1e-3, torch.tensor([5.0])) == 1e-3
    assert allowed("relative", 1e-3, torch.tensor([-5.0, inf])) == pytest.approx(5e-3)
    with pytest.raises(ParityError, match="roughly"):
        allowed("roughly", 1.0, torch.ones(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["tensors"].update(more=["float32", [1]]), "unexpected in the file: more"),
        (lambda d: d["tensors"].pop("head.bias"), "missing from the file: head.bias"),
        (lambda d: d["tensors"]["head.bias"][1].append(2), "head.bias is"),
        (lambda d: d.update(parameters=7), "where the official model has 7"),
        (lambda d: d["tensors"].pop("lvl_1L"), "lvl_1L"),
    ],
)
def test_a_wrong_key_layout_is_refused(tmp_path, change, told):
    constructor = {"depth": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3, "patch_nums": [1, 2]}
    layout = {"slug": "var", "preset": "small", "constructor": {**constructor, "vocab_size": 5, "Cvae": 4}}
    tokenizer = {"vocab_size": 5, "z_channels": 4, "ch": 32, "ch_mult": [1], "v_patch_nums": [1, 2]}
    system = var.build(config := configured(tokenizer, constructor))
    tensors = to_official(system.transformer, var.keys(config)["transformer"])
    layout["tensors"] = {name: ["float32", list(t.shape)] for name, t in tensors.items()}
    layout["parameters"] = sum(p.numel() for p in system.transformer.parameters())
    file = tmp_path / "small.json"
    file.write_text(json.dumps(layout))
    assert parity.map_keys("var", file).ok
    change(layout)
    file.write_text(json.dumps(layout))
    report = parity.map_keys("var", file)
    assert not report.ok and told in str(report)


# -- other sizes than the recorded one ------------------------------------------------------------------------------

OTHERS = {
    "shared modulation, plain attention": {
        "tokenizer": {"vocab_size": 24, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 2},
        "transformer": {"num_classes": 3, "depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.5}
        | {"shared_aln": True, "attn_l2_norm": False},
        "patch_nums": [1, 2],
        "cfg": 2.0,
    },
    "angles, one convolution, wide start": {
        "tokenizer": {"vocab_size": 17, "z_channels": 8, "ch": 32, "ch_mult": [2], "num_res_blocks": 1}
        | {"using_znorm": True, "share_quant_resi": 1, "quant_conv_ks": 1, "using_sa": False},
        "transformer": {"num_classes": 5, "depth": 1, "embed_dim": 16, "num_heads": 1, "norm_eps": 1e-3},
        "patch_nums": [2, 3, 5],
        "cfg": 0.0,
    },
    "own convolutions": {
        "tokenizer": {"vocab_size": 9, "z_channels": 4, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
        | {"share_quant_resi": 0, "quant_resi": -0.3, "using_mid_sa": False, "beta": 0.5},
        "transformer": {"num_classes": 2, "depth": 2, "embed_dim": 8, "num_heads": 2, "shared_aln": True},
        "patch_nums": [1, 3, 4, 7],
        "cfg": -0.5,
    },
}


def other(name: str) -> tuple[dict, var.VARConfig, var.VAR]:
    """The model part of a config.json, our configuration, and a system with random weights of a lively size."""
    about = OTHERS[name]
    model = {
        "tokenizer": {"weights_prefix": "vae.", **about["tokenizer"], "v_patch_nums": about["patch_nums"]},
        "transformer": {"weights_prefix": "var.", **about["transformer"], "patch_nums": about["patch_nums"]},
    }
    config = configured(model["tokenizer"], model["transformer"])
    torch.manual_seed(3)
    system = var.build(config).eval()
    for name, p in system.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model, config, system


@pytest.mark.parametrize("name", OTHERS)
def test_official_names_and_back_are_exact(name):
    _, config, system = other(name)
    for part, table in var.keys(config).items():
        module = system.parts()[part]
        official = to_official(module, table)
        fresh = var.build(config).parts()[part]
        assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True))
        report = load_official(fresh, table, official)
        assert not report.left_out and not report.kept
        assert all(
            torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), module.state_dict().values(), strict=True)
        )
        again = to_official(fresh, table)
        assert list(again) == list(official) and all(torch.equal(again[n], official[n]) for n in official)


def test_buffers_of_official_files_are_made_and_checked():
    _, config, system = other("shared modulation, plain attention")
    table = var.keys(config)["transformer"]
    official = to_official(system.transformer, table)
    assert official["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]] and official["lvl_1L"].dtype == torch.int64
    assert official["attn_bias_for_masking"][0, 0, :2].tolist() == [[0] + [-math.inf] * 4, [0] * 5]
    assert torch.equal(official["blocks.1.attn.zero_k_bias"], torch.zeros(24))
    for name in ("lvl_1L", "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"):
        load_official(system.transformer, table, {n: t for n, t in official.items() if n != name})
        with pytest.raises(WeightsError, match=name):
            load_official(system.transformer, table, {**official, name: official[name] + 1})


@pytest.mark.parametrize("name", OTHERS)
def test_a_recording_of_any_size_runs(name, tmp_path):
    """Every tensor has the recorded shape at other sizes, and the cached run agrees with the one-pass one."""
    model, config, system = other(name)
    layout = system.tokenizer.layout()
    side, codes = layout.levels[-1][0] * config.tokenizer.downsample, config.tokenizer.vocab_size
    null, items, batch = config.num_classes, 3, 2
    runs = {
        "tokenizer": {"fhat_scales": [1], "recon_scale": 0},
        "teacher_forcing": {"null_class": null},
        "ar": {"cfg": OTHERS[name]["cfg"], "guidance": "var_ramp", "sampling": "argmax", "cached_tail": 4, "top_k": 1},
        "filter": {"cases": [{"top_k": 2, "top_p": 0.5}, {"top_k": 0, "top_p": 0.0}]},
        "smooth": {"cfg": 1.0, "guidance": "var_ramp", "top_k": 3, "top_p": 0.9, "batch": batch},
        "edit": {"cfg": 1.0, "guidance": "var_ramp", "sampling": "argmax", "inpainting": False, "class_label": 1}
        | {"box_y0x0y1x1": [0, 0, 0.5, 1]},
    }
    inputs = {
        "image": torch.rand(items, 3, side, side) * 2 - 1,
        "labels": torch.arange(items) % null,
        "filter_in": torch.randn(1, 4, codes),
        "smooth_exp_noise": torch.empty(batch, layout.n, codes).exponential_(),
    }
    prefixed = {
        prefix + n: t.contiguous()
        for (part, table), prefix in zip(var.keys(config).items(), ("vae.", "var."), strict=True)
        for n, t in to_official(system.parts()[part], table).items()
    }
    save_file({n: t.clone() for n, t in prefixed.items()}, tmp_path / "weights.safetensors")
    about = {"slug": "var", "model": model, "runs": runs, "tensors": {}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(inputs, tmp_path / "io.safetensors")
    with torch.no_grad():
        found = dict(run_var(parity.Fixture(tmp_path)))
        c, u = (
            system.teacher(found["ar_tokens"][..., None], {"class_labels": y}).logits[:, :, 0]
            for y in (inputs["labels"], torch.full((items,), null))
        )
    n, heads = layout.n, config.heads
    wanted = set(recording("var").tensors) - set(inputs)
    assert set(found) == {name for name in wanted if not name.startswith("fhat_")} | {"fhat_1", "fhat_mse_per_scale"}
    t = OTHERS[name]["cfg"] * layout.level_N[:, None] / (layout.K - 1)
    torch.testing.assert_close(found["ar_logits_guided"], (1 + t) * c - t * u, atol=1e-4, rtol=1e-4)
    assert torch.equal(found["ar_logits_guided"].argmax(-1), found["ar_tokens"])
    assert found["ar_block0_cache_shape"].tolist() == [2 * items, heads, n, config.width // heads]
    assert found["ar_block0_cached_k_lastpos"].shape == (2 * items, heads, 4, config.width // heads)
    assert found["ar_block0_cached_v_lastpos"].abs().amin((0, 1, 3)).gt(0).all()
    assert found["filter_probs"].shape == (2, 4, codes)
    assert (found["filter_probs"][0] > 0).sum(-1).le(2).all()
    assert found["smooth_fhat"].shape == (batch, config.tokenizer.z_channels, *layout.levels[-1])
    assert found["mask_visible"].shape == (n, n) and found["mask_visible"][-1].all()
    assert found["edit_keep_mask"].shape == layout.levels[-1]


def of_the_paper(w, x_BNC, labels, layout, heads, shared, cosine, eps):
    """VAR's transformer in official names, from the formulas alone: logits [B, N, V] of inputs without scale 0."""
    width, depth = w["class_emb.weight"].shape[1], len({n.split(".")[1] for n in w if n.startswith("blocks.")})
    c = w["class_emb.weight"][labels]
    start = c[:, None] + w["pos_start"]
    x = torch.cat((start, x_BNC @ w["word_embed.weight"].T + w["word_embed.bias"]), 1)
    x = x + w["pos_1LC"] + w["lvl_embed.weight"][w["lvl_1L"]]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(depth):
        b = f"blocks.{i}"
        if shared:
            six = w[f"{b}.ada_gss"] + linear(F.silu(c), "shared_ada_lin.1").view(-1, 1, 6, width)
        else:
            six = linear(F.silu(c), f"{b}.ada_lin.1").view(-1, 1, 6, width)
        g1, g2, s1, s2, b1, b2 = six.unbind(2)
        h = norm(x) * (1 + s1) + b1
        bias = torch.cat((w[f"{b}.attn.q_bias"], w[f"{b}.attn.zero_k_bias"], w[f"{b}.attn.v_bias"]))
        qkv = h @ w[f"{b}.attn.mat_qkv.weight"].T + bias
        q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        if cosine:
            q = q / q.norm(dim=-1, keepdim=True) * w[f"{b}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
            score = q @ (k / k.norm(dim=-1, keepdim=True)).mT
        else:
            score = q @ k.mT * 0.25 / q.shape[-1] ** 0.5
        out = (score + w["attn_bias_for_masking"]).softmax(-1) @ v
        x = x + g1 * linear(out.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = norm(x) * (1 + s2) + b2
        x = x + g2 * linear(F.gelu(linear(h, f"{b}.ffn.fc1"), approximate="tanh"), f"{b}.ffn.fc2")
    scale, shift = linear(F.silu(c), "head_nm.ada_lin.1")[:, None].chunk(2, -1)
    return linear(norm(x) * (1 + scale) + shift, "head")


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_transformer_follows_the_formulas_in_every_variant(shared, cosine):
    values = {"num_classes": 3, "depth": 2, "embed_dim": 12, "num_heads": 2, "norm_eps": 1e-3}
    values |= {"shared_aln": shared, "attn_l2_norm": cosine, "patch_nums": [1, 2, 3]}
    config = configured({"vocab_size": 7, "z_channels": 4, "ch": 32, "ch_mult": [1], "v_patch_nums": [1, 2, 3]}, values)
    torch.manual_seed(0)
    system = var.build(config).double().eval()
    for p in system.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    official = to_official(system.transformer, var.keys(config)["transformer"])
    if cosine:  # a scale above the limit of 100
        system.transformer.trunk.blocks[0].attn.temperature.log_scale.data[0] = 5.0
    layout, labels = system.tokenizer.layout(), torch.tensor([0, 3])
    tokens = torch.randint(7, (2, layout.n, 1))
    x = system.tokenizer.inputs(tokens, layout, 1)
    with torch.no_grad():
        ours = system.teacher(tokens, {"class_labels": labels}).logits[:, :, 0]
        theirs = of_the_paper(official, x, labels, layout, config.heads, shared, cosine, config.norm_eps)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", [p for p in var.PRESETS])
def test_presets_are_the_official_constructors(name):
    file = LAYOUTS / "var" / f"{name.removeprefix('var-')}.json"
    if not file.exists():
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    values = json.loads(file.read_text())["constructor"]
    vae = json.loads((file.parent / "vae_ch160v4096z32.json").read_text())["constructor"]
    config, preset = configured({**vae, "v_patch_nums": values["patch_nums"]}, values), var.PRESETS[name].config()
    for field in ("tokenizer", "depth", "width", "heads", "num_classes", "norm_eps", "shared_aln", "attn_l2_norm"):
        assert getattr(preset, field) == getattr(config, field), field
