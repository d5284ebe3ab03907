"""Weights as the machine multiplies them: kept in the number format of their calls, in the layout of its matrix unit.

Every call of a plain layer casts its weight and, on a CPU, lays it out anew; with few rows that takes longer than the
product. A packed weight does both once, at its first call, and then forgets the original. It is exact in float32 (the
order of the sums differs), and what autocast would compute in bfloat16; anything but a product still sees a plain
tensor. Not for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Layout = Callable[[Tensor], Tensor]


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

    def _at_least(self, dtype: torch.dtype) -> Tensor:
        dense = self.dense()
        if torch.finfo(dense.dtype).bits < torch.finfo(dtype).bits:
            raise RuntimeError(
                f"a packed weight was first used in {dense.dtype} and cannot serve {dtype}: load it anew"
            )
        return dense


class Packed(Tensor):
    """Stands in for a weight: products take its packed forms, everything else its values."""

    store: Forms

    @staticmethod
    def __new__(cls, dense: Tensor, store: Forms | None = None) -> Packed:
        out = torch.Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype, device=dense.device)
        out.store = Forms(dense) if store is None else store
        return out

    def __init__(self, dense: Tensor, store: Forms | None = None) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        forms = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.store.forms) or "not used yet"
        return f"Packed({tuple(self.shape)}, {forms})"

    @property
    def packed_bytes(self) -> int:
        """Bytes that the weight takes."""
        kept = [*self.store.forms.values(), *([] if self.store.original is None else [self.store.original])]
        return sum(x.numel() * x.element_size() for x in kept)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return (PRODUCTS.get(func) or func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0], args[0].store)
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _dense(x: Any) -> Any:
    return x.store.dense().to(x.dtype) if isinstance(x, Packed) else x


def _format(x: Tensor) -> torch.dtype:
    """The number format in which a product of x would be computed."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed) or input.dim() < 2 or (torch.is_grad_enabled() and input.requires_grad):
        return F.linear(input, _dense(weight), bias)
    form, input, bias = _operands(input, weight, bias)
    if form.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(input, form, bias, "none", [], "")
    return F.linear(input, form, bias)


def _operands(x: Tensor, weight: Packed, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The packed form, input and bias of a product, in the number format in which it is computed."""
    dtype = _format(x)
    return weight.store.of(dtype, _panels), x.to(dtype), None if bias is None else bias.to(dtype)


def gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """The tanh-GELU of a linear layer; one kernel where its weight is packed, which rounds once instead of twice."""
    weight = layer.weight
    if isinstance(weight, Packed):
        form, x, bias = _operands(x, weight, layer.bias)
        if form.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, form, bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


def _panels(weight: Tensor) -> Tensor:
    """In the panels that the CPU's products read; as it is elsewhere."""
    if weight.device.type != "cpu" or not HAS_PANELS or weight.dtype not in (torch.float32, torch.bfloat16):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    if not isinstance(weight, Packed) or (torch.is_grad_enabled() and input.requires_grad):
        return F.conv2d(input, _dense(weight), bias, *rest)
    dtype = _format(input)
    form = weight.store.of(dtype, _channels_last)
    return F.conv2d(input.to(dtype), form, None if bias is None else bias.to(dtype), *rest)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


HAS_PANELS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
PRODUCTS: dict[Any, Callable[..., Tensor]] = {F.linear: _linear, torch.conv2d: _conv2d, F.conv2d: _conv2d}


def pack(module: nn.Module) -> int:
    """Replace the weights of the linear layers and convolutions of a module; returns how many.

    Weights that several layers share stay as they are.
    """
    owners: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = [x for x in module.modules() if type(x) in (nn.Linear, nn.Conv2d) and owners.get(id(x.weight)) == 1]
    for layer in layers:
        layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    return len(layers)
