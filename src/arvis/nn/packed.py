"""Weights as the machine multiplies them: kept in the number format of their calls, in the layout of its matrix unit.

Every call of a plain layer casts its weight and, on a CPU, lays it out anew; with few rows that takes longer than the
product. A packed weight does both once, at its first call, and then forgets the original. It is exact in float32 (the
order of the sums differs), and what autocast would compute in bfloat16; anything but a product still sees a plain
tensor. Not for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from arvis.nn.wide import product_dtype

Layout = Callable[[Tensor], Tensor]

FEW = 4
"""Fewer rows than these are repeated: the kernel reads the weight faster for four rows than for one or two (by a fifth
to a third, on two cores with AVX-512 and torch 2.13)."""


class Store(Protocol):
    """What stands behind a packed weight."""

    @property
    def bytes(self) -> int: ...
    def dense(self) -> Tensor: ...
    def linear(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor: ...


class Forms:
    """One weight in the formats in which it was asked for; the original lives until the first of them."""

    def __init__(self, dense: Tensor) -> None:
        self.original: Tensor | None = dense
        self.forms: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype, lay: Layout) -> Tensor:
        """The weight in `dtype`, laid out. RuntimeError where only a narrower format is left."""
        if dtype not in self.forms:
            with torch.inference_mode(False):  # views of it are taken outside of it, too
                self.forms[dtype] = lay(self._at_least(dtype).to(dtype))
            self.original = None
        return self.forms[dtype]

    def dense(self) -> Tensor:
        """The weight as a plain tensor, in the widest format that is left."""
        if self.original is not None:
            return self.original
        widest = max(self.forms.values(), key=lambda form: torch.finfo(form.dtype).bits)
        with torch.inference_mode(False):
            return widest.to_dense() if widest.is_mkldnn else widest

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        held = [*self.forms.values(), *([] if self.original is None else [self.original])]
        return sum(x.numel() * x.element_size() for x in held)

    def linear(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """x W^T + bias, and its tanh-GELU in the same kernel where there is one."""
        x, bias = cast(x, bias)
        form = self.of(x.dtype, panels)
        if form.is_mkldnn:
            rest = ("gelu", [], "tanh") if gelu else ("none", [], "")
            if 0 < (count := x.shape[:-1].numel()) < FEW:
                rows = torch.cat([x.reshape(count, -1)] * -(-FEW // count))
                out = torch.ops.mkldnn._linear_pointwise(rows, form, bias, *rest)
                return out[:count].unflatten(0, x.shape[:-1])
            return torch.ops.mkldnn._linear_pointwise(x, form, bias, *rest)
        out = F.linear(x, form, bias)
        return F.gelu(out, approximate="tanh") if gelu else out

    def _at_least(self, dtype: torch.dtype) -> Tensor:
        dense = self.dense()
        if torch.finfo(dense.dtype).bits < torch.finfo(dtype).bits:
            raise RuntimeError(
                f"a packed weight was first used in {dense.dtype} and cannot serve {dtype}: load it anew"
            )
        return dense


class Hosted(Forms):
    """A weight that stays in the memory of the host; products on another device take a copy that lives no longer."""

    def linear(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """As `Forms.linear`."""
        x, bias = cast(x, bias)
        out = F.linear(x, self.of(x.dtype, _pinned).to(x.device, non_blocking=True), bias)
        return F.gelu(out, approximate="tanh") if gelu else out


class Packed(Tensor):
    """Stands in for a weight on a device: products take its packed forms, everything else its values."""

    store: Store

    @staticmethod
    def __new__(cls, like: Tensor, store: Store, device: torch.device | None = None) -> Packed:
        out = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device or like.device)
        out.store = store
        return out

    def __init__(self, like: Tensor, store: Store, device: torch.device | None = None) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Packed({tuple(self.shape)}, {type(self.store).__name__}, {self.store.bytes} bytes)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return (PRODUCTS.get(func) or func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return _detach(args[0])
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _dense(x: Any) -> Any:
    return x.store.dense().to(x.device, x.dtype) if isinstance(x, Packed) else x


def cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias in the number format in which a product of x is computed."""
    dtype = product_dtype(x)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """The tanh-GELU of a linear layer; one kernel where its weight is packed, which rounds once instead of twice."""
    weight = layer.weight
    if isinstance(weight, Packed) and _simple(x):
        return weight.store.linear(x, layer.bias, gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Packed) and _simple(input):
        return weight.store.linear(input, bias)
    return F.linear(input, _dense(weight), bias)


def _simple(x: Tensor) -> bool:
    """Rows without gradients."""
    return x.dim() > 1 and not (torch.is_grad_enabled() and x.requires_grad)


def panels(weight: Tensor) -> Tensor:
    """In the panels that the CPU's products read; as it is elsewhere."""
    if weight.device.type != "cpu" or not HAS_PANELS or weight.dtype not in (torch.float32, torch.bfloat16):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    if not isinstance(weight, Packed) or not isinstance(weight.store, Forms) or not _simple(input):
        return F.conv2d(input, _dense(weight), bias, *rest)
    input, bias = cast(input, bias)
    return F.conv2d(input, weight.store.of(input.dtype, _channels_last).to(input.device), bias, *rest)


def _detach(weight: Packed) -> Packed:
    return Packed(weight, weight.store)


def _pinned(weight: Tensor) -> Tensor:
    return weight.pin_memory() if torch.cuda.is_available() else weight


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


HAS_PANELS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    Tensor.detach: _detach,  # `nn.Parameter` calls it; further down it would import half a thousand modules
}


def pack(module: nn.Module, store: Callable[[Tensor], Store] = Forms) -> int:
    """Replace the weights of the linear layers and convolutions of a module; returns how many.

    Linear layers whose inputs divide into groups of 32 take the `store`, everything else `Forms`. Weights that several
    layers share stay as they are.
    """
    return _replace(module, lambda layer, weight: Packed(weight, _store_of(layer, weight, store)))


def offload(module: nn.Module, device: torch.device) -> int:
    """Bring a module to a device, but for the weights that `pack` would replace: these stay on the host and are copied
    for each product. Slow, and takes the memory of the largest of them instead of all."""
    count = _replace(module, lambda layer, weight: Packed(weight, Hosted(weight), device))
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, x in held.items():
                if x is not None and not isinstance(x, Packed):
                    there = x.to(device)
                    there = nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there
                    held[name] = moved.setdefault(id(x), there)
    return count


def _store_of(layer: nn.Module, weight: Tensor, store: Callable[[Tensor], Store]) -> Store:
    return store(weight) if type(layer) is nn.Linear and weight.shape[1] % 32 == 0 else Forms(weight)


def _replace(module: nn.Module, packed: Callable[[nn.Module, Tensor], Packed]) -> int:
    owners: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = [x for x in module.modules() if type(x) in (nn.Linear, nn.Conv2d) and owners.get(id(x.weight)) == 1]
    for layer in layers:
        layer.weight = nn.Parameter(packed(layer, layer.weight.detach()), requires_grad=False)
    return len(layers)
