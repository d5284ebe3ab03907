"""The training loop: `fit` moves the weights of a module down a loss, and can be killed at any moment and resumed.

Everything random is a function of (seed, step, row): the batch, the noise, torch's own generator. A checkpoint
therefore holds an integer besides the tensors, and a resumed run ends in the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arvis.config import to_dict
from arvis.noise import Noise
from arvis.training import (
    batches,
    checkpoint,
    compiled,
    distributed,
    ema,
    folder,
    metrics,
    optimizers,
    precision,
    recompute,
    report,
    schedule,
)
from arvis.training.fit_config import FitConfig
from arvis.training.interrupt import Interrupt
from arvis.training.optimizers import Part
from arvis.training.progress import OnStep, Speed, StepInfo, peak_mb

_log = logging.getLogger("arvis")

Loss = Callable[[dict[str, Any], Noise], dict[str, Tensor]]
Sample = Callable[[int, Path], Mapping[str, float] | None]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended: `step` updates of `steps` are done and saved in `checkpoint`; `stopped` says why. `peak_mb` is
    the most memory that this process took, on its device if that is a GPU."""

    run: Path
    step: int
    steps: int
    stopped: Literal["done", "time", "interrupted"]
    metrics: dict[str, float]
    seconds: float
    peak_mb: float
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
    blocks: distributed.Blocks | None = None,
    settings: Mapping[str, Any] | None = None,
    tokens: int = 0,
) -> FitResult:
    """Train `module`, on the device where it lies, and keep the run in the folder `run`.

    `data(step)` is the batch of an update, `config.batch` rows, a pure function of the step; the loop adds the step to
    it, `batch["step"]`, and of how many it is one, `batch["steps"]`. `loss(batch, noise)` returns scalars: "loss" is
    minimised, those named by `config.parts` by their own optimisers, the others are logged. Parameters with
    `requires_grad` False are left alone, and submodules made only of such run in eval mode. `sample(step, folder)` is
    called in eval mode with the averaged weights, to write pictures; scalars that it returns are logged.
    `blocks(module)` are the submodules to compile, to shard one by one, and whose lists of modules activation
    checkpointing runs again. `settings` is plain data for config.json (system, data). `tokens` is how many an item has,
    where the speed is to be told in tokens, too.

    Under torchrun every process calls this with the same arguments; rank 0 writes, samples and calls `on_step`. With
    `shard` all ranks sample, in step, and only rank 0's pictures are kept.

    Raises FileExistsError where `run` holds a training run and `resume` is False, TrainingError for a loss that is
    not finite (the weights before it are saved), CheckpointError for a full disk or unreadable checkpoints.
    """
    return _Run(module, loss, config, Path(run), resume, sample, on_step, blocks, settings or {}, tokens).go(data)


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
        blocks: distributed.Blocks | None,
        settings: Mapping[str, Any],
        tokens: int,
    ) -> None:
        self.module, self.config, self.run, self.tokens = module, config, run, tokens
        self.sample, self.on_step = sample, on_step
        self.device = next(module.parameters()).device
        self.ranks = distributed.init(self.device.type)
        self.sharded = config.shard and self.ranks.world > 1
        self.precision = self.ranks.share(precision.pick(self.device, config.precision))
        _training_mode(module)
        again = config.activation_checkpointing
        self.recompute = recompute.recomputed(blocks(module) if blocks else ()) if again else contextlib.nullcontext()
        if config.compile:
            loss = compiled.compiled(loss, blocks(module) if blocks else (), self.device)
        self.loss = distributed.wrap(module, loss, self.ranks, config.shard, blocks)
        main = Part(
            names=(), loss="loss", lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, clip=config.clip
        )
        self.optimizers = optimizers.build(module, main, config.parts, config.no_decay, config.muon)
        self.average = ema.start(self.optimizers[0].named) if config.ema else {}
        self.window = metrics.Window()
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.step = 0
        self.saved: tuple[int, Path] | None = None
        self.whole = True  # False while an update is half done, when the weights must not be saved
        self.interrupt = Interrupt()
        self.ending: Literal["time", "interrupted"] | None = None  # agreed by all ranks
        self.due = False  # a checkpoint, by the clock; agreed by all ranks
        self.started = self.saved_at = time.monotonic()
        self.earlier = 0.0  # seconds spent before this call
        self._open(resume, settings)

    def _open(self, resume: bool, settings: Mapping[str, Any]) -> None:
        """Make the run folder, or take up the newest checkpoint in it."""
        run = self.run
        if not resume and folder.exists(run):
            raise FileExistsError(f"{run} already holds a training run; resume it (--resume) or choose another folder")
        self.ranks.barrier()
        found = checkpoint.latest(run, self._tensors() if self.sharded else None, self.ranks) if resume else None
        if found is not None:
            self._restore(found)
        if not self.ranks.first:
            return
        if found is None and resume:
            _log.info("%s has no checkpoint yet: starting at step 0", run)
        run.mkdir(parents=True, exist_ok=True)
        metrics.cut(run, self.step)
        count = sum(p.numel() for o in self.optimizers for p in o.named.values())
        about = {"precision": self.precision.reason, "processes": self.ranks.world, "trainable_parameters": count}
        folder.write(run, to_dict(self.config), about, settings)
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
        if self.ranks.first:
            _log.info("resuming %s at step %d", self.run, self.step)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint as this rank keeps them, the optimiser's blank: what to load shards into."""
        blank = {name: value for o in self.optimizers for name, value in o.blank().items()}
        return {"model": self.module.state_dict(), "optimizer": blank, "ema": self.average}

    def go(self, data: batches.Data) -> FitResult:
        """Train until the last step, the end of the time, or an interrupt."""
        config, speed = self.config, Speed()
        devices = [self.device] if self.device.type == "cuda" else []
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        with (
            batches.Ahead(data, config.steps) as ahead,
            torch.random.fork_rng(devices),
            self.recompute,
            self.interrupt,
        ):
            try:
                while self.step < config.steps and self.ending is None:
                    begun = time.perf_counter()
                    self._update(ahead(self.step))
                    speed.add(time.perf_counter() - begun)
                    self._after(speed)
                self._save()
                self.ranks.barrier()  # the checkpoint is there when any rank returns
            except BaseException:
                self._rescue()
                raise
        assert self.saved is not None
        return FitResult(
            run=self.run,
            step=self.step,
            steps=config.steps,
            stopped="done" if self.step >= config.steps else self.ending or "done",
            metrics=self.last,
            seconds=time.monotonic() - self.started,
            peak_mb=peak_mb(self.device),
            checkpoint=self.saved[1],
        )

    def _update(self, batch: batches.Batch) -> None:
        """One update of every optimiser."""
        config, step = self.config, self.step
        rows = batches.size(batch)
        if rows != config.batch:
            raise ValueError(f"data({step}) has {rows} rows, the config says batch={config.batch}")
        torch.manual_seed(batches.seed_of(config.seed, step, -1 - self.ranks.rank))  # for dropout and the like
        scalars = self._backward(batch, self.ranks.rows(rows))
        for optimizer in self.optimizers:
            scalars[optimizer.part.loss.replace("loss", "grad_norm", 1)] = optimizer.clip()
        values = self._agree(scalars)
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
        parts = batches.chunks(rows, self.config.accumulate)
        for part in parts:
            share = len(part) / len(rows)
            noise = Noise(batches.seeds(self.config.seed, self.step, part).to(self.device))
            with distributed.quiet(self.loss, last=part is parts[-1]):
                with self.precision.around():
                    taken = {"step": self.step, "steps": self.config.steps, **batches.take(batch, part, self.device)}
                    losses = self.loss(taken, noise)
                wanted = [self._scalar(losses, optimizer.part.loss) for optimizer in self.optimizers]
                (sum(wanted[1:], wanted[0]) * share).backward()
            for name in losses:
                value = self._scalar(losses, name).detach() * share
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _agree(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """The metrics as floats, means over the ranks, by one transfer; with them, what the clock and signals say."""
        elapsed, limit = time.monotonic() - self.started, self.config.minutes
        due = time.monotonic() - self.saved_at > 60 * self.config.save_minutes > 0
        late = limit is not None and elapsed >= 60 * limit
        clock = torch.tensor([self.interrupt.asked, late, due], dtype=torch.float32, device=self.device)
        mean = self.ranks.mean(torch.cat([torch.stack([value.float() for value in scalars.values()]), clock])).tolist()
        *values, stop, late, due = mean
        self.ending = "interrupted" if stop else "time" if late else None
        self.due = bool(due)
        return dict(zip(scalars, values, strict=True))

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
        self._rescue(together=True)
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
        images = speed.per_second * config.batch
        if step % config.log_every == 0 or step in (1, config.steps):
            means = self.window.mean()
            if not self.best or means["loss"] < self.best["loss"]:
                self.best = {"loss": means["loss"], "step": step}
            extra = {"lr": self.last["lr"], "images_per_second": images}
            if self.tokens:
                extra["tokens_per_second"] = images * self.tokens
            extra["peak_mb"] = peak_mb(self.device)
            if self.ranks.first:
                metrics.append(self.run, {"step": step, **means, **extra, "seconds": self._seconds()})
        if self.due or (config.save_every and step % config.save_every == 0):
            self._save()
        if self.sample is not None and config.sample_every and step % config.sample_every == 0:
            self._sample(self.sample)
        if self.on_step is not None and self.ranks.first:
            left = (config.steps - step) / max(speed.per_second, 1e-9)
            if config.minutes is not None:
                left = min(left, max(60 * config.minutes - (time.monotonic() - self.started), 0.0))
            info = StepInfo(
                step=step,
                steps=config.steps,
                batch=config.batch,
                metrics=self.last,
                images_per_second=images,
                tokens_per_second=images * self.tokens,
                peak_mb=peak_mb(self.device),
                eta_seconds=left,
            )
            self.on_step(info)

    def _sample(self, sample: Sample) -> None:
        if not (self.ranks.first or self.sharded):
            return
        self.module.eval()
        try:
            with contextlib.ExitStack() as stack:
                target = self.run / "samples"
                if not self.ranks.first:
                    target = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stack.enter_context(ema.swapped(self.module, self.average))
                stack.enter_context(distributed.gathered(self.loss))
                stack.enter_context(torch.no_grad())
                values = sample(self.step, target)
                if values and self.ranks.first:
                    metrics.append(self.run, {"step": self.step, **values})
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
            ranks=self.ranks,
            sharded=self.sharded,
        )
        self.saved, self.saved_at = (self.step, path), time.monotonic()
        if self.ranks.first:
            report.write(self.run)

    def _rescue(self, together: bool = False) -> None:
        """Before an error leaves: save what was trained since the last checkpoint, where it is whole and finite.

        Shards can be saved only if all ranks are here `together`.
        """
        if self.sharded and not together:
            return
        finite = all(bool(torch.isfinite(p).all()) for o in self.optimizers for p in o.named.values())
        if self.whole and finite and self.step:
            with contextlib.suppress(checkpoint.CheckpointError):
                self._save()

    def _seconds(self) -> float:
        """Training time of the whole run, earlier calls included."""
        return self.earlier + time.monotonic() - self.started


def _training_mode(module: nn.Module) -> None:
    """Training mode everywhere but in submodules that have parameters and train none of them."""
    module.train()
    for child in module.modules():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
