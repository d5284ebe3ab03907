"""Several processes, one model: ranks started by torchrun, DDP or FSDP2 around the loss, DCP checkpoints.

Without torchrun nothing here touches torch.distributed. With it, rank r of W takes rows r, r+W, .. of the same global
batch, with the noise of those rows, so that the mean gradient is that of one process. DDP (the default) copies the
model to every rank; `shard` splits its parameters, gradients and averages by FSDP2's `fully_shard`, block by block.
Sharded checkpoints are written by torch.distributed.checkpoint as safetensors, and read by any number of processes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run; `device` is the one it should use."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files and log lines."""
        return self.rank == 0

    def rows(self, count: int) -> list[int]:
        """The rows of a global batch of `count` that this rank takes. Raises ValueError where they do not divide."""
        if count % self.world:
            raise ValueError(f"a batch of {count} rows does not divide among {self.world} processes")
        return list(range(self.rank, count, self.world))

    def mean(self, vector: Tensor) -> Tensor:
        """The mean of a float vector over the ranks."""
        if self.world > 1:
            torch.distributed.all_reduce(vector)
            vector /= self.world
        return vector

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world > 1:
            box = [value]
            torch.distributed.broadcast_object_list(box)
            return box[0]
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            torch.distributed.barrier()


ALONE = Ranks()


def init(device: str = "cpu") -> Ranks:
    """The ranks of this run, `device` being cpu or cuda; joins torchrun's processes on the first call.

    Alone (no torchrun, or one process) torch.distributed is left untouched.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    kind = torch.device(device).type
    if world == 1:
        return Ranks(device=torch.device(device))
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if not torch.distributed.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(own)
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(close)
    return Ranks(rank=torch.distributed.get_rank(), world=world, device=own)


def close() -> None:
    """Leave the group of processes, where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Objective(nn.Module):
    """A module and its loss as one module, whose forward is the loss: the form that DDP and FSDP2 wrap."""

    def __init__(self, module: nn.Module, loss: Callable[[Any, Any], dict[str, Tensor]]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        return self.loss(batch, noise)


Wrapped = Callable[[Any, Any], dict[str, Tensor]]


def wrap(module: nn.Module, loss: Wrapped, ranks: Ranks, shard: bool, blocks: Blocks | None) -> Wrapped:
    """The loss whose backward pass leaves the mean gradient of all ranks: `loss` itself for a single process.

    With `shard` the parameters of `module` become sharded in place, one group for each of `blocks(module)` and one for
    the rest; build the optimiser afterwards.
    """
    if ranks.world == 1:
        return loss
    objective = Objective(module, loss)
    if not shard:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        # parts may have no say in a loss: an upsampler of a scale that is not there, a critic before its start
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return nn.parallel.DistributedDataParallel(objective, device_ids=ids, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks(module) if blocks is not None else ():
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def quiet(wrapped: Wrapped, last: bool) -> contextlib.AbstractContextManager[object]:
    """The context of one of several accumulated parts: DDP exchanges gradients only in the last."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def gathered(wrapped: Wrapped) -> Iterator[None]:
    """Within the block a sharded module can be used outside its loss, by all ranks in step."""
    if not isinstance(wrapped, Objective):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    groups = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


def place(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is kept: this rank's shard of it, or a copy on its device."""
    if type(like.data) is Tensor:
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; itself where it has none."""
    return tensor if type(tensor.data) is Tensor else tensor.full_tensor()  # type: ignore[attr-defined]


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards of all ranks into `folder`, as safetensors that know their offsets. Called by every rank."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_shards

    save_shards(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load(folder: Path, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill the tensors, sharded or whole, that the shards in `folder` know, and return these. Called by every rank."""
    found = {name: into[name] for name in _sizes(folder) if name in into}
    _load(folder, found, alone=not (torch.distributed.is_available() and torch.distributed.is_initialized()))
    return found


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of the shards in `folder`, whole, on the CPU, whatever number of ranks wrote them."""
    whole = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _sizes(folder).items()}
    _load(folder, whole, alone=True)
    return whole


def names(folder: Path) -> list[str]:
    """The names of all tensors in the shards in `folder`."""
    return list(_sizes(folder))


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {n: (a.size, a.properties.dtype) for n, a in found.items() if isinstance(a, TensorStorageMetadata)}


def _load(folder: Path, into: dict[str, Tensor], alone: bool) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_shards

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what `alone` means
        load_shards(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
