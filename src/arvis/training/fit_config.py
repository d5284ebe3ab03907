"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvis.config import from_dict
from arvis.training import folder, precision, schedule
from arvis.training.optimizers import Part


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The settings of a run; plain data, written to its config.json.

    `steps` is the length of the schedule in updates, `batch` the rows of one update on all ranks together,
    `accumulate` in how many parts they pass through the network. `schedule`, `warmup` (updates) and `final` (the last
    factor of the learning rate) are those of `schedule.factor`; weight decay goes to `weight_decay_final` by a cosine,
    and skips 1-d parameters and names holding a fragment of `no_decay`. `clip` and `ema` are off at 0. `minutes` only
    stops this call early (and saves): the schedule stays a function of the step. `parts` are further optimisers.
    Matrices whose names hold a fragment of `muon` are updated by Muon instead of AdamW.
    `shard` splits the parameters over torchrun's processes (FSDP2) instead of copying them (DDP).
    `activation_checkpointing` keeps only the inputs of blocks and runs these again in the backward pass: less memory,
    the same gradients.
    """

    steps: int
    batch: int
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_final: float | None = None
    no_decay: tuple[str, ...] = ()
    muon: tuple[str, ...] = ()
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
    activation_checkpointing: bool = False
    shard: bool = False
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


def load_config(run: Path | str) -> tuple[FitConfig, dict[str, Any]]:
    """The FitConfig of a run folder and the rest of its config.json."""
    resolved = folder.read(run)
    return from_dict(FitConfig, resolved.pop("fit")), resolved
