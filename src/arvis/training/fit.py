"""The training loop: `fit` moves the weights of a module down a loss, and can be killed at any moment and resumed.

Everything random is a function of (seed, step, row): the batch, the noise, torch's own generator. A checkpoint
therefore holds an integer besides the tensors, and a resumed run ends in the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arvis.config import from_dict, to_dict
from arvis.noise import Noise
from arvis.training import batches, checkpoint, ema, metrics, optimizers, precision, schedule
from arvis.training.optimizers import Part
from arvis.training.progress import OnStep, Speed, StepInfo

_log = logging.getLogger("arvis")

Loss = Callable[[dict[str, Any], Noise], dict[str, Tensor]]
Sample = Callable[[int, Path], None]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The settings of a run; plain data, written to its config.json.

    `steps` is the length of the schedule in updates, `batch` the rows of one update on all ranks together,
    `accumulate` in how many parts they pass through the network. `schedule`, `warmup` (updates) and `final` (the last
    factor of the learning rate) are those of `schedule.factor`; weight decay goes to `weight_decay_final` by a cosine,
    and skips 1-d parameters and names holding a fragment of `no_decay`. `clip` and `ema` are off at 0. `minutes` only
    stops this call early (and saves): the schedule stays a function of the step. `parts` are further optimisers.
    """

    steps: int
    batch: int
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_final: float | None = None
    no_decay: tuple[str, ...] = ()
    warmup: int = 0
    schedule: schedule.Schedule = "lin0"
    final: float = 0.01
    clip: float = 2.0
    accumulate: int = 1
    ema: float = 0.0
    parts: tuple[Part, ...] = ()
    seed: int = 0
    precision: precision.Choice = "auto"
    compile: bool = False
    save_every: int = 0
    save_minutes: float = 10.0
    sample_every: int = 0
    log_every: int = 20
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "save_every", "sample_every", "save_minutes", "weight_decay", "clip", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}; 0 keeps no average")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended: `step` updates are done and saved in `checkpoint`; `stopped` says why this call returned."""

    run: Path
    step: int
    stopped: Literal["done", "time", "interrupted"]
    metrics: dict[str, float]
    seconds: float
    checkpoint: Path


class TrainingError(ValueError):
    """Training cannot go on: the loss or a gradient is not finite."""


def fit(
    module: nn.Module,
    loss: Loss,
    data: batches.Data,
    config: FitConfig,
    run: Path | str,
    *,
    resume: bool = False,
    sample: Sample | None = None,
    on_step: OnStep | None = None,
    settings: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `module`, on the device where it lies, and keep the run in the folder `run`.

    `data(step)` is the batch of an update, `config.batch` rows, a pure function of the step. `loss(batch, noise)`
    returns scalars; "loss" is minimised, those named by `config.parts` by their own optimisers, the others are logged.
    Parameters with `requires_grad` False are left alone, and submodules made only of such run in eval mode.
    `sample(step, folder)` is called in eval mode with the averaged weights, to write pictures. `settings` is plain
    data for config.json (the settings of the system and the data).

    Raises FileExistsError where `run` holds a training run and `resume` is False, TrainingError for a loss that is
    not finite (the weights before it are saved), CheckpointError for a full disk or unreadable checkpoints.
    """
    return _Run(module, loss, config, Path(run), resume, sample, on_step, settings or {}).go(data)


class _Run:
    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        config: FitConfig,
        run: Path,
        resume: bool,
        sample: Sample | None,
        on_step: OnStep | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.module, self.loss, self.config, self.run = module, loss, config, run
        self.sample, self.on_step = sample, on_step
        self.device = next(module.parameters()).device
        self.precision = precision.pick(self.device, config.precision)
        main = Part(
            names=(), loss="loss", lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, clip=config.clip
        )
        self.optimizers = optimizers.build(module, main, config.parts, config.no_decay)
        self.average = ema.start(self.optimizers[0].named) if config.ema else {}
        self.window = metrics.Window()
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.step = 0
        self.saved: tuple[int, Path] | None = None
        self.whole = True  # False while an update is half done, when the weights must not be saved
        self.stop = False
        self.started = self.saved_at = time.monotonic()
        self.earlier = 0.0  # seconds spent before this call
        _training_mode(module)
        self._open(resume, settings)

    def _open(self, resume: bool, settings: Mapping[str, Any]) -> None:
        """Make the run folder, or take up the newest checkpoint in it."""
        run, name = self.run, "config.json"
        if not resume and (run / name).exists():
            raise FileExistsError(f"{run} already holds a training run; resume it (--resume) or choose another folder")
        (run / "samples").mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(run) if resume else None
        if found is not None:
            self._restore(found)
        elif resume:
            _log.info("%s has no checkpoint yet: starting at step 0", run)
        metrics.cut(run, self.step)
        if resume and (run / name).exists():
            _tell_changes(json.loads((run / name).read_text()).get("fit", {}), to_dict(self.config))
        about = {"format": 1, "command": sys.argv, "versions": _versions(), "precision": self.precision.reason}
        count = sum(p.numel() for o in self.optimizers for p in o.named.values())
        resolved = {**about, "trainable_parameters": count, "fit": to_dict(self.config), **settings}
        checkpoint.write_text(run / name, json.dumps(resolved, indent=1))
        _log.info("training %d parameters in %s", count, self.precision.reason)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        checkpoint.assign(self.module, found.model, found.path)
        for optimizer in self.optimizers:
            optimizer.restore(found.optimizer)
        for name, value in self.average.items():
            if name in found.ema:
                value.copy_(found.ema[name])
        self.step, self.saved = found.step, (found.step, found.path)
        self.window = metrics.Window(**found.state["window"])
        self.best, self.last, self.earlier = (found.state[name] for name in ("best", "last", "seconds"))
        _log.info("resuming %s at step %d", self.run, self.step)

    def go(self, data: batches.Data) -> FitResult:
        """Train until the last step, the end of the time, or an interrupt."""
        config, speed = self.config, Speed()
        devices = [self.device] if self.device.type == "cuda" else []
        with batches.Ahead(data, config.steps) as ahead, torch.random.fork_rng(devices), self._interruptible():
            try:
                while self.step < config.steps and not self.stop and not self._out_of_time():
                    begun = time.perf_counter()
                    self._update(ahead(self.step))
                    speed.add(time.perf_counter() - begun)
                    self._after(speed)
                self._save()
            except BaseException:
                self._rescue()
                raise
        stopped = "done" if self.step >= config.steps else "interrupted" if self.stop else "time"
        assert self.saved is not None
        return FitResult(
            run=self.run,
            step=self.step,
            stopped=stopped,
            metrics=self.last,
            seconds=time.monotonic() - self.started,
            checkpoint=self.saved[1],
        )

    def _update(self, batch: batches.Batch) -> None:
        """One update of every optimiser."""
        config, step = self.config, self.step
        rows = batches.size(batch)
        if rows != config.batch:
            raise ValueError(f"data({step}) has {rows} rows, the config says batch={config.batch}")
        torch.manual_seed(batches.seed_of(config.seed, step, -1))  # for dropout and the like
        values = self._backward(batch, list(range(rows)))
        norms = {o.part.loss.replace("loss", "grad_norm", 1): o.clip() for o in self.optimizers}
        values = _floats({**values, **norms})
        factor = schedule.factor(config.schedule, step, config.steps, config.warmup, config.final)
        self._check(values, config.lr * factor)
        self.whole = False
        for optimizer in self.optimizers:
            first = optimizer.part.weight_decay
            last = config.weight_decay_final if optimizer.part.loss == "loss" else None
            optimizer.step(factor, schedule.decay(step, config.steps, first, last))
        if self.average:
            ema.update(self.average, self.optimizers[0].named, ema.warmed(config.ema, step))
        self.step += 1
        self.window.add(values)
        self.last = {**values, "lr": config.lr * factor}
        self.whole = True

    def _backward(self, batch: batches.Batch, rows: list[int]) -> dict[str, Tensor]:
        """Gradients of the sum of all optimised losses, in `accumulate` parts; returns the mean of every scalar."""
        totals: dict[str, Tensor] = {}
        for part in batches.chunks(rows, self.config.accumulate):
            share = len(part) / len(rows)
            noise = Noise(batches.seeds(self.config.seed, self.step, part).to(self.device))
            with self.precision.around():
                losses = self.loss(batches.take(batch, part, self.device), noise)
            wanted = [self._scalar(losses, optimizer.part.loss) for optimizer in self.optimizers]
            (sum(wanted[1:], wanted[0]) * share).backward()
            for name in losses:
                value = self._scalar(losses, name).detach() * share
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _scalar(self, losses: dict[str, Tensor], name: str) -> Tensor:
        if name not in losses:
            raise KeyError(f"the loss function returned {sorted(losses)}, but {name!r} is to be minimised")
        if losses[name].numel() != 1:
            raise ValueError(f"a loss function returns scalars, {name!r} has the shape {tuple(losses[name].shape)}")
        return losses[name].float().reshape(())

    def _check(self, values: dict[str, float], lr: float) -> None:
        watched = {name: value for name, value in values.items() if name.startswith(("loss", "grad_norm"))}
        bad = [name for name, value in watched.items() if not math.isfinite(value)]
        if not bad:
            return
        self._rescue()
        finite = f"the last finite loss was {self.last['loss']:.6g}" if self.last else "no loss was finite yet"
        good = f"the last good checkpoint is {self.saved[1]}" if self.saved else "there is no good checkpoint"
        shown = ", ".join(f"{name} = {values[name]}" for name in bad)
        raise TrainingError(
            f"{shown} at step {self.step} with lr {lr:.3g}; {finite}; {good}. "
            "Nothing was updated by this step: resume with a lower lr or clip, or in float32"
        )

    def _after(self, speed: Speed) -> None:
        """What follows an update: metrics, checkpoint, samples, the listener."""
        config, step = self.config, self.step
        per_second = speed.per_second
        if step % config.log_every == 0 or step in (1, config.steps):
            means = self.window.mean()
            if not self.best or means["loss"] < self.best["loss"]:
                self.best = {"loss": means["loss"], "step": step}
            extra = {"lr": self.last["lr"], "images_per_second": per_second * config.batch}
            metrics.append(self.run, {"step": step, **means, **extra, "seconds": self._seconds()})
        due = time.monotonic() - self.saved_at > 60 * config.save_minutes > 0
        if due or (config.save_every and step % config.save_every == 0):
            self._save()
        if self.sample is not None and config.sample_every and step % config.sample_every == 0:
            self._sample()
        if self.on_step is not None:
            left = (config.steps - step) / max(per_second, 1e-9)
            if config.minutes is not None:
                left = min(left, max(60 * config.minutes - (time.monotonic() - self.started), 0.0))
            info = StepInfo(
                step=step,
                steps=config.steps,
                batch=config.batch,
                metrics=self.last,
                images_per_second=per_second * config.batch,
                eta_seconds=left,
            )
            self.on_step(info)

    def _sample(self) -> None:
        assert self.sample is not None
        self.module.eval()
        try:
            with ema.swapped(self.module, self.average), torch.no_grad():
                self.sample(self.step, self.run / "samples")
        finally:
            _training_mode(self.module)

    def _save(self) -> None:
        if self.saved is not None and self.saved[0] == self.step:
            return
        state = {
            "fit": to_dict(self.config),
            "seed": self.config.seed,
            "best": self.best,
            "last": self.last,
            "seconds": self._seconds(),
            "window": {"sums": self.window.sums, "count": self.window.count},
        }
        path = checkpoint.save(
            self.run,
            self.step,
            model=self.module.state_dict(),
            optimizer={name: value for o in self.optimizers for name, value in o.state().items()},
            ema=self.average,
            state=state,
        )
        self.saved, self.saved_at = (self.step, path), time.monotonic()

    def _rescue(self) -> None:
        """Before an error leaves: save what was trained since the last checkpoint, where it is whole and finite."""
        finite = all(bool(torch.isfinite(p).all()) for o in self.optimizers for p in o.named.values())
        if self.whole and finite and self.step:
            with contextlib.suppress(checkpoint.CheckpointError):
                self._save()

    def _seconds(self) -> float:
        """Training time of the whole run, earlier calls included."""
        return self.earlier + time.monotonic() - self.started

    def _out_of_time(self) -> bool:
        return self.config.minutes is not None and time.monotonic() - self.started >= 60 * self.config.minutes

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current update; a second one at once. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def handle(number: int, frame: object) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            _log.warning("stopping after this step")

        for number in numbers:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def load_config(run: Path | str) -> tuple[FitConfig, dict[str, Any]]:
    """The FitConfig of a run folder and the rest of its config.json."""
    file = Path(run) / "config.json"
    try:
        resolved = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.json") from None
    return from_dict(FitConfig, resolved.pop("fit")), resolved


def _training_mode(module: nn.Module) -> None:
    """Training mode everywhere but in submodules that have parameters and train none of them."""
    module.train()
    for child in module.modules():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    """All scalars in one transfer from the device."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def _versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    try:
        own = importlib.metadata.version("arvis")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {"arvis": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _tell_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [f"{name}: {old[name]!r} -> {new[name]!r}" for name in new if name in old and old[name] != new[name]]
    if changed:
        _log.warning("resuming with changed settings: %s", ", ".join(changed))
