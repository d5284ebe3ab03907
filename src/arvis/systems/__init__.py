"""The registry: every published system, tokenizer, method and evaluation, one file each.

A system's module offers `build(config)`, `PRESETS`, `RESULTS` (published numbers), `tiny()` (for the laws) and, where
official weights exist, `keys(config)` (key tables by part).
"""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from arvis.published import Preset


class Row(NamedTuple):
    kind: Literal["system", "tokenizer", "method", "evaluation"]
    title: str


SYSTEMS: dict[str, Row] = {
    "brush": Row("system", "The model in the box: text to 64x64 pictures of the emoji world"),
    "code": Row("system", "A large model drafts the coarse scales, a small one refines the fine ones"),
    "flexvar": Row("system", "Next-scale prediction without residuals, over any list of scales"),
    "hmar": Row("system", "VAR without a past, whose scales are drawn again in parts by a second, masked branch"),
    "infinity": Row("system", "Text to images by next-scale prediction of independent bits"),
    "llamagen": Row("system", "Next-token prediction of VQGAN codes, row by row, with a plain Llama decoder"),
    "m-var": Row("system", "VAR with attention inside each scale and a state space from scale to scale"),
    "mar": Row("system", "Masked autoregression over continuous tokens with a diffusion head"),
    "maskgit": Row("system", "Masked codes guessed all at once and kept by confidence, on a bidirectional transformer"),
    "mvar": Row("system", "VAR without a past, whose large scales are seen through windows and learned apart"),
    "nfig": Row("system", "VAR whose scales code frequency bands of the picture, from the lowest to the highest"),
    "sar": Row("system", "Post-training of models over scales on their own predictions, here of FlexVAR"),
    "star": Row(
        "system", "Text to images over VAR's scales up to 1024 pixels, with large scales drawn in causal steps"
    ),
    "tts-var": Row("method", "A search over scales: many paths at coarse ones, few at fine ones, the best picture"),
    "var": Row("system", "Next-scale prediction over a multi-scale residual pyramid"),
    "variant": Row("system", "One set of weights over scales, the depth of late scales chosen at run time"),
}

DEFAULT = "brush"
"""The model that ships with the package."""


def system(slug: str) -> ModuleType:
    """The module of a registered system; KeyError naming the nearest ones otherwise."""
    if slug not in SYSTEMS:
        near = difflib.get_close_matches(slug, SYSTEMS, 3, 0.4)
        raise KeyError(
            f"no system is called {slug!r}; {'nearest: ' + ', '.join(near) if near else 'see `arvis systems`'}"
        )
    return import_module(f"arvis.systems.{slug.replace('-', '_')}")


def preset(name: str) -> tuple[str, str, Preset]:
    """(slug, preset name, preset) of "var-d16", or of a bare slug for its first preset; KeyError naming the nearest."""
    if name in SYSTEMS:
        presets = system(name).PRESETS
        if not presets:
            raise KeyError(f"{name} is a {SYSTEMS[name].kind}: it has no models of its own (docs/systems/{name}.md)")
        first = next(iter(presets))
        return name, first, presets[first]
    for slug in sorted(SYSTEMS, key=len, reverse=True):
        if name.startswith(f"{slug}-") and name in (presets := system(slug).PRESETS):
            return slug, name, presets[name]
    known = [preset for slug in SYSTEMS for preset in getattr(system(slug), "PRESETS", ())]
    near = difflib.get_close_matches(name, [*SYSTEMS, *known], 3, 0.5)
    raise KeyError(f"no model is called {name!r}; {'nearest: ' + ', '.join(near) if near else 'see `arvis systems`'}")
