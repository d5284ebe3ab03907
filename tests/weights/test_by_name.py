"""`arvis.load(name)` from end to end: the official files of every registered system, served by a hub on this machine.

Each preset keeps its repository, file names and places inside the files; its sizes are those of the tiny system.
"""

import argparse
import io
import json
import logging
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save

import arvis
from arvis import loading, systems
from arvis.model import Model
from arvis.published import File, Preset
from arvis.weights import WeightsError, to_official, told
from small import built, request, small

OFFICIAL = [
    (slug, name)
    for slug in systems.SYSTEMS
    for name, preset in getattr(systems.system(slug), "PRESETS", {}).items()
    if preset.files
]


def content(file: File, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """An official file, or a folder of two shards, as training scripts leave them: with what else lay around."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if file.name.endswith("/"):
        names = list(tensors)
        shards = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
        index = {name: f"{shard}.safetensors" for shard, part in shards.items() for name in part}
        files = {f"{shard}.safetensors": save({n: tensors[n] for n in part}) for shard, part in shards.items()}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
        return {file.name + name: data for name, data in files.items()}
    if file.name.endswith(".safetensors"):
        return {file.name: save(tensors)}
    tree: object = tensors
    place = file.inside.split("|")[0]
    for part in reversed(place.split(".") if place else []):
        tree = {part: tree, "args": argparse.Namespace(lr=1e-4, output_dir="out"), "epoch": 3}
        tree |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}}
    stream = io.BytesIO()
    torch.save(tree, stream)
    return {file.name: stream.getvalue()}


def published(hub, monkeypatch, slug: str, name: str) -> Preset:
    """Put the tiny system's weights on the hub as the official files of a preset."""
    module, (system, config) = systems.system(slug), built(slug)
    files = {}
    for part, file in module.PRESETS[name].files.items():
        official = content(file, to_official(system.parts()[part], module.keys(config)[part]))
        hub.repos.setdefault(file.repo, {}).update(official)
        hub.pinned.add((file.repo, file.revision))
        files[part] = replace(file, sha256=sha256(official[file.name]).hexdigest() if file.sha256 else "")
    preset = replace(module.PRESETS[name], config=lambda: config, sampling={}, files=files)
    monkeypatch.setitem(module.PRESETS, name, preset)
    monkeypatch.setattr(loading, "SHIPPED", loading.SHIPPED / "nothing")
    return preset


def same(model: Model, slug: str) -> bool:
    """Whether a model has the weights of the tiny system, under the official names and under ours."""
    module, (system, config) = systems.system(slug), built(slug)
    for part, keys in module.keys(config).items() if hasattr(module, "keys") else ():
        own, other = (to_official(s.parts()[part], keys) for s in (system, model.system))
        if own.keys() != other.keys() or not all(torch.equal(own[n], other[n]) for n in own):
            return False
    pairs = zip(system.named_parameters(), model.system.named_parameters(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize(("slug", "name"), OFFICIAL)
def test_official_weights_load_by_name_and_again_without_a_network(hub, monkeypatch, caplog, slug, name):
    caplog.set_level(logging.INFO, "arvis")
    preset = published(hub, monkeypatch, slug, name)
    model = arvis.load(name)
    assert same(model, slug) and (model.slug, model.name) == (slug, name)
    first, second = [r.message for r in caplog.records if r.message.startswith(f"{name}")][:2]
    assert f"licence {preset.licence}" in first and "to download to" in first
    assert all(f"{file.repo}/{file.name}" in first for file in preset.files.values())
    assert "M parameters take" in second and "of memory in float32" in second
    assert {row["part"] for row in model.source["files"]} == set(preset.files)
    assert {row["revision"] for row in model.source["files"]} == {
        file.revision if file.revision != "main" else hub.commit(file.repo) for file in preset.files.values()
    }
    hub.asked.clear()
    again = arvis.load(name, local_files_only=True)
    assert same(again, slug) and not hub.asked
    assert len(again.generate(**request(slug))) == 1


@pytest.fixture
def var(hub, monkeypatch):
    return published(hub, monkeypatch, "var", "var-d16")


def test_what_is_shown_before_anything_is_downloaded(hub, var, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "arvis")
    preset = replace(var, text="someone/reader")
    monkeypatch.setitem(systems.system("var").PRESETS, "var-d16", preset)
    hub.repos["someone/reader"] = {"model.safetensors": bytes(1234)}
    sizes = {file.name: len(hub.repos[file.repo][file.name]) for file in var.files.values()}
    arvis.load("var-d16", weights={})
    first, second, third = (r.message for r in caplog.records[:3])
    assert first.startswith("var-d16, licence MIT: FoundationVision/var/vae_ch160v4096z32.pth ")
    assert f"var_d16.pth {told(sizes['var_d16.pth'])}; {told(sum(sizes.values()))} to download to " in first
    count = sum(p.numel() for p in built("var")[0].parameters()) / 1e6
    assert f"{count:.1f} M parameters take" in second and "GB are free" in second
    assert third == "var-d16: someone/reader, 1.23 kB, reads the prompts; fetched when the first prompt comes"
    assert not [a for a in hub.of("store") if "reader" in a.name]
    caplog.clear()
    arvis.load("var-d16")
    assert "var_d16.pth" in caplog.records[0].message and "(in the cache)" in caplog.records[0].message
    assert "to download" not in caplog.records[0].message


def test_what_cannot_fit_is_refused_before_anything_is_downloaded(hub, var, monkeypatch):
    from arvis.weights import memory, official

    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 1000)
    with pytest.raises(WeightsError, match=r"var-d16 takes [\d.]+ MB of memory and 1 kB are free: .*anyway=True"):
        arvis.load("var-d16")
    assert not hub.asked
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": None)
    monkeypatch.setattr(official, "free_disk", lambda folder: 2000)
    with pytest.raises(WeightsError, match=r"MB of var-d16 are to be downloaded and 2 kB are free in .*HF_HOME"):
        arvis.load("var-d16")
    assert not hub.of("store")
    assert same(arvis.load("var-d16", anyway=True), "var")


def test_a_part_without_a_network_names_the_way_around(hub, var):
    with pytest.raises(WeightsError) as error:
        arvis.load("var-d16", local_files_only=True)
    text = str(error.value)
    assert text.startswith("vae_ch160v4096z32.pth of FoundationVision/var is not in the cache")
    assert text.endswith('arvis convert var-d16 FOLDER --weights tokenizer=FILE, in Python weights={"tokenizer": FILE}')


def test_an_official_repository_has_models_by_name(hub):
    with pytest.raises(
        WeightsError, match=r"FoundationVision/var holds the official files of .*var-d16, .*var-d36, .*: load one"
    ):
        arvis.load("FoundationVision/var")
    assert not hub.asked


def test_files_on_disk(hub, var, tmp_path):
    for file in var.files.values():
        (tmp_path / file.name).write_bytes(hub.repos[file.repo][file.name])
    vae, gpt = tmp_path / "vae_ch160v4096z32.pth", tmp_path / "var_d16.pth"
    whole = ({"tokenizer": vae, "transformer": str(gpt)}, tmp_path, {"tokenizer": tmp_path, "transformer": tmp_path})
    for weights in whole:
        assert same(arvis.load("var-d16", weights=weights), "var")
    assert not hub.asked, "nobody is asked where everything is on disk"
    model = arvis.load("var-d16", weights=gpt)  # the name says which part it is; the other one comes from the hub
    assert same(model, "var") and {a.name.rpartition("/")[2] for a in hub.of("hub", "HEAD")} == {vae.name}
    assert [row["file"] for row in model.source["files"]] == ["FoundationVision/var/" + vae.name, gpt.name]
    other = gpt.rename(tmp_path / "mine.pt")
    cases = {
        r'mine.pt is no official file of var-d16 \(.*\): say which part it is, weights=.*"transformer": ': other,
        "there is no file nothing": "nothing",
        "there is no file nothing$": {"tokenizer": "nothing"},
        "no part 'vae'; its parts are tokenizer, transformer": {"vae": vae},
        r"has none of the files of var-d16; looked for vae_ch160v4096z32.pth, tokenizer.safetensors, var_": tmp_path
        / "a",
    }
    (tmp_path / "a").mkdir()
    for words, weights in cases.items():
        with pytest.raises(WeightsError, match=words):
            arvis.load("var-d16", weights=weights)


def test_the_first_tensor_that_does_not_fit_is_named_with_both_shapes(hub, var):
    repo = hub.repos["FoundationVision/var"]
    state = torch.load(io.BytesIO(repo["var_d16.pth"]), weights_only=True)
    state["blocks.1.ffn.fc1.weight"] = torch.zeros(7, 16)
    stream = io.BytesIO()
    torch.save(state, stream)
    repo["var_d16.pth"] = stream.getvalue()
    own = tuple(built("var")[0].transformer.trunk.blocks[1].ffn.up.weight.shape)
    with pytest.raises(WeightsError) as error:
        arvis.load("var-d16")
    words = f"blocks.1.ffn.fc1.weight is (7, 16) and trunk.blocks.1.ffn.up.weight needs {own}"
    assert "var_d16.pth does not fit the model: " in str(error.value) and words in str(error.value)


def test_weights_stored_in_fewer_bits_are_widened(hub, var):
    repo = hub.repos["FoundationVision/var"]
    state = torch.load(io.BytesIO(repo["var_d16.pth"]), weights_only=True)
    stream = io.BytesIO()
    torch.save({n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}, stream)
    repo["var_d16.pth"] = stream.getvalue()
    model = arvis.load("var-d16")
    assert {p.dtype for p in model.system.parameters()} == {torch.float32}
    weight = built("var")[0].transformer.head.linear.weight
    assert torch.equal(model.system.transformer.head.linear.weight, weight.bfloat16().float())


def test_a_model_of_ours_on_the_hub(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO, "arvis")
    folder = small("brush").save_pretrained(tmp_path / "repo")
    hub.repos["someone/brush"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = Model.from_pretrained("someone/brush", revision=hub.commit("someone/brush"))
    assert same(model, "brush")
    assert "someone/brush, licence MIT: someone/brush/model.safetensors" in caplog.text and "to download" in caplog.text
    assert same(arvis.load("someone/brush"), "brush")
    with pytest.raises(
        WeightsError, match=r"there is no folder someone/else here; on the hub: the hub has no repository"
    ):
        arvis.load("someone/else")
    with pytest.raises(WeightsError, match="no revision v2"):
        Model.from_pretrained("someone/brush", revision="v2")


def test_a_folder_that_cannot_fit_is_refused(tmp_path, monkeypatch):
    from arvis.weights import memory

    folder = small("brush").save_pretrained(tmp_path / "m")
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 1000)
    with pytest.raises(WeightsError, match="1 kB are free"):
        arvis.load(folder)
    assert same(arvis.load(folder, anyway=True), "brush")
