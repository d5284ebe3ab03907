"""Two processes are one: the same batch, noise and weights; alone, torch.distributed is never touched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arvis
from arvis.training import checkpoint, distributed, metrics
from training import worker


def _two_processes(folder: Path) -> None:
    """Run `worker.together` in two processes, with the environment that torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(arvis.__file__).parents[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(worker.__file__)), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": source},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=180)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint.load(run / "checkpoints" / f"step-{step:08d}")
    flat = {f"{part}/{n}": t for part in ("model", "optimizer", "ema") for n, t in getattr(found, part).items()}
    return {name: tensor.double() for name, tensor in flat.items() if "seen" not in name}


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """DDP and FSDP2 against one process; checkpoints move between whole and sharded, in both directions."""
    _two_processes(tmp_path)
    one = tmp_path / "one"
    worker.train(one, 3, dropout=0.0)
    third = _weights(one, 3)
    assert _distance(third, _weights(tmp_path / "ddp", 3)) < 1e-6
    assert (tmp_path / "fsdp" / "checkpoints" / "step-00000003" / "shards").is_dir()
    assert _distance(third, _weights(tmp_path / "fsdp", 3)) < 1e-6
    worker.train(one, 5, resume=True, dropout=0.0)
    fifth = _weights(one, 5)
    assert _distance(fifth, third) > 1e-3
    for run in ("fsdp", "ddp"):  # resumed from shards, and sharded from a whole checkpoint
        assert _distance(fifth, _weights(tmp_path / run, 5)) < 1e-6
    worker.train(tmp_path / "third", 5, resume=True, dropout=0.0)  # two ranks' shards continued by one process
    assert _distance(fifth, _weights(tmp_path / "third", 5)) < 1e-6
    worker.train(tmp_path / "lora", 3, dropout=0.0, rank=2)
    adapters = _weights(tmp_path / "lora", 3)
    assert any("down" in name for name in adapters)
    for shard in (False, True):
        assert _distance(adapters, _weights(tmp_path / f"lora-{shard}", 3)) < 1e-6
        assert _distance(third, _weights(tmp_path / f"again-{shard}", 3)) < 1e-6
    for run in ("ddp", "fsdp"):
        files = sorted((tmp_path / run / "samples").iterdir())
        assert [file.name for file in files] == ["step-00000002.txt", "step-00000004.txt"]
        for file in files:  # drawn from the averaged weights, gathered
            drawn, expected = ([float(v) for v in (f.read_text().split())] for f in (file, one / "samples" / file.name))
            assert drawn == pytest.approx(expected, abs=1e-6)
        assert [row["step"] for row in metrics.read(tmp_path / run)] == [1, 3, 5]
        for mine, theirs in zip(metrics.read(one), metrics.read(tmp_path / run), strict=True):
            assert all(abs(mine[name] - theirs[name]) < 1e-6 for name in ("loss", "loss_critic", "grad_norm", "size"))


def test_one_process_never_touches_torch_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("init_process_group was called")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert distributed.init() == distributed.Ranks()
        worker.train(tmp_path / str(len(environment)), 2, shard=True)
        assert not torch.distributed.is_initialized()


def test_rows_are_dealt_in_turn() -> None:
    ranks = [distributed.Ranks(rank=r, world=3) for r in range(3)]
    assert [r.rows(6) for r in ranks] == [[0, 3], [1, 4], [2, 5]]
    assert [r.first for r in ranks] == [True, False, False]
    with pytest.raises(ValueError, match="8 rows does not divide among 3"):
        ranks[0].rows(8)


def test_shards_hold_tensors_and_no_pickle(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b/c": torch.tensor(2)}
    with pytest.warns(UserWarning, match="distributed"):
        distributed.save(tmp_path, tensors)
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())
    whole = distributed.read(tmp_path)
    assert whole.keys() == tensors.keys() and all(torch.equal(whole[name], tensors[name]) for name in tensors)
