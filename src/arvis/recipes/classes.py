"""Other classes for a class-conditional model: a table with one row for each class of the new pictures."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from arvis import systems
from arvis.config import dotted, override

FIELD = "num_classes"


def class_field(config: Any) -> str | None:
    """The dotted name of the number of classes in a configuration; None where it has none, or no classes."""
    return dotted(config, FIELD)


def class_count(config: Any) -> int:
    """How many classes a model of a configuration has; 0 without any."""
    field = class_field(config)
    return attrgetter(field)(config) if field else 0


def with_classes(
    slug: str, config: Any, tensors: dict[str, Tensor], known: Sequence[str], wanted: Sequence[str]
) -> tuple[Any, dict[str, Tensor], list[str]]:
    """The configuration and tensors of the same model with the classes `wanted`, and the names of its class tables.

    A class of a name that is `known` keeps its row; the others start from the mean of all. Rows after the classes ("no
    class") stay. The class tables are the tensors that grow with the number of classes in the configuration.
    """
    field, count = class_field(config), class_count(config)
    new = override(config, [f"{field}={len(wanted)}"])
    shapes, grown = (_shapes(slug, override(config, [f"{field}={n}"])) for n in (count, count + 1))
    tables = [name for name, shape in shapes.items() if grown[name] != shape]
    out = dict(tensors)
    for name in tables:
        old = tensors[name]
        mean = old[:count].mean(0)
        rows = [old[known.index(c)] if c in known[:count] else mean for c in wanted]
        out[name] = torch.cat((torch.stack(rows), old[count:]))
    return new, out, tables


def _shapes(slug: str, config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: t.shape for name, t in systems.system(slug).build(config).state_dict().items()}
