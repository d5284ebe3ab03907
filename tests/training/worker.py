"""A small run with everything that could forget its place: dropout, noise, averages, two optimisers, buffers.

As a script: `worker.py RUN [--resume]` alone, `worker.py FOLDER` as one of several ranks.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.lora import LoraConfig, adapt
from arvis.noise import Noise
from arvis.training import distributed
from arvis.training.fit import FitConfig, FitResult, fit
from arvis.training.optimizers import Part


class Layers(nn.Module):
    """Layers one after another, in a list as blocks are."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def __getitem__(self, i: int) -> nn.Module:
        return self.blocks[i]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x)
        return x


class Toy(nn.Module):
    """A denoiser and its critic; `dropout` draws from torch's own generator, `seen` is a buffer that moves."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = Layers(nn.Linear(6, 33), nn.GELU(), nn.Dropout(dropout), nn.Linear(33, 6))
        self.scale = nn.Parameter(torch.ones(1))
        self.critic = nn.Linear(6, 1)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        x = batch["image"]
        y = self.layers(x + 0.3 * noise.normal("corrupt", 0, (6,)).float()) * self.scale
        if self.training:
            self.seen += len(batch["prompt"])
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        fooled = torch.func.functional_call(self.critic, frozen, (y,)).mean()
        critic = (1 + self.critic(y.detach())).relu().mean() + (1 - self.critic(x)).relu().mean()
        return {"loss": (y - x).square().mean() - 0.01 * fooled, "loss_critic": critic, "size": y.abs().mean()}


def data(step: int) -> dict[str, Any]:
    """Eight rows that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {"image": torch.randn(8, 6, generator=generator), "prompt": [str(i) for i in range(8)]}


def config(steps: int, shard: bool = False, again: bool = False) -> FitConfig:
    """Settings that use every stateful feature."""
    critic = Part(names=("critic.",), loss="loss_critic", lr=1e-2)
    return FitConfig(
        steps=steps,
        batch=8,
        lr=1e-2,
        warmup=5,
        accumulate=2,
        clip=0.5,
        ema=0.99,
        parts=(critic,),
        precision="float32",
        shard=shard,
        activation_checkpointing=again,
        save_every=7,
        sample_every=2,
        log_every=3,
    )


def toy(dropout: float = 0.1) -> Toy:
    """The untrained module."""
    torch.manual_seed(0)
    return Toy(dropout)


def train(
    run: Path,
    steps: int,
    resume: bool = False,
    shard: bool = False,
    dropout: float = 0.1,
    rank: int = 0,
    again: bool = False,
) -> FitResult:
    """Train the toy, on one thread; with `rank` its layers are frozen and adapters are trained; with `again` they run
    again in the backward pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module = toy(dropout)
        if rank:
            adapt(module, LoraConfig(rank=rank), [module.layers])
            module.critic.requires_grad_(True)

        def sample(step: int, folder: Path) -> None:
            values = module.layers(torch.linspace(-1, 1, 6)) * module.scale
            (folder / f"step-{step:08d}.txt").write_text(" ".join(str(v) for v in values.tolist()))

        blocks = lambda m: [m.layers] if again else [m.layers[0], m.layers[3]]  # noqa: E731
        settings = config(steps, shard, again)
        return fit(module, module.loss, data, settings, run, resume=resume, sample=sample, blocks=blocks)
    finally:
        torch.set_num_threads(threads)


def together(folder: Path) -> None:
    """What every rank of two does: three updates by DDP; by FSDP2, resumed to five; FSDP2 from an unsharded start;
    adapters and activation checkpointing by both."""
    train(folder / "ddp", 3, dropout=0.0)
    train(folder / "fsdp", 3, shard=True, dropout=0.0)
    if distributed.init().first:
        shutil.copytree(folder / "fsdp", folder / "third")
    distributed.init().barrier()
    train(folder / "fsdp", 5, resume=True, shard=True, dropout=0.0)
    train(folder / "ddp", 5, resume=True, shard=True, dropout=0.0)
    for shard in (False, True):
        train(folder / f"lora-{shard}", 3, shard=shard, dropout=0.0, rank=2)
        train(folder / f"again-{shard}", 3, shard=shard, dropout=0.0, again=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        together(Path(sys.argv[1]))
        distributed.close()
    else:
        train(Path(sys.argv[1]), 60, resume="--resume" in sys.argv)
