"""`arvis convert`: official files of a hub become a folder of ours that says where they come from, and the way back."""

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import arvis
from arvis import cli, systems
from arvis.weights import WeightsError, affordable, card, free_disk, free_memory, read, to_official, write
from small import built
from weights.test_by_name import published, same

REPO, VAE, GPT = "FoundationVision/var", "vae_ch160v4096z32.pth", "var_d16.pth"


@pytest.fixture
def var(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return published(hub, monkeypatch, "var", "var-d16")


def test_a_folder_says_where_its_weights_come_from(hub, var, capsys):
    from huggingface_hub import ModelCard

    cli.main(["convert", "var-d16", "ours"])
    out, err = capsys.readouterr()
    assert "to download to" in err and "licence MIT" in err, "said before it is done"
    sums = {name: hashlib.sha256(hub.repos[REPO][name]).hexdigest() for name in (VAE, GPT)}
    told = ModelCard(Path("ours/README.md").read_text())
    assert (told.data.license, told.data.base_model, told.data.library_name) == ("mit", [REPO], "arvis")
    rows = json.loads(Path("ours/config.json").read_text())["source"]["files"]
    assert [row["part"] for row in rows] == ["tokenizer", "transformer"]
    for row, name in zip(rows, (VAE, GPT), strict=True):
        stated = {"file": f"{REPO}/{name}", "revision": hub.commit(REPO), "sha256": sums[name]}
        assert row == {"part": row["part"], **stated}
        assert f"| {' | '.join(stated.values())} |" in told.text and sums[name] in out
    assert same(arvis.load(Path("ours")), "var") and same(arvis.load("ours"), "var")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in Path("ours").iterdir()}
    assert len(modes) == 1, "weights are as readable as the rest"


def test_the_way_there_and_back_gives_the_same_bits(hub, var):
    cli.main(["convert", "var-d16", "ours"])
    cli.main(["convert", "ours", "official", "--official"])
    for part, name in (("tokenizer", VAE), ("transformer", GPT)):
        Path("asked.pth").write_bytes(hub.repos[REPO][name])
        asked, back = read("asked.pth"), load_file(f"official/{part}.safetensors")
        assert asked.keys() == back.keys() and all(torch.equal(asked[n], back[n]) for n in asked)
    cli.main(["convert", "var-d16", "again", "--weights", "official"])
    first, second = (Path(folder, "model.safetensors").read_bytes() for folder in ("ours", "again"))
    assert first[-10_000:] == second[-10_000:] and same(arvis.load("./again"), "var")


def test_a_new_card_replaces_the_old_one_and_other_files_stay(hub, var):
    cli.main(["convert", "var-d16", "ours"])
    Path("ours/README.md").write_text("old")
    Path("ours/notes.txt").write_text("mine")
    cli.main(["convert", "var-d16", "ours", "--dtype", "float16"])
    assert "in float16" in Path("ours/README.md").read_text() and Path("ours/notes.txt").read_text() == "mine"


def test_a_damaged_copy_in_the_cache_is_noticed(hub, var, capsys):
    arvis.load("var-d16")
    blob = next(path for path in Path("cache").rglob(GPT)).resolve()
    whole = bytearray(blob.read_bytes())
    whole[len(whole) // 2] ^= 1
    blob.write_bytes(whole)
    with pytest.raises(SystemExit):
        cli.main(["convert", "var-d16", "ours"])
    assert "has the checksum" in capsys.readouterr().err and not Path("ours").exists()


def test_no_room_is_told_before_the_work(hub, var, capsys, monkeypatch):
    monkeypatch.setattr("arvis.weights.free_disk", lambda folder: 1000)
    with pytest.raises(SystemExit):
        cli.main(["convert", "var-d16", "ours"])
    assert "ours takes 2.87 MB, and 1 kB are free there" in capsys.readouterr().err and not hub.of("store")
    cli.main(["convert", "var-d16", "ours", "--anyway"])
    assert Path("ours/model.safetensors").exists()


def test_systems_and_info_say_what_is_in_the_cache(hub, var, capsys, monkeypatch):
    monkeypatch.setitem(systems.system("var").PRESETS, "var-d16", replace(var, text="someone/reader"))
    for state, told in (("on the hub", "to be downloaded, "), ("in the cache", "in the cache, ")):
        hub.asked.clear()
        cli.main(["systems"])
        assert f"var-d16                  {state}, licence MIT" in capsys.readouterr().out
        cli.main(["info", "var-d16"])
        out = capsys.readouterr().out
        assert f"{REPO}/{GPT} ({told}" in out and "text         someone/reader (fetched when" in out
        assert "M parameters take 2.87 MB of memory in float32; " in out
        assert not hub.asked, "neither asks the network"
        arvis.load("var-d16")


def test_cards_of_other_licences_and_conditions():
    source = {"repo": "a/b, c/d", "licence": "Own-1", "files": []}
    text = card("x", "X", source, "float32", ("prompt",), "0", "x")
    assert "license: other\nlicense_name: Own-1\n" in text and "- a/b\n- c/d\n" in text
    assert "pipeline_tag: text-to-image" in text and 'model.generate("a red apple")' in text
    assert "none is stated" in card("x", "X", {}, "float32", (), "0", "x")


def test_one_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(2, 3).T, "b": torch.zeros(4)}
    tensors["c"] = tensors["b"][1:]
    found = load_file(write(tensors, tmp_path / "x.safetensors"))
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arvis.weights.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tensors, tmp_path / "y.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_free_memory_is_the_least_of_machine_and_container(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert free_memory("cpu", meminfo, group) == 4000 * 1024
    group.mkdir()
    for name, text in (("max", "max"), ("current", "900000"), ("stat", "anon 5\nactive_file 50\ninactive_file 100\n")):
        (group / f"memory.{name}").write_text(text)
    assert free_memory("cpu", meminfo, group) == 4000 * 1024
    (group / "memory.max").write_text("1000000")
    assert free_memory("cpu", meminfo, group) == 100_150
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "5000"), ("usage_in_bytes", "6000"), ("stat", "total_x 1\nactive_file 10\n")):
        (old / f"memory.{name}").write_text(text)
    assert free_memory("cpu", meminfo, old.parent) == 0
    meminfo.write_text("nothing")
    assert free_memory("cpu", meminfo, tmp_path / "none") is None or free_memory("cpu", meminfo, tmp_path / "none") > 0
    assert free_disk(tmp_path / "not" / "there") == free_disk(tmp_path)


def test_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9) if device == "cuda:1" else (1, 1))
    assert free_memory("cuda:1") == 5


def test_what_does_not_fit_is_told_in_numbers(monkeypatch):
    from arvis.weights import memory

    with torch.device("meta"):
        net = torch.nn.Linear(10**6, 10**5, bias=False)
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 16 * 10**9)
    assert memory.takes(net) == "100,000.0 M parameters take 400 GB of memory in float32; 16 GB are free"
    with pytest.raises(WeightsError, match="big takes 400 GB of memory and 16 GB are free: close what else uses it"):
        affordable("big", net)
    with pytest.raises(WeightsError, match="400 GB of the memory of cuda:0 and"):
        affordable("big", net, "cuda:0")
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": None)
    affordable("big", net)


def test_official_tensors_are_no_copies():
    system, config = built("var")
    official = to_official(system.transformer, systems.system("var").keys(config)["transformer"])
    own = system.transformer.head.linear.weight
    assert official["head.weight"].data_ptr() == own.data_ptr()
