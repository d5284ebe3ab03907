"""Reading files of strangers, and our own folders. A reader that unpickles anything fails here."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arvis.weights import (
    SAME_NAMES,
    WeightsError,
    load_official,
    metadata,
    read,
    read_pretrained,
    save_pretrained,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def same(tensors: dict[str, torch.Tensor], other: dict[str, torch.Tensor] = STATE) -> bool:
    return tensors.keys() == other.keys() and all(torch.equal(tensors[n], other[n]) for n in other)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Odd:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files(tmp_path, zipped):
    tree = {
        "trainer": {"var_wo_ddp": STATE, "vae.local": OrderedDict(b=torch.zeros(1))},
        "args": argparse.Namespace(lr=1e-3, names=["x"], device=torch.device("cpu")),
        "epoch": 3,
    }
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert same(read(tmp_path / "x.pth", "trainer.var_wo_ddp"))
    assert set(read(tmp_path / "x.pth", "trainer.vae.local")) == {"b"}
    assert same(read(tmp_path / "x.pth", "ema|trainer.var_wo_ddp"))
    with pytest.raises(WeightsError, match=r"lie at trainer\.var_wo_ddp, trainer\.vae\.local"):
        read(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"nothing at model; tensors lie at trainer\.var_wo_ddp"):
        read(tmp_path / "x.pth", "model")


def test_a_flat_file_may_be_nested_or_not(tmp_path):
    torch.save(STATE, tmp_path / "flat.pt")
    torch.save({"model": STATE}, tmp_path / "nested.pt")
    assert same(read(tmp_path / "flat.pt", "model|")) and same(read(tmp_path / "nested.pt", "model|"))


def test_prefixes(tmp_path):
    wrapped = {f"module._orig_mod.{n}": t for n, t in STATE.items()}
    torch.save(wrapped, tmp_path / "x.pt")
    assert same(read(tmp_path / "x.pt"))
    torch.save({**wrapped, "plain": torch.ones(1)}, tmp_path / "mixed.pt")
    assert "module._orig_mod.a.bias" in read(tmp_path / "mixed.pt")
    torch.save({**{f"gen.{n}": t for n, t in STATE.items()}, "lm.weight": torch.ones(1)}, tmp_path / "parts.pt")
    assert same(read(tmp_path / "parts.pt", prefix="gen."))
    with pytest.raises(WeightsError, match="no names that begin with vae"):
        read(tmp_path / "parts.pt", prefix="vae.")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, zipped):
    target = tmp_path / "touched"
    file = tmp_path / "evil.pth"
    torch.save({"model": STATE, "x": Evil(target)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"holds the Python object \w+\.system"):
        read(file, "model")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(target), protocol=2))
    with pytest.raises(WeightsError):
        read(tmp_path / "raw.pth")
    assert not target.exists()
    torch.save({"model": STATE, "x": Odd()}, file)
    with pytest.raises(WeightsError, match=r"Odd, and loading such objects can run any code"):
        read(file, "model")


def test_every_kind_of_broken_file_is_told_apart(tmp_path):
    file = tmp_path / "x.safetensors"
    torch.save(STATE, tmp_path / "x.pth")
    save_file(STATE, file)
    good, pth = file.read_bytes(), (tmp_path / "x.pth").read_bytes()
    cases = {
        "is empty": b"",
        "Git LFS pointer of 131 bytes": b"version https://git-lfs.example/spec/v1\noid sha256:".ljust(131, b"0"),
        "web page": b"\n<!DOCTYPE html><html>404</html>",
        "neither a safetensors nor a torch file": b"\x1f\x8b\x08 something packed",
        "truncated or damaged safetensors": good[:-4],
        "damaged safetensors": good[:40],
        "truncated or damaged torch file": pth[: len(pth) // 2],
        "not a readable torch file|damaged torch file": b"\x80\x02}q\x00broken",
        "begins with": b'{"error": "Repository not found"}',
    }
    for told, content in cases.items():
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=told):
            read(file)
    with pytest.raises(WeightsError, match="there is no file or folder"):
        read(tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"has no weights; looked for model\.safetensors"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_a_file_without_tensors(tmp_path):
    torch.save({"model": {"a": torch.ones(1), "step": 3}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"no plain tensors at model of .* a int named step"):
        read(tmp_path / "x.pth", "model")
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="a list"):
        read(tmp_path / "x.pth")


def module() -> nn.Module:
    net = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(4, 6)})
    net["two"].weight = net["one"].weight  # tied
    return net


CONFIG = {"width": 4, "sizes": [1, 2], "name": None}


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_a_folder_comes_back_bit_for_bit(tmp_path, shard_bytes):
    net = module()
    source = {"repo": "someone/weights", "licence": "MIT"}
    folder = save_pretrained(net, CONFIG, tmp_path / "m", system="toy", source=source, shard_bytes=shard_bytes)
    found = read_pretrained(folder)
    assert (found.system, found.config, found.source) == ("toy", CONFIG, source)
    other = module()
    load_official(other, SAME_NAMES, found.tensors)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    header = json.loads((folder / "config.json").read_text())
    assert header["library"] == "arvis" and header["format"] == 1
    if shard_bytes == 100:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        assert names[0] == "model-00001-of-00004.safetensors" and len(names) == 4
        assert json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 240
        (folder / names[1]).unlink()
        with pytest.raises(WeightsError, match="lacks model-00002-of-00004"):
            read_pretrained(folder)
    else:
        alone = read_pretrained(folder / "model.safetensors")  # one file describes itself
        assert alone.config == CONFIG and metadata(folder / "model.safetensors")["format"] == "pt"
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "nothing temporary may stay"


def test_a_folder_is_replaced_whole_and_strangers_are_left_alone(tmp_path, monkeypatch):
    folder = save_pretrained(module(), CONFIG, tmp_path / "m", system="toy", shard_bytes=100)
    (folder / "README.md").write_text("kept")
    save_pretrained(module(), {"new": 1}, folder, system="toy")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arvis.weights.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(module(), {"newer": 1}, folder, system="toy")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(WeightsError, match="holds no model of arvis"):
        save_pretrained(module(), CONFIG, tmp_path / "mine", system="toy")


def test_what_is_not_ours_is_refused(tmp_path):
    folder = save_pretrained(module(), CONFIG, tmp_path / "m", system="toy")
    for told, text in {
        "library is 'diffusers'": json.dumps({"library": "diffusers", "format": 1, "system": "x", "config": {}}),
        "has the format 99": json.dumps({"library": "arvis", "format": 99, "system": "x", "config": {}}),
        "not one of arvis": "{",
        "not one of arvis: 'library'": "{}",
    }.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=told):
            read_pretrained(folder)
    save_file(STATE, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match="does not say which system"):
        read_pretrained(tmp_path / "plain.safetensors")
    index = tmp_path / "hostile" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "../plain.safetensors"}}))
    with pytest.raises(WeightsError, match="outside its folder"):
        read(index.parent)


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_what_was_read_can_be_written_and_the_file_stays(tmp_path, write):
    write(STATE, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    tensors = read(tmp_path / "x")
    for tensor in tensors.values():
        tensor.zero_()
    assert (tmp_path / "x").read_bytes() == before and not any(t.any() for t in tensors.values())
    assert same(read(tmp_path / "x"))
