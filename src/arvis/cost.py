"""What a generation costs, counted before anything is measured: operations, bytes moved, memory, by phase.

The system is walked on the meta device: every matrix product, convolution and attention that would run is counted as it
is called, so a count can never disagree with the code. From the counts and what a machine can do follows the shortest
time in which it could be done (the roofline of Williams, Waterman and Patterson 2009, operation by operation).
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arvis.noise import Noise


class Work(list[tuple[float, float]]):
    """(operations, bytes) of each counted call of a phase."""

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self)

    def floor(self, machine: Machine) -> float:
        """Seconds below which the machine cannot go: each call waits for its arithmetic or for its memory."""
        return sum(max(flops / machine.flops, moved / machine.bandwidth) for flops, moved in self)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device does in one number format: operations and bytes read from memory per second, as measured."""

    device: str
    dtype: torch.dtype
    flops: float
    bandwidth: float


@dataclass(kw_only=True)
class Cost:
    """The work of one batch by phase ("start", "first step", "later steps", "decode"), and bytes of memory.

    `weights` are all parameters and buffers, `cache` the keys, values and recurrent states at the end, and
    `working` the most that lived at once beside both.
    """

    batch: int
    steps: int
    phases: dict[str, Work] = field(default_factory=dict)
    weights: int = 0
    cache: int = 0
    working: int = 0

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.phases.values())

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.working

    def floor(self, machine: Machine) -> float:
        """Seconds below which the machine cannot go for the whole batch."""
        return sum(work.floor(machine) for work in self.phases.values())


class Counting(TorchDispatchMode):
    """Notes every counted call in `work`, and how many bytes of new tensors live at once.

    Numbers that are no integers take `width` bytes each, whatever format they are counted in.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.work = Work()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = OPERATIONS.get(func.overloadpacket)
        if rule is not None:
            moved = sum(self.bytes(x) for x in (*args, out) if isinstance(x, Tensor))
            self.work.append((rule(*args, out), moved))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and not x.is_sparse:
                self._note(x.untyped_storage(), x)
        return out

    def bytes(self, x: Tensor) -> int:
        return x.numel() * (self.width if x.is_floating_point() else x.element_size())

    def _note(self, storage: torch.UntypedStorage, x: Tensor) -> None:
        key, size = storage._cdata, storage.nbytes() // x.element_size() * (self.bytes(x) // max(x.numel(), 1))
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _linear(x: Tensor, weight: Tensor, *rest: Any) -> float:
    return 2.0 * x.numel() * weight.shape[0]


def _matmul(a: Tensor, b: Tensor, *rest: Any) -> float:
    out: Tensor = rest[-1]
    return 2.0 * out.numel() * a.shape[-1]


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> float:
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> float:
    return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _conv(x: Tensor, weight: Tensor, *rest: Any) -> float:
    out: Tensor = rest[-1]
    return 2.0 * out.numel() * weight[0].numel()


_aten = torch.ops.aten
OPERATIONS: dict[Any, Callable[..., float]] = {
    _aten.linear: _linear,
    _aten.matmul: _matmul,
    _aten.mm: _matmul,
    _aten.bmm: _matmul,
    _aten.addmm: _addmm,
    _aten.scaled_dot_product_attention: _attention,
    _aten.conv1d: _conv,
    _aten.conv2d: _conv,
    _aten.conv3d: _conv,
    _aten.convolution: _conv,
}
"""How many operations a call is; what is not here (norms, activations, sums) is memory traffic that can be fused."""


@torch.inference_mode()
def count(system: Any, sampling: Any, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of generating a batch in a number format with a system that lies on the meta device.

    The condition is the null one (of equal cost); guidance rows are counted as the settings ask for them.
    """
    cost = Cost(batch=batch, steps=0)
    with Counting(dtype.itemsize) as counting:
        cost.weights = sum(counting.bytes(x) for x in (*system.parameters(), *system.buffers()))

        def phase(name: str) -> None:
            counting.work = cost.phases.setdefault(name, Work())

        phase("start")
        s = system.start(None, sampling, Noise.of(0, batch, "meta"))
        while not bool(s.done.all()):
            phase("first step" if cost.steps == 0 else "later steps")
            d = system.predict(s)
            system.commit(s, d, d.sample(s.noise))
            cost.steps += 1
        held = (x for c in s.cache.values() for store in (c.k, c.v, c.extra) for x in store.values())
        cost.cache = sum(map(counting.bytes, held))
        phase("decode")
        system.tokenizer.decode(s.tokens, s.layout)
    cost.working = max(0, counting.most - cost.cache)
    return cost


@torch.inference_mode()
def work(run: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Work:
    """What a call on the meta device comes to in a number format."""
    with Counting(dtype.itemsize) as counting:
        run()
    return counting.work


def measure(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 1.5) -> Machine:
    """What the device does: the best of square matrix products, and of reading memory far larger than its caches."""
    size = 2048 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    flops = 2 * size**3 / _best(lambda: a @ a, device, seconds)
    far = torch.ones(2**12, 2**14, device=device)  # always float32: memory does not know number formats
    row = torch.ones(2**14, device=device)
    bandwidth = far.numel() * far.element_size() / _best(lambda: far @ row, device, seconds)
    return Machine(device=str(device), dtype=dtype, flops=flops, bandwidth=bandwidth)


def _best(run: Callable[[], Any], device: torch.device | str, seconds: float) -> float:
    """The shortest of the runs that fit into a time, but for the first one."""
    best, end, cuda = math.inf, time.perf_counter() + seconds, torch.device(device).type == "cuda"
    run()
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
