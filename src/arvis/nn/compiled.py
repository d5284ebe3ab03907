"""A network's call for single rows as one compiled graph: what is left of a step are its products.

A step of one row is some forty small operations per block besides its products, each of which takes longer to call
than to compute; the compiler fuses them. Packed products stay what they are: calls that the graph does not look into.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.cache import Slots
from arvis.nn.packed import Packed, Store, cast
from arvis.nn.trunk import Call


class CompiledStep:
    """`net(x, call)` by a graph where x [B*G, 1, D] is one row that the call's cache keeps, and plainly elsewhere.

    The graph is made at the first such row, which takes half a minute for a large network, and again for other batch
    sizes. A row attends to the rows that are there, whose number is a variable of the graph; with `whole` it attends
    to all slots under a mask, so that every step has one shape and can be replayed (CUDA graphs). Not for training.
    """

    def __init__(self, net: nn.Module, whole: bool) -> None:
        self.net, self.whole = net, whole
        mode = "reduce-overhead" if next(net.parameters()).is_cuda else None
        self.step = torch.compile(_step(traceable(net)), fullgraph=True, mode=mode)

    def __call__(self, x_RD: Tensor, call: Call) -> Tensor:
        row = None if call.cache is None or x_RD.shape[1] > 1 or torch.is_grad_enabled() else call.cache.row()
        if row is None:
            return self.net(x_RD, call)
        k, v, at, end = row
        table = None if call.table is None else call.table.to(x_RD.device)  # a replayed graph reads no host memory
        mask, at, first = call.mask, torch.tensor([at], device=x_RD.device), next(iter(k.values()))
        if self.whole:
            mask = at.new_ones((1, 1, 1, end), dtype=torch.bool) if mask is None else mask.to(at.device)
            mask = F.pad(mask, (0, first.shape[3] - end))
            for store in (*k.values(), *v.values()):
                torch._dynamo.mark_static_address(store)
            return self.step(x_RD, table, mask, k, v, at, at.new_empty(first.shape[3], 0))
        if end == first.shape[3]:  # the last row: a graph for a part of the slots does not hold for all
            return self.net(x_RD, call)
        seen = at.new_empty(end, 0)  # its length alone says something
        torch._dynamo.mark_dynamic(seen, 0)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, 3)
        return self.step(x_RD, table, mask, k, v, at, seen)


def _step(net: nn.Module) -> Callable[..., Tensor]:
    def step(
        x_RD: Tensor,
        table: Tensor | None,
        mask: Tensor | None,
        k: Mapping[int, Tensor],
        v: Mapping[int, Tensor],
        at: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """One row, written to slot `at` [1] of the stores of all layers; it sees as many slots as `seen` is long."""
        return net(x_RD, Call(mask=mask, table=table, cache=Slots(k, v, at, len(seen))))

    return step


def traceable(net: nn.Module) -> nn.Module:
    """A network of the same weights whose packed linear layers are calls that a tracing compiler does not look into."""
    if type(net) is nn.Linear and isinstance(net.weight, Packed):
        return _Opaque(net)
    twin = copy.copy(net)
    twin._modules = {name: part and traceable(part) for name, part in net._modules.items()}
    return twin


class _Opaque(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.store, self.bias, self.features = layer.weight.store, layer.bias, layer.out_features
        self.number = next(_numbers)
        _stores[self.number] = self.store

    def forward(self, x: Tensor) -> Tensor:
        x, bias = cast(x, self.bias)
        return torch.ops.arvis.product(x, bias, self.number, self.features)


_numbers = itertools.count()
_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


def _product(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return _stores[number].linear(x, bias)


def _like(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


_library = torch.library.Library("arvis", "DEF")  # `custom_op` takes twice as long to call
_library.define("product(Tensor x, Tensor? bias, int number, int features) -> Tensor")
_library.impl("product", _product, "CompositeExplicitAutograd")
_library._register_fake("product", _like)
