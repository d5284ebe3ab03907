"""Autoregressive visual generation: every published system on the same few parts.

    model = arvis.load("brush")
    model.generate("red apple", n=4)

Names are imported when they are first used, so `import arvis` alone stays light.

Shape letters: B batch, G guidance rows, N positions, S sub-tokens of a position, V codes, n positions of one group,
K groups, R network rows, D width, H heads, h head width, C channels, Y rows and X columns of pixels, L layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arvis.model import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "list_systems", "load"]

_HOMES = {"Model": "arvis.model", "load": "arvis.model"}


def list_systems() -> dict[str, str]:
    """The registered systems: name -> what it is, in one line."""
    registry = import_module("arvis.systems").SYSTEMS
    return {name: row.title for name, row in registry.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arvis' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
