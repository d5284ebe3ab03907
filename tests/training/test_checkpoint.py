"""Checkpoints: exact, atomic, checked, and never a pickle."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from arvis.training import checkpoint
from arvis.training.checkpoint import CheckpointError


def _save(run: Path, step: int, value: float = 1.0) -> Path:
    model = {"w": torch.full((4, 3), value), "n": torch.tensor(7), "b": torch.full((5,), value, dtype=torch.bfloat16)}
    optimizer = {"loss/w/step": torch.tensor(3.0)}
    return checkpoint.save(run, step, model=model, optimizer=optimizer, ema={}, state={"x": [step]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = _save(tmp_path, 12, 0.1)
    found = checkpoint.latest(tmp_path)
    assert (
        found is not None and found.path == path and found.step == 12 and found.state["x"] == [12] and found.ema == {}
    )
    assert torch.equal(found.model["w"], torch.full((4, 3), 0.1)) and found.model["b"].dtype == torch.bfloat16
    assert found.model["n"].shape == () and found.optimizer["loss/w/step"] == 3


def test_tied_and_strided_tensors_are_stored(tmp_path: Path) -> None:
    w = torch.arange(6.0).view(2, 3)
    checkpoint.save(tmp_path, 1, model={"a": w, "b": w, "c": w.t(), "d": w[:, 1]}, optimizer={}, ema={}, state={})
    found = checkpoint.latest(tmp_path)
    assert found is not None and torch.equal(found.model["b"], w) and torch.equal(found.model["c"], w.t())
    assert torch.equal(found.model["d"], w[:, 1])


def test_two_are_kept_and_remains_of_a_killed_save_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".partial-00000001").mkdir(parents=True)
    for step in (1, 2, 30):
        _save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000030"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "state", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = _save(tmp_path, 1, 1.0), _save(tmp_path, 2, 2.0)
    file = bad / ("state.json" if damage == "state" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else b"" if damage == "empty" else data[: len(data) // 2])
    with caplog.at_level(logging.WARNING, "arvis"):
        found = checkpoint.latest(tmp_path)
    assert found is not None and found.path == good and torch.equal(found.model["w"], torch.ones(4, 3))
    assert len(caplog.records) == 1 and str(bad) in caplog.text
    _save(tmp_path, 2, 3.0)  # the damaged folder can be written again
    again = checkpoint.latest(tmp_path)
    assert again is not None and again.step == 2


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    (_save(tmp_path, 1) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.latest(tmp_path)


def test_a_full_disk_is_a_clear_error_and_the_previous_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = _save(tmp_path, 1)
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        if file.name.startswith("optimizer"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="disk is full") as error:
        _save(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC and str(good) in str(error.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.name]
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1


def test_a_pickle_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    torch.save({"w": torch.ones(4, 3)}, path / "model.safetensors")
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_weights_of_another_model_are_named() -> None:
    module = nn.Linear(3, 2)
    for tensors, word in (
        ({"weight": torch.ones(2, 3)}, "bias"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"weight has the shape \(2, 4\)"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)}, "scale"),
    ):
        with pytest.raises(CheckpointError, match=word):
            checkpoint.assign(module, tensors, Path("x"))


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    checkpoint.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        checkpoint.write_text(file, "new \ud800")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
