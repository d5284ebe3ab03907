"""Files that were made to do harm, and files that were broken by accident: an error in words, and nothing runs."""

import argparse
import io
import json
import random
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from arvis.weights import WeightsError, read, read_header

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
RAN: list[str] = []


def harm(*args: object, **named: object) -> str:
    RAN.append(str(args))
    return "harm"


class Calls:
    """Pickled, it calls something when it is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(path: Path, tree: object, **options) -> Path:
    torch.save(tree, path, **options)
    return path


def packed(path: Path, program: bytes) -> Path:
    """A torch file around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def program(*ops: bytes) -> bytes:
    return b"\x80\x02" + b"".join(ops) + b"."


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


TEXT = b"X\x04\x00\x00\x00harm"

ATTACKS = {
    "call": program(name("builtins", "print"), TEXT, b"\x85R"),
    "eval": program(name("builtins", "eval"), TEXT, b"\x85R"),
    "system": program(name("os", "system"), TEXT, b"\x85R"),
    "posix": program(name("posix", "system"), TEXT, b"\x85R"),
    "attribute": program(name("builtins", "getattr"), name("argparse", "Namespace"), TEXT, b"\x86R"),
    "method of an allowed class": program(name("argparse", "Namespace.__init__"), TEXT, b"\x85R"),
    "module of an allowed class": program(name("argparse", "_sys.exit"), TEXT, b"\x85R"),
    "torch itself": program(name("torch", "load"), TEXT, b"\x85R"),
    "torch hub": program(name("torch.hub", "load"), TEXT, b"\x85R"),
    "tensor method": program(name("torch", "Tensor.backward"), TEXT, b"\x85R"),
    "in a namespace": program(
        name("argparse", "Namespace"), b")\x81}", TEXT, name("os", "system"), TEXT, b"\x85R", b"sb"
    ),
    "in a key": program(b"}", name("os", "system"), TEXT, b"\x85R", TEXT, b"s"),
    "in a namespace's slots": program(
        name("argparse", "Namespace"), b")\x81}}X\x09\x00\x00\x00__class__", name("subprocess", "Popen"), b"s\x86b"
    ),
    "old instance": b"\x80\x02(ios\nsystem\n.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04harm\x85R.",
    "extension": program(b"\x82\x01"),
    "persistent": program(TEXT, name("os", "system"), b"\x86Q"),
    "object array": program(
        name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", TEXT, b"\x87R"
    ),
    "object format": program(name("numpy", "dtype"), b"X\x02\x00\x00\x00O8\x89\x88\x87R"),
    "format of any text": program(name("numpy", "dtype"), b"X\x07\x00\x00\x00f4, (9)\x89\x88\x87R"),
    "our own stand-in": program(name("arvis.weights.plain", "unpickle"), TEXT, b"\x85R"),
}


NAMELESS = {"old instance", "stack global", "extension", "persistent"}
"""Attacks by instructions of the format that torch never writes, or writes for storages alone."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(tmp_path, attack):
    with pytest.raises(WeightsError) as error:
        read(packed(tmp_path / "x.pth", ATTACKS[attack]))
    if attack in NAMELESS:
        assert "x.pth is no plain torch file" in str(error.value) or "holds the Python object" in str(error.value)
        return
    asked = re.findall(rb"c(\w[\w.]*)\n(\w[\w.]*)\n", ATTACKS[attack])
    told = re.search(r"x.pth holds the Python object ([\w.]+), and loading such objects can run any", str(error.value))
    assert told is not None and any(".".join(p.decode() for p in pair).endswith(told[1]) for pair in asked)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["value", "deep", "namespace", "list", "ordered", "state"])
def test_nothing_of_a_strangers_program_runs(tmp_path, zipped, where):
    evil = Calls(harm, "x")
    tree = {
        "value": {"model": STATE, "x": evil},
        "deep": {"model": STATE, "x": {1: {2: evil}}},
        "namespace": {"model": STATE, "args": argparse.Namespace(x=evil)},
        "list": {"model": STATE, "x": [1, (2, evil)]},
        "ordered": {"model": OrderedDict(**{"a": STATE["a.bias"]}, b=evil)},
        "state": {"model": STATE, "optimizer": {"state": {0: {"step": evil}}}},
    }[where]
    saved(tmp_path / "x.pth", tree, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"holds the Python object .*harm, and loading such objects can run any"):
        read(tmp_path / "x.pth", "model")
    assert not RAN
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert RAN.pop(), "the attack is one"


def test_what_training_scripts_leave_is_read(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    args = argparse.Namespace(lr=1e-3, output_dir=Path("out"), device=torch.device("cpu"), betas=(0.9, 0.95), none=None)
    tree = {
        "model": net.state_dict(),
        "model_ema": {n: t * 2 for n, t in net.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": args,
        "epoch": 399,
        "steps": np.int64(5),
        "best": np.float32(1.5),
        "done": np.bool_(True),
        "name": np.str_("x"),
        "big": np.array(3.0, dtype=">f8")[()],
        "rng": torch.get_rng_state(),
        "param": torch.nn.Parameter(torch.ones(2)),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "ids": {1, 2},
    }
    for zipped in (True, False):
        file = saved(tmp_path / "x.pth", tree, _use_new_zipfile_serialization=zipped)
        tensors = read(file, "model_ema|model|")
        assert torch.equal(tensors["weight"], 2 * net.weight)
    old = (tmp_path / "x.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "x.pth").write_bytes(old)
    assert read(tmp_path / "x.pth", "model").keys() == {"weight", "bias"}


def test_numbers_come_out_as_they_went_in(tmp_path):
    from arvis.weights.plain import unpickle

    tree = {"a": np.float64(1.25), "b": np.int8(-3), "c": np.array(2.5, ">f4")[()], "d": np.bool_(False)}
    found = unpickle(saved(tmp_path / "x.pth", tree), mmap=True)
    assert found == {"a": 1.25, "b": -3, "c": 2.5, "d": False} and type(found["a"]) is float
    args = unpickle(saved(tmp_path / "y.pth", {"args": argparse.Namespace(lr=1.0, out=Path("a") / "b")}), mmap=True)
    assert args["args"].values["lr"] == 1.0 and str(args["args"].values["out"]) == str(Path("a") / "b")


def test_archives_that_grow_are_refused(tmp_path):
    file = tmp_path / "x.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(50_000_000))
    assert file.stat().st_size < 100_000
    with pytest.raises(WeightsError, match=r"is no torch file: archive/data\.pkl is packed"):
        read(file)
    whole = bytearray(saved(file, STATE).read_bytes())
    at = whole.rindex(b"PK\x01\x02")
    whole[at + 20 : at + 28] = struct.pack("<II", 10**9, 10**9)  # the stated size of the last record
    file.write_bytes(whole)
    with pytest.raises(WeightsError, match="lie over each other"):
        read(file)


def test_programs_of_torch_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for record in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"x/{record}", b"\x80\x02}.")
    with pytest.raises(WeightsError, match="TorchScript archive, a program with its weights"):
        read(tmp_path / "x.pt")


def header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "longer than the file": header(b"{}", length=10_000),
    "longer than any": header(b"{}", length=2**40),
    "longest": header(b"{}", length=2**64 - 1),
    "overlapping": header({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)),
    "with a hole": header({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, bytes(12)),
    "beyond the data": header({"a": entry([1000], [0, 4000])}, bytes(8)),
    "shorter than its shape": header({"a": entry([10**6], [0, 4])}, bytes(4)),
    "with an overflow": header({"a": entry([2**63, 2**63], [0, 4])}, bytes(4)),
    "backwards": header({"a": entry([1], [4, 0])}, bytes(4)),
    "negative": header({"a": entry([-1], [0, 4])}, bytes(4)),
    "of an unknown format": header({"a": entry([1], [0, 4], "OBJECT")}, bytes(4)),
    "with data to spare": header({"a": entry([1], [0, 4])}, bytes(100)),
    "of nested lists": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "that is no text": header(b"{\xff\xfe}"),
    "that is no table": header(b"{]"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_with_a_header(tmp_path, kind):
    (tmp_path / "x.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(WeightsError, match=r"damaged safetensors file|neither a safetensors nor a torch file"):
        read(tmp_path / "x.safetensors")


def test_nested_tables_do_not_exhaust_the_reader(tmp_path):
    deep = '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "model.safetensors.index.json").write_text(deep)
    with pytest.raises(WeightsError, match="not an index of shards"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(WeightsError, match="not one of arvis"):
        read_header(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damage_anywhere_is_an_error_in_words_or_none(tmp_path, kind):
    """Bytes are changed, cut and doubled at random; whatever is still readable has the shapes of tensors."""
    stream = io.BytesIO()
    torch.save(
        {"model": STATE, "args": argparse.Namespace(lr=1.0)}, stream, _use_new_zipfile_serialization=kind == "zip"
    )
    whole = save(STATE) if kind == "safetensors" else stream.getvalue()
    file, chance, refused = tmp_path / "x", random.Random(0), 0
    for _ in range(400):
        spoilt = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(spoilt))
            change = chance.choice(("flip", "flip", "cut", "double", "zero"))
            if change == "flip":
                spoilt[at] ^= 1 << chance.randrange(8)
            elif change == "cut":
                del spoilt[at : at + chance.randrange(1, 40)]
            elif change == "double":
                spoilt[at:at] = spoilt[at : at + chance.randrange(1, 40)]
            else:
                spoilt[at : at + 8] = bytes(8)
        file.write_bytes(spoilt)
        try:
            found = read(file, "model|")
        except WeightsError as error:
            refused += 1
            assert str(file) in str(error) and not re.search(r"Traceback|\n", str(error))
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert refused > 100
