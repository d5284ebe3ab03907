"""The loop: a run killed at any moment ends in the same bits, errors lose nothing, every knob does what it says."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import arvis
from arvis.config import from_dict, to_dict
from arvis.noise import Noise
from arvis.training import batches, checkpoint, compiled, metrics, optimizers
from arvis.training.checkpoint import CheckpointError
from arvis.training.fit import FitConfig, FitResult, TrainingError, fit
from arvis.training.fit_config import load_config
from arvis.training.progress import StepInfo
from training import worker


def _lines(run: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "images_per_second", "peak_mb")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics.read(run)]


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def _kill_and_resume(folder: Path, lines: list[int]) -> None:
    """Kill a run with SIGKILL whenever its metrics file has so many lines; resume it; compare with one left alone."""
    whole, run = worker.train(folder / "whole", 60), folder / "killed"
    command = [sys.executable, str(Path(worker.__file__)), str(run), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(arvis.__file__).parents[1])}
    for count in lines:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < count:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert "step-00000060" not in [path.name for path in checkpoint.paths(run)]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')  # the torn line of a kill within a write
    again = worker.train(run, 60, resume=True)
    assert whole.step == again.step == 60
    assert _files(whole.checkpoint) == _files(again.checkpoint) and len(_files(again.checkpoint)) == 3
    assert _lines(whole.run) == _lines(again.run) and len(_lines(run)) == 21


def test_killed_and_resumed_is_bit_equal_to_uninterrupted(tmp_path: Path) -> None:
    """After SIGKILL in the middle, weights, optimiser, average and metrics end in the same bits."""
    _kill_and_resume(tmp_path, [8])


@pytest.mark.slow
def test_killed_many_times_is_bit_equal_to_uninterrupted(tmp_path: Path) -> None:
    """Before the first checkpoint, twice near the same place, and late."""
    _kill_and_resume(tmp_path, [1, 4, 4, 9, 13, 19])


def test_a_corrupt_newest_checkpoint_costs_steps_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = worker.train(tmp_path / "whole", 20)
    first = worker.train(tmp_path / "cut", 14)
    (first.checkpoint / "optimizer.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, "arvis"):
        again = worker.train(tmp_path / "cut", 20, resume=True)
    assert sum("damaged" in r.message for r in caplog.records) == 1
    assert "steps: 14 -> 20" in caplog.text
    names = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert _files(again.checkpoint).keys() == _files(whole.checkpoint).keys() == names


def _linear(loss: Any = None, **changes: Any) -> tuple[nn.Linear, Any, FitConfig]:
    torch.manual_seed(0)
    module = nn.Linear(6, 6)

    def mean_square(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return {"loss": (module(batch["image"]) - batch["image"].flip(1)).square().mean()}

    values = {"steps": 10, "batch": 8, "lr": 0.05, "precision": "float32", "clip": 0.0, "weight_decay": 0.0, **changes}
    return module, loss or mean_square, FitConfig(**values)


def test_it_learns(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=150, schedule="constant")
    fit(module, loss, worker.data, config, tmp_path)
    rows = metrics.read(tmp_path)
    assert rows[-1]["loss"] < 0.01 * rows[0]["loss"]
    torch.testing.assert_close(module.weight.detach(), torch.eye(6).flip(1), atol=0.1, rtol=0)


def test_accumulated_parts_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for parts in (1, 3):
        module, loss, config = _linear(accumulate=parts, steps=3)
        fit(module, loss, worker.data, config, tmp_path / str(parts))
        weights.append(module.weight.detach().double())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    module, loss, config = _linear(accumulate=9)
    with pytest.raises(ValueError, match="accumulate"):
        fit(module, loss, worker.data, config, tmp_path / "x")


def test_noise_is_of_the_seed_the_step_and_the_row(tmp_path: Path) -> None:
    drawn: list[list[float]] = []

    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        drawn.append(noise.uniform("x", 0, ()).tolist())
        return {"loss": module(batch["image"]).mean()}

    for accumulate, seed in ((1, 0), (2, 0), (1, 1)):
        module, _, config = _linear(accumulate=accumulate, seed=seed, steps=2)
        fit(module, loss, worker.data, config, tmp_path / f"{accumulate}{seed}")
    assert drawn[0] == drawn[2] + drawn[3] and drawn[1] == drawn[4] + drawn[5]
    assert len({*drawn[0], *drawn[1], *drawn[6], *drawn[7]}) == 32


def test_clipping_and_the_learning_rate_are_applied(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=1, clip=1e-3, warmup=2, lr=1.0)
    before = module.weight.detach().clone()
    fit(module, loss, worker.data, config, tmp_path)
    row = metrics.read(tmp_path)[0]
    assert row["lr"] == pytest.approx(0.005) and row["grad_norm"] > 0.1
    state = checkpoint.load(checkpoint.paths(tmp_path)[-1]).optimizer
    norm = sum(state[f"loss/{n}/exp_avg"].square().sum() for n in ("weight", "bias")).sqrt() / 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert float((module.weight.detach() - before).abs().max()) == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    module, _, config = _linear(save_every=4)
    kept: list[Tensor] = []

    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        kept.append(module.weight.detach().clone())
        value = module(batch["image"]).square().mean()
        if len(kept) == 7:
            value = value * float("nan") if where == "loss" else value + (module.weight.sum() * 0).sqrt()
        return {"loss": value}

    with pytest.raises(TrainingError, match="at step 6 with lr") as error:
        fit(module, loss, worker.data, config, tmp_path)
    assert "last finite loss was" in str(error.value) and "step-00000006" in str(error.value)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 6 and torch.equal(found.model["weight"], kept[6])
    assert torch.isfinite(module.weight).all()


def test_an_error_of_the_data_saves_what_was_trained(tmp_path: Path) -> None:
    module, loss, config = _linear()

    def data(step: int) -> dict[str, Any]:
        if step == 5:
            raise OSError("picture 5 is gone")
        return worker.data(step)

    with pytest.raises(OSError, match="picture 5"):
        fit(module, loss, data, config, tmp_path)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5


def test_a_full_disk_stops_with_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, loss, config = _linear(save_every=3)

    def full(*arguments: object, **named: object) -> None:
        if len(checkpoint.paths(tmp_path)) == 1:
            raise OSError(28, "No space left on device")
        real(*arguments, **named)  # type: ignore[arg-type]

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        fit(module, loss, worker.data, config, tmp_path)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 3


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=2)
    first = fit(module, loss, worker.data, config, tmp_path)
    before = _files(first.checkpoint)
    with pytest.raises(FileExistsError, match="--resume"):
        fit(module, loss, worker.data, config, tmp_path)
    assert _files(first.checkpoint) == before
    again = fit(module, loss, worker.data, config, tmp_path, resume=True)  # nothing left to do
    assert again.step == 2 and again.stopped == "done"


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=2)
    fit(module, loss, worker.data, config, tmp_path)
    with pytest.raises(CheckpointError, match="weight has the shape"):
        fit(nn.Linear(6, 5), loss, worker.data, config, tmp_path, resume=True)


def test_a_time_budget_stops_and_saves_without_bending_the_schedule(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=100_000, minutes=0.3 / 60, log_every=1, warmup=100_000)
    result = fit(module, loss, worker.data, config, tmp_path)
    assert result.stopped == "time" and 1 <= result.step < 100_000 and result.seconds < 5
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == result.step
    row = metrics.read(tmp_path)[-1]
    assert row["lr"] == pytest.approx(0.05 * (0.005 + 0.995 * (row["step"] - 1) / 100_000))


def test_ctrl_c_finishes_the_step_saves_and_returns(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=100_000)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(info: StepInfo) -> None:
        if info.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(module, loss, worker.data, config, tmp_path, on_step=interrupt)
    assert result.stopped == "interrupted" and result.step == 6
    assert signal.getsignal(signal.SIGINT) is before
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 6


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=3)
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(fit(module, loss, worker.data, config, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].step == 3


def test_samples_see_the_average_in_eval_mode_and_leave_no_trace(tmp_path: Path) -> None:
    weights = []
    for every in (0, 2):
        module, _, config = _linear(ema=0.9, sample_every=every, save_every=2, steps=4)
        seen: list[Tensor] = []

        def sample(step: int, folder: Path, module: nn.Linear = module, seen: list[Tensor] = seen) -> None:
            torch.rand(3)
            assert not module.training and not torch.is_grad_enabled()
            seen.append(module.weight.detach().clone())
            (folder / f"step-{step:08d}.png").write_bytes(b"x")

        def loss(batch: dict[str, Any], noise: Noise, module: nn.Linear = module) -> dict[str, Tensor]:
            assert module.training
            return {"loss": module(nn.functional.dropout(batch["image"], 0.3)).square().mean()}

        fit(module, loss, worker.data, config, tmp_path / str(every), sample=sample)
        weights.append(module.weight.detach())
    assert torch.equal(weights[0], weights[1])
    averages = [checkpoint.load(path).ema["weight"] for path in checkpoint.paths(tmp_path / "2")]
    assert all(torch.equal(a, b) for a, b in zip(seen, averages, strict=True)) and not torch.equal(seen[1], weights[1])
    assert len(list((tmp_path / "2" / "samples").iterdir())) == 2


def test_frozen_parts_stay_still_and_in_eval_mode(tmp_path: Path) -> None:
    module = nn.ModuleDict({"frozen": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "free": nn.Linear(6, 6)})
    module["frozen"].requires_grad_(False)
    before = {name: value.clone() for name, value in module["frozen"].state_dict().items()}

    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        assert module["free"].training and not module["frozen"][1].training
        return {"loss": module["free"](module["frozen"](batch["image"])).square().mean()}

    result = fit(module, loss, worker.data, _linear(ema=0.9)[2], tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in module["frozen"].state_dict().items())
    found = checkpoint.load(result.checkpoint)
    assert set(found.ema) == {"free.weight", "free.bias"}


def test_two_optimisers_follow_their_own_losses(tmp_path: Path) -> None:
    """The critic's update does not depend on the generator's loss, nor the other way round."""
    alone = worker.toy(0.0)
    joint = worker.toy(0.0)
    config = replace(worker.config(1), accumulate=1)

    def only_main(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return {"loss": alone.loss(batch, noise)["loss"]}

    alone.critic.requires_grad_(False)
    fit(alone, only_main, worker.data, replace(config, parts=()), tmp_path / "a")
    fit(joint, joint.loss, worker.data, config, tmp_path / "b")
    torch.testing.assert_close(alone.layers[0].weight.detach(), joint.layers[0].weight.detach())
    assert not torch.equal(alone.critic.weight, joint.critic.weight)
    row = metrics.read(tmp_path / "b")[0]
    assert {"loss", "loss_critic", "grad_norm", "grad_norm_critic", "size"} <= row.keys()


def test_the_run_folder_says_what_ran(tmp_path: Path) -> None:
    module, loss, config = _linear(steps=4, log_every=2)
    heard: list[StepInfo] = []
    settings = {"system": {"name": "linear", "width": 6}}
    result = fit(module, loss, worker.data, config, tmp_path, on_step=heard.append, settings=settings)
    read, rest = load_config(tmp_path)
    assert read == config == from_dict(FitConfig, json.loads(json.dumps(to_dict(config))))
    assert (
        rest["system"]["width"] == 6 and rest["versions"]["torch"] == torch.__version__ and rest["command"] == sys.argv
    )
    assert rest["trainable_parameters"] == 42 and "float32" in rest["precision"]
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 4]
    assert [info.step for info in heard] == [1, 2, 3, 4] and heard[-1].eta_seconds == 0
    assert heard[-1].images_per_second > 0 and "images/s" in heard[-1].line
    assert "tokens" not in heard[-1].line and "tokens_per_second" not in metrics.read(tmp_path)[0]
    assert result.metrics["loss"] == heard[-1].metrics["loss"]
    assert (tmp_path / "report.html").exists()
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load_config(tmp_path / "nowhere")


def test_speed_and_memory_are_told(tmp_path: Path) -> None:
    """Tokens where an item has some; a peak that holds what was allocated on the way and never falls."""
    module, plain, config = _linear(steps=6, log_every=1)
    heard: list[StepInfo] = []

    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        if batch["step"] == 3:
            torch.ones(1024, 1024, 300).sum()  # 1.26 GB for a moment
        return plain(batch, noise)

    result = fit(module, loss, worker.data, config, tmp_path, on_step=heard.append, tokens=9)
    rows = metrics.read(tmp_path)
    assert all(row["tokens_per_second"] == pytest.approx(9 * row["images_per_second"]) for row in rows)
    assert "tokens/s" in heard[-1].line and f"{heard[-1].peak_mb:.0f} MB" in heard[-1].line
    peaks = [row["peak_mb"] for row in rows]
    assert peaks == sorted(peaks) and peaks[-1] > 1258 and result.peak_mb >= peaks[-1]
    page = (tmp_path / "report.html").read_text()
    assert "peak memory" in page and "tokens per second" in page and "<figcaption>peak_mb" not in page


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_adamw_is_one_kernel(device: str) -> None:
    called: list[str] = []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).to(device)
    (optimizer,) = optimizers.build(net, optimizers.Part(names=(), loss="loss"), (), ())
    net(torch.ones(1, 3, device=device)).sum().backward()
    with Listens():
        optimizer.step(1.0, 0.1)
    steps = [name for name in called if "adamw" in name]
    assert steps and all("_fused_adamw_" in name for name in steps) and len(steps) == 2, "decayed and not: two groups"


@pytest.mark.parametrize(
    ("returned", "error", "word"),
    [
        ({"los": torch.ones(())}, KeyError, "'loss' is to be minimised"),
        ({"loss": torch.ones(2, requires_grad=True)}, ValueError, r"shape \(2,\)"),
    ],
)
def test_a_wrong_loss_function_is_explained(
    tmp_path: Path, returned: dict[str, Tensor], error: type[Exception], word: str
) -> None:
    module, loss, config = _linear(lambda batch, noise: returned)
    with pytest.raises(error, match=word):
        fit(module, loss, worker.data, config, tmp_path)


def test_a_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    module, loss, config = _linear(batch=4)
    with pytest.raises(ValueError, match=r"8 rows.*batch=4"):
        fit(module, loss, worker.data, config, tmp_path)
    with pytest.raises(ValueError, match="lengths"):
        batches.size({"image": torch.ones(3, 2), "prompt": ["a"]})


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"ema": 1.0}, {"warmup": -1}])
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FitConfig(**{"steps": 1, "batch": 1, **bad})


def test_batches_are_made_ahead_and_in_order() -> None:
    asked: list[int] = []

    def data(step: int) -> dict[str, Any]:
        asked.append(step)
        return {"image": torch.full((1,), step)}

    with batches.Ahead(data, 4) as ahead:
        assert [int(ahead(step)["image"]) for step in range(4)] == [0, 1, 2, 3]
    assert asked == [0, 1, 2, 3]


def test_without_a_compiler_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    module, loss, config = _linear(compile=True, steps=2)
    with caplog.at_level(logging.WARNING, "arvis"):
        assert fit(module, loss, worker.data, config, tmp_path).step == 2
    assert [r.message for r in caplog.records if "torch.compile is off" in r.message]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_training_gives_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for compile_ in (False, True):
        module = worker.toy(0.0)
        config = replace(worker.config(4), compile=compile_)
        fit(module, module.loss, worker.data, config, tmp_path / str(compile_), blocks=lambda m: [m.layers])
        weights.append(module.layers[0].weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)
