"""Pictures encoded once: the batches are those of encoding each time, whatever was killed, moved or changed."""

import contextlib
import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from arvis.data import fingerprint, latents, pictures
from arvis.data.batches import Batches, BatchesConfig
from arvis.data.folders import open_folder
from arvis.data.latents import encode_once, key
from arvis.data.views import PLACES, Views, source_size
from arvis.training.distributed import Ranks


class Numbers:
    """Item i is a picture whose every pixel is i."""

    classes = ("even", "odd")

    def __init__(self, count):
        self.count, self.calls = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.calls.append(i)
        return {"image": torch.full((3, 2, 2), i, dtype=torch.uint8), "caption": f"№ {i}", "label": i % 2}


def encode(x):
    """Codes and floats that tell the picture."""
    number = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
    return {"tokens": (number * 300)[:, None, None], "moments": x.flatten(1)}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(latents, "PART", 4)
    monkeypatch.setattr(latents, "ROWS", 3)


def batches(count=11):
    return Batches(Numbers(count), BatchesConfig(batch=5, seed=3))


def test_stored_batches_are_those_of_encoding_each_time(tmp_path, small_parts):
    plain, told = batches(), []
    stored = encode_once(plain, encode, tmp_path / "a" / "k", on_picture=lambda n, total: told.append((n, total)))
    assert told == [(3, 11), (4, 11), (7, 11), (8, 11), (11, 11)]
    plain.dataset.calls.clear()
    for step in (0, 1, 7):
        got = stored(step)
        assert not plain.dataset.calls, "no picture is read again"
        expected = plain(step)
        assert got["prompt"] == expected["prompt"]
        assert torch.equal(got["class_labels"], expected["class_labels"]) and got["tokens"].dtype == torch.int64
        for name, value in encode(expected["image"]).items():
            assert torch.equal(got[name], value)
        plain.dataset.calls.clear()


def test_what_is_there_is_not_encoded_again(tmp_path, small_parts):
    encode_once(batches(), encode, tmp_path / "k")
    (tmp_path / "k" / "part-00001.safetensors").unlink()
    (tmp_path / "k" / ".part-00001.safetensors.7.partial").write_bytes(b"torn")
    again = batches()
    whole = encode_once(again, encode, tmp_path / "k")(0)
    assert sorted(again.dataset.calls) == [4, 5, 6, 7]
    assert not list((tmp_path / "k").glob(".*")) and whole["tokens"].shape == (5, 1, 1)
    encode_once(batches(), encode, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["other"], "latents of other pictures or weights go"


def test_several_processes_share_the_work(tmp_path, small_parts):
    class Waiting(Ranks):
        def barrier(self):
            pass

    (tmp_path / "x").mkdir()
    for rank, own in ((1, [4, 5, 6, 7]), (0, [0, 1, 2, 3, 8, 9, 10])):
        data = batches()
        with contextlib.suppress(FileNotFoundError):  # rank 1 goes first and does not find the parts of rank 0
            encode_once(data, encode, tmp_path / "x", ranks=Waiting(rank=rank, world=2))
        assert data.dataset.calls == own
    assert len(list((tmp_path / "x").iterdir())) == 3


def test_a_full_disk_is_told_before_and_when_it_is_full(tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"the disk is full: the encoded pictures take .*cache=off") as error:
        encode_once(batches(), encode, tmp_path / "k")
    assert error.value.errno == errno.ENOSPC

    def full(*args, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latents, "save_file", full)
    with pytest.raises(OSError, match=r"the disk is full: could not write .*cache=off"):
        encode_once(batches(), encode, tmp_path / "j")
    assert not list((tmp_path / "j").iterdir())


def test_codes_are_stored_in_few_bits(tmp_path, small_parts):
    encode_once(batches(), lambda x: {"bits": (x[:, 0] > 0).long(), "ids": encode(x)["tokens"]}, tmp_path / "k")
    kinds = {n: t.dtype for n, t in latents.load_file(tmp_path / "k" / "part-00000.safetensors").items()}
    assert kinds == {"bits": torch.uint8, "ids": torch.int16, "class_labels": torch.uint8}
    for value, kind in ((-1, torch.int16), (255, torch.uint8), (2**15, torch.int32), (2**31, torch.int64)):
        assert latents._narrow(torch.tensor([value])).dtype == kind


def test_the_key_is_of_weights_and_texts():
    weight = torch.arange(6.0)
    keys = {key("a", weight), key("b", weight), key("a", weight + 1), key("a", weight.view(2, 3)), key("a")}
    assert len(keys) == 5 and key("a", weight) == key("a", weight.clone())
    assert key(torch.zeros(2, dtype=torch.bfloat16)) != key(torch.zeros(2))


def test_a_fingerprint_follows_files_and_not_places(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "cat").mkdir(parents=True)
        (tmp_path / place / "cat" / "a.png").write_bytes(b"x")
    times = os.stat(tmp_path / "one" / "cat" / "a.png")
    os.utime(tmp_path / "two" / "cat" / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    same = fingerprint(str(tmp_path / "one"))
    assert same == fingerprint(str(tmp_path / "two"))
    (tmp_path / "two" / "captions.jsonl").write_text("{}")
    assert same != fingerprint(str(tmp_path / "two"))
    assert fingerprint(str(tmp_path / "one" / "cat" / "a.png")) == fingerprint(str(tmp_path / "one" / "cat" / "*.png"))
    assert fingerprint("emoji") != fingerprint("emoji+scenes") and "emoji64.zip" in fingerprint("emoji")


def test_views_are_cut_at_the_corners_and_mirrored():
    class One:
        classes = ("x",)

        def __len__(self):
            return 2

        def __getitem__(self, i):
            image = torch.arange(3 * 11 * 11).view(3, 11, 11) + i
            return {"image": image, "caption": "c", "label": 0}

    assert source_size((10, 10), 5) == 11 and source_size((7, 10)) == 10
    data = Views(One(), (10, 10), crops=5, flip=True)
    assert len(data) == 20 and data.classes == ("x",)
    whole = One()[1]["image"]
    seen = [data[10 + view]["image"] for view in range(10)]
    for (top, left), image, mirrored in zip(PLACES, seen[:5], seen[5:], strict=True):
        y, x = round(top), round(left)
        assert torch.equal(image, whole[:, y : y + 10, x : x + 10]) and torch.equal(mirrored, image.flip(-1))
    plain = Views(One(), (11, 11))
    assert len(plain) == 2 and torch.equal(plain[1]["image"], whole)
    assert torch.equal(Views(One(), (7, 11))[1]["image"], whole[:, 2:9]), "the middle of the square"
    with pytest.raises(ValueError, match="1 to 5, got 6"):
        Views(One(), (10, 10), crops=6)


def test_what_is_held_out_does_not_depend_on_the_place(tmp_path):
    names = [f"{k:03}.png" for k in range(41)]
    for place in ("one", "two/deep"):
        (tmp_path / place).mkdir(parents=True)
        for k, name in enumerate(names):
            Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(tmp_path / place / name)
    held = [open_folder(tmp_path / place, 4, "heldout") for place in ("one", "two/deep")]
    assert [h.name(i) for h in held[:1] for i in range(len(h))] == [held[1].name(i) for i in range(len(held[1]))]
    few = [name for name in (f"{k}.png" for k in range(400)) if pictures._hash(name) % 20][:40]
    (tmp_path / "none").mkdir()
    for name in few:
        Image.new("RGB", (4, 4)).save(tmp_path / "none" / name)
    assert len(open_folder(tmp_path / "none", 4, "heldout")) == 1, "at least one is held out"
