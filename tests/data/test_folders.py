import io
import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from arvis.data import open_data
from arvis.data.folders import FolderSource, open_folder
from arvis.data.pictures import Pictures
from arvis.data.scenes import SKILLS
from arvis.data.tars import TarSource


def _png(grey, size=(20, 24)):
    stream = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(stream, "PNG")
    return stream.getvalue()


def _grey(item):
    return int(item["image"][0, 0, 0])


def _write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def test_classes_by_sub_folder(tmp_path):
    _write(tmp_path, {"b_cat/1.png": _png(1), "b_cat/deep/2.png": _png(2), "a/0.jpg": _png(0), ".x/9.png": _png(9)})
    _write(tmp_path, {"a/.hidden.png": b"", "a/notes.md": "no picture"})
    data = open_folder(tmp_path, 16)
    assert data.classes == ("a", "b_cat") and len(data) == 3
    items = [data[i] for i in range(3)]
    assert [(i["label"], i["caption"], _grey(i)) for i in items] == [(0, "a", 0), (1, "b cat", 1), (1, "b cat", 2)]
    assert items[0]["image"].shape == (3, 16, 16)


def test_captions_beside_the_picture(tmp_path):
    _write(tmp_path, {"1.png": _png(1), "1.txt": " a red apple \n", "2.png": _png(2)})
    data = open_folder(tmp_path, 8)
    assert data.classes == () and [data[i]["caption"] for i in range(2)] == ["a red apple", ""]


@pytest.mark.parametrize("keys", [("file", "caption"), ("file_name", "text")])
def test_captions_file(tmp_path, keys):
    rows = [("x/2.png", "zwei Äpfel"), ("1.png", "one"), ("gone.png", "gone")]
    lines = "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
    _write(tmp_path, {"1.png": _png(1), "x/2.png": _png(2), "unlisted.png": _png(3), "captions.jsonl": lines + "\n\n"})
    data = open_folder(tmp_path, 8)
    assert {_grey(data[i]): data[i]["caption"] for i in range(len(data))} == {1: "one", 2: "zwei Äpfel"}
    assert [(name.endswith("gone.png"), "not there" in why) for name, why in data.skipped] == [(True, True)]


def test_a_bad_captions_line_is_named(tmp_path):
    _write(tmp_path, {"1.png": _png(1), "captions.jsonl": '{"file": "1.png", "caption": "one"}\n{"file": 3\n'})
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2: expected"):
        open_folder(tmp_path, 8)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist; expected a folder of pictures"):
        open_folder(tmp_path / "gone", 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_folder(tmp_path / "file", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty; expected pictures \(\.png"):
        open_folder(tmp_path / "empty", 8)


def test_corrupt_pictures_are_skipped_counted_and_named(tmp_path, caplog):
    files = {f"{k}.png": _png(k) for k in range(6)}
    files["2.png"] = files["2.png"][:40]
    files["3.png"] = b"text"
    files["5.png"] = b""
    _write(tmp_path, files)
    data = open_folder(tmp_path, 8)
    with caplog.at_level(logging.WARNING, logger="arvis"):
        first = [_grey(data[i]) for i in range(6)]
        again = [_grey(data[i]) for i in range(6)]
    assert first == again == [0, 1, 4, 4, 4, 0]  # the next readable one stands in, round the end
    assert sorted(name.rsplit("/")[-1] for name, _ in data.skipped) == ["2.png", "3.png", "5.png"]
    assert dict(data.skipped)[str(tmp_path / "3.png")] == "not a picture file Pillow knows"
    assert len([r for r in caplog.records if "skipped" in r.message]) == 3
    fresh = open_folder(tmp_path, 8)
    assert [_grey(fresh[i]) for i in (5, 3, 2)] == [0, 4, 4]  # whatever was read before


def test_nothing_readable_is_an_error(tmp_path):
    _write(tmp_path, {"1.png": b"x", "2.png": b"y"})
    data = open_folder(tmp_path, 8)
    with pytest.raises(OSError, match=r"none of the 2 pictures could be read; the first: .*2\.png"):
        data[1]
    with pytest.raises(IndexError):
        data[2]


def test_splits(tmp_path):
    _write(tmp_path, {f"{k:03}.png": _png(k) for k in range(200)})
    train, held = open_folder(tmp_path, 4, "train"), open_folder(tmp_path, 4, "heldout")
    greys = {_grey(train[i]) for i in range(len(train))}, {_grey(held[i]) for i in range(len(held))}
    assert not greys[0] & greys[1] and greys[0] | greys[1] == set(range(200)) and 2 <= len(greys[1]) <= 25
    assert len(open_folder(tmp_path, 4, "all")) == 200
    with pytest.raises(ValueError, match="unknown split 'test'"):
        open_folder(tmp_path, 4, "test")


def test_small_folders_and_named_splits(tmp_path):
    _write(tmp_path / "few", {"1.png": _png(1), "2.png": _png(2)})
    assert len(open_folder(tmp_path / "few", 4, "train")) == 2
    with pytest.raises(ValueError, match="too few to hold some out"):
        open_folder(tmp_path / "few", 4, "heldout")
    _write(tmp_path / "named", {"train/a/1.png": _png(1), "val/a/2.png": _png(2), "val/b/3.png": _png(3)})
    assert len(open_folder(tmp_path / "named", 4, "train")) == 1
    held = open_folder(tmp_path / "named", 4, "heldout")
    assert len(held) == 2 and held.classes == ("a", "b")


def _tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_tars(tmp_path):
    _tar(tmp_path / "0.tar", [("a/1.png", _png(1)), ("a/1.txt", b"one\n"), ("a/1.cls", b"7"), ("a/2.seg.png", _png(9))])
    _tar(tmp_path / "1.tar", [("3.json", b'{"text": "three", "label": 3}'), ("3.JPG", _png(3)), ("note.txt", b"x")])
    data = open_data(str(tmp_path / "*.tar"), 8)
    assert [(_grey(d), d["caption"], d["label"]) for d in (data[0], data[1])] == [(1, "one", 7), (3, "three", 3)]
    assert len(data) == 2
    assert len(open_data(str(tmp_path / "1.tar"), 8)) == 1


def test_damaged_tars(tmp_path, caplog):
    members = [(f"{k}.png", _png(k, (64, 64))) for k in range(4)]
    _tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2600])
    source = TarSource([tmp_path / "cut.tar"])
    assert 1 <= len(source) <= 3 and "ends early" in source.skipped[0][1]
    assert _grey(Pictures(source, 8)[0]) == 0
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"no\.tar is not an uncompressed tar"):
        TarSource([tmp_path / "no.tar"])
    _tar(tmp_path / "packed.tar", members, "w:gz")
    with pytest.raises(ValueError, match="unpack"):
        TarSource([tmp_path / "packed.tar"])
    _tar(tmp_path / "text.tar", [("1.txt", b"x")])
    with pytest.raises(ValueError, match="no pictures in"):
        TarSource([tmp_path / "text.tar"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TarSource([tmp_path / "gone.tar"])
    _tar(tmp_path / "labels.tar", [("1.png", _png(1)), ("1.cls", b"seven"), ("2.png", _png(2))])
    data = Pictures(TarSource([tmp_path / "labels.tar"]), 8)
    assert _grey(data[0]) == 2 and "bad caption or label" in data.skipped[0][1]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra 'data'")
    import pyarrow.parquet as parquet

    images = [{"bytes": _png(k), "path": f"{k}.png"} for k in range(7)]
    images[4] = {"bytes": b"broken", "path": None}
    texts, labels = [f"number {k}" for k in range(7)], [k % 3 for k in range(7)]
    table = arrow.table({"image": images, "text": texts, "label": labels})
    names = {"info": {"features": {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    parquet.write_table(table.slice(0, 5), tmp_path / "a.parquet", row_group_size=2)
    parquet.write_table(table.slice(5), tmp_path / "b.parquet")
    data = open_data(str(tmp_path / "*.parquet"), 8)
    assert len(data) == 7 and data.classes == ("x", "y", "z")
    found = [(_grey(data[i]), data[i]["caption"], data[i]["label"]) for i in (6, 0, 3, 4)]
    assert found == [(6, "number 6", 0), (0, "number 0", 0), (3, "number 3", 0), (5, "number 5", 2)]
    assert data.skipped == [(f"{tmp_path / 'a.parquet'}:2:0", "not a picture file Pillow knows")]
    parquet.write_table(arrow.table({"pixels": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"no column of pictures: .* got pixels"):
        open_data(str(tmp_path / "c.parquet"), 8)
    (tmp_path / "d.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a parquet file"):
        open_data(str(tmp_path / "d.parquet"), 8)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"arvis\[data\]"):
        open_data(str(tmp_path / "a.parquet"), 8)


def test_names_of_data(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'emojis' \(nothing is there\); expected 'emoji'"):
        open_data("emojis", 64)
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=r"found .*a\.xyz"):
        open_data(str(tmp_path / "a.xyz"), 64)
    both = open_data("emoji+scenes", 64, seed=3)
    assert both[0]["image"].shape == both[1]["image"].shape == (3, 64, 64)
    names = {both.source_of(i)[0]: both.classes[both[i]["label"]] for i in range(20)}
    assert names[0] == "Smileys & Emotion" and names[1] in SKILLS and len(both.classes) == 9 + len(SKILLS)
    held = open_data("emoji", 64, split="heldout")
    assert len(held) == 115
    assert np.unique([both.source_of(i)[0] for i in range(10)]).tolist() == [0, 1]


def test_source_order_does_not_depend_on_the_file_system(tmp_path):
    for name in ("c/1.png", "a/2.png", "b/0.png", "0.png"):
        _write(tmp_path, {name: _png(1)})
    source = FolderSource(tmp_path)
    names = [source.name(i).removeprefix(str(tmp_path)) for i in range(4)]
    assert names == ["/0.png", "/a/2.png", "/b/0.png", "/c/1.png"]
    assert source.classes == ("", "a", "b", "c") and source.record(0).label == 0
