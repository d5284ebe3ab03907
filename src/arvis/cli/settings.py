"""`--set key=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import UseAppendAction, arg

Set = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE"), UseAppendAction]
"""Further settings; `--set a=1 b=2` is the same as `--set a=1 --set b=2`."""


def each_set(args: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`."""
    out: list[str] = []
    within = False
    for text in args:
        if within and re.match(r"[\w.]+=", text) and out[-1] != "--set":
            out.append("--set")
        within = text == "--set" or (within and bool(re.match(r"[\w.]+=", text)))
        out.append(text)
    return out
