"""Official checkpoints <-> our modules, by a table of names.

A table is a list of `Key(ours, official, transform)`. In a name `{i}` stands for one part between dots, or a piece of
one, and `{rest*}` for one or more whole parts. The first row that fits a tensor of ours has it:

    Key("trunk.blocks.{i}.ffn.up.{p}", "blocks.{i}.ffn.fc1.{p}")             same values, another name
    Key("blocks.{i}.scale", "blocks.{i}.mul", Rearrange("1 h 1 1 -> h"))     another shape
    Key("qkv.weight", ("q.weight", "k.weight", "v.weight"), Fuse(3))         several of theirs, one of ours
    Key((), "k_bias.{i}", Constant(torch.zeros_like), like="q_bias.{i}")     theirs alone, made again on the way back
    Key((), "loss.{rest*}")                                                  theirs alone, left out, and named
    Key("hits", "hits", optional=True)                                       may be absent or of another shape
    Key("conv.{p}", "conv.conv.{p}", spellings=("conv.{p}",))                older files have another name for it
    Key("cache", (), initial=torch.zeros_like)                               ours alone

Everything works on shapes alone, with the module on the meta device.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arvis.weights.transforms import Constant, Same, Transform

_log = logging.getLogger("arvis")


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit their module."""


@dataclass(frozen=True)
class Key:
    """One row of a table; see the module's docstring. `like` names the tensor of ours that a Constant is made from.

    `spellings` are further official names that files have for the same tensors; what is written has the first one.
    `initial` makes tensors of ours that a file lacks, from empty ones, for a module on the meta device.
    """

    ours: str | tuple[str, ...]
    official: str | tuple[str, ...]
    transform: Transform = field(default_factory=Same)
    optional: bool = False
    like: str = ""
    spellings: tuple[str | tuple[str, ...], ...] = ()
    initial: Callable[[Tensor], Tensor] | None = None


SAME_NAMES = (Key("{name*}", "{name*}"),)
"""The table of our own files."""


class Mismatch(NamedTuple):
    """A tensor that does not fit: the names and shapes on both sides, and in words what is wrong."""

    ours: str
    official: str
    needed: tuple[int, ...] | None
    found: tuple[int, ...] | None
    reason: str = ""

    def __str__(self) -> str:
        told = f": {self.reason}" if self.reason else ""
        if self.found == self.needed:
            return f"{self.official} {self.found} (ours: {self.ours or 'none'}){told}"
        return f"{self.official} is {self.found} and {self.ours or 'the model'} needs {self.needed}{told}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """How an official file and a module fit. `parameters` counts the module's, tied ones once."""

    mapped: dict[str, str]
    left_out: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    misfits: tuple[Mismatch, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    parameters: int = 0
    nearest: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not (self.misfits or self.missing or self.unexpected)

    def __str__(self) -> str:
        if self.ok:
            return f"{len(self.mapped)} official tensors fit" + _listed("left out", self.left_out)
        told = [str(first) for first in self.misfits[:1]]
        if len(self.misfits) > 1:
            told.append(f"{len(self.misfits) - 1} more do not fit")
        for kind, names in (("missing from the file", self.missing), ("unexpected in the file", self.unexpected)):
            for name in names[:1]:
                near = f" (nearest: {self.nearest[name]})" if name in self.nearest else ""
                told.append(f"{kind}: {name}{near}{_more(names)}")
        return "; ".join(told)


def _listed(kind: str, names: Sequence[str]) -> str:
    return f"; {kind}: {', '.join(names)}" if names else ""


def load_official(
    module: nn.Module,
    keys: Iterable[Key],
    tensors: Mapping[str, Tensor],
    strict: bool = True,
    source: str = "the file",
    device: torch.device | str = "cpu",
) -> Report:
    """Fill a module from official tensors, cast to its number formats.

    A module on the meta device gets their storage, tensor by tensor on `device`, so that nothing lies in memory twice.
    Nothing is changed unless everything fits. `strict=False` tolerates official tensors that no row knows, and nothing
    else. Raises WeightsError naming the first tensor that does not fit with both shapes, then what is missing and
    unexpected. The report says by name what was left out or kept.
    """
    own, report, loaded = _match(module, keys, tensors, device)
    if report.unexpected and not strict:
        left_out = (*report.left_out, *report.unexpected)
        report = Report(**{**vars(report), "unexpected": (), "left_out": left_out})
    if not report.ok:
        raise WeightsError(f"{source} does not fit the model: {report}")
    for kind, names in (("left out", report.left_out), ("kept as they were", report.kept)):
        if names:
            _log.info("%s: %s: %s", source, kind, ", ".join(names))
    on_meta = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict(loaded, strict=False, assign=on_meta)
    if on_meta:
        empty = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
        if empty:
            raise WeightsError(
                f"{source} has no values for {empty[0]}; give its row an `initial`, or build the module off meta"
            )
    return report


def to_official(module: nn.Module, keys: Iterable[Key]) -> dict[str, Tensor]:
    """The official names and tensors of a module: the exact inverse of `load_official`, constants made again.

    The tensors may be views of the module's own.
    """
    return _back({name: tensor.detach() for name, tensor in module.state_dict().items()}, tuple(keys))


def map_shapes(module: nn.Module, keys: Iterable[Key], shapes: Mapping[str, Sequence[int]]) -> Report:
    """Whether a table of official names and shapes fits a module in both directions; the module may be on meta.

    Official -> ours as in `load_official`, strictly; back, our names give the table again, but for what is left out.
    Fits that the way back breaks are reported as misfits.
    """
    keys = tuple(keys)
    table = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    report = _match(module, keys, table)[1]
    on_meta = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    back = {name: tuple(tensor.shape) for name, tensor in _back(on_meta, keys).items()}
    optional = {name for step in _plan(on_meta, keys) if step.key.optional for name in step.official}
    invented = [name for name in back if name not in {*table, *report.missing, *optional}]
    broken = []
    for name in (*report.mapped, *invented):
        found = tuple(shapes[name]) if name in shapes else None
        if back.get(name) != found:
            broken.append(Mismatch(report.mapped.get(name, ""), name, back.get(name), found, "the way back differs"))
    return Report(**{**vars(report), "misfits": (*report.misfits, *broken)})


class _Step(NamedTuple):
    """A row with its names filled in."""

    key: Key
    ours: tuple[str, ...]
    official: tuple[str, ...]
    like: tuple[str, ...]


def _plan(own: Mapping[str, Tensor], keys: tuple[Key, ...], file: Mapping[str, Tensor] | None = None) -> list[_Step]:
    """Every row for every tensor of ours that it fits, in the spelling of a file or else in the first one.

    Raises WeightsError where no row has a tensor of ours.
    """
    claimed: dict[str, int] = {}
    steps: list[_Step] = []
    for key in keys:
        ours, official = _names(key.ours), _names(key.official)
        anchor = ours[0] if ours else key.like
        if not anchor:
            if isinstance(key.transform, Constant):
                steps.append(_Step(key, (), official, ()))
            continue
        pattern = _compile(anchor)
        for name in own:
            found = pattern.fullmatch(name)
            if found is None or (ours and name in claimed):
                continue
            filled = tuple(_fill(o, found.groupdict(), key) for o in ours)
            absent = next((o for o in filled if o not in own), None)
            if absent is not None:
                raise WeightsError(f"the row {key} needs {absent}, which the module lacks{_near(absent, own)}")
            claimed.update(dict.fromkeys(filled, len(steps)))
            spelled = [
                tuple(_fill(o, found.groupdict(), key) for o in _names(names))
                for names in (key.official, *key.spellings)
            ]
            theirs = next((t for t in spelled if file is not None and all(o in file for o in t)), spelled[0])
            steps.append(_Step(key, filled, theirs, () if ours else (name,)))
    unclaimed = [name for name in own if name not in claimed]
    if unclaimed:
        raise WeightsError(
            f"no row of the table has our {unclaimed[0]}{_more(unclaimed)}; add one, Key({unclaimed[0]!r}, ..)"
        )
    known: set[str] = set()
    for step in steps:
        twice = known.intersection(step.official)
        if twice:
            raise WeightsError(f"two rows of the table have the official {min(twice)}; the second is {step.key}")
        known.update(step.official)
    return steps


def _back(own: Mapping[str, Tensor], keys: tuple[Key, ...]) -> dict[str, Tensor]:
    """The official tensors made from ours."""
    official: dict[str, Tensor] = {}
    for step in _plan(own, keys):
        made = step.key.transform.to_official([own[name] for name in step.ours or step.like]) if step.official else []
        official.update(zip(step.official, made, strict=True))
    return official


def _match(
    module: nn.Module, keys: Iterable[Key], tensors: Mapping[str, Tensor], device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], Report, dict[str, Tensor]]:
    """The module's tensors, how a file fits, and our tensors of those that do; of a module on meta, on `device`."""
    keys, own = tuple(keys), {name: tensor.detach() for name, tensor in module.state_dict().items()}
    plan = _plan(own, keys, tensors)
    loaded: dict[str, Tensor] = {}
    mapped: dict[str, str] = {}
    kept: list[str] = []
    missing: list[str] = []
    misfits: list[Mismatch] = []
    known: set[str] = set()
    for step in plan:
        known.update(step.official)
        absent = [name for name in step.official if name not in tensors]
        if absent or not step.official:
            if step.key.optional or not step.official:
                kept += step.ours
            elif step.ours:
                missing += absent
            continue
        made: dict[str, Tensor] = {}
        wrong = _fit(step, own, tensors, made)
        for name, tensor in made.items():
            placed = device is not None and own[name].is_meta
            loaded[name] = tensor.to(device, own[name].dtype) if placed else tensor
        if wrong and not step.key.optional:
            misfits.append(wrong)
        elif wrong:
            kept += step.ours
        else:
            mapped |= {name: ", ".join(step.ours) for name in step.official}
    first = {name: step.key.initial for step in plan if step.key.initial for name in step.ours}
    for name in kept:
        if name in first and device is not None and own[name].is_meta:
            loaded[name] = first[name](torch.empty_like(own[name], device=device))
    rest = [name for name in tensors if name not in known]
    ignored = [_compile(name) for key in keys if not key.ours and not key.like for name in _names(key.official)]
    left_out = [name for name in rest if any(pattern.fullmatch(name) for pattern in ignored)]
    unexpected = [name for name in rest if name not in left_out]
    order = {name: at for at, name in enumerate(tensors)}
    nearest = {}
    for names, others in ((missing, unexpected or list(tensors)), (unexpected, missing or sorted(known))):
        if names and (near := difflib.get_close_matches(names[0], others, n=1)):
            nearest[names[0]] = near[0]
    report = Report(
        mapped=mapped,
        left_out=tuple(left_out),
        kept=tuple(kept),
        misfits=tuple(sorted(misfits, key=lambda m: order[m.official])),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        parameters=sum(p.numel() for p in module.parameters()),
        nearest=nearest,
    )
    return own, report, loaded


def _fit(
    step: _Step, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], loaded: dict[str, Tensor]
) -> Mismatch | None:
    """Add our tensors of one row to `loaded`, or say what does not fit."""
    theirs, mine = [tensors[name] for name in step.official], [own[name] for name in step.ours or step.like]
    if step.like and mine[0].is_meta:  # a constant depends on the shape of its model alone, so it can be checked
        mine = [torch.empty_like(mine[0], device=theirs[0].device)]
    needed = [tuple(tensor.shape) for tensor in step.key.transform.to_official([t.to("meta") for t in mine])]
    found = [tuple(tensor.shape) for tensor in theirs]
    made, reason = None, ""
    try:
        if found != needed:  # on shapes alone first: a hostile file may state any size
            on_meta = [t.to("meta") for t in theirs], [t.to("meta") for t in mine]
            reason = _unlike(step, step.key.transform.to_ours(*on_meta), own)
        if not reason:
            made = step.key.transform.to_ours(theirs, mine)
            reason = _unlike(step, made, own)
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
    if made is not None and not reason:
        loaded.update(zip(step.ours, made, strict=True))
        return None
    at = next((i for i in range(len(found)) if found[i] != needed[i]), 0)
    return Mismatch(", ".join(step.ours), step.official[at], needed[at], found[at], "" if found != needed else reason)


def _unlike(step: _Step, made: Sequence[Tensor], own: Mapping[str, Tensor]) -> str:
    """The first tensor of a row that has not the shape of ours, in words; empty where all have."""
    for name, tensor in zip(step.ours, made, strict=True):
        if tensor.shape != own[name].shape:
            return f"as ours it is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
    return ""


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _compile(name: str) -> re.Pattern[str]:
    """`a.{i}.{rest*}` as a regular expression; a placeholder that comes twice is the same both times."""
    out, seen = "", set()
    for text, hole, star in re.findall(r"([^{]+)|\{(\w+)(\*?)\}", name):
        if text:
            out += re.escape(text)
        elif hole in seen:
            out += f"(?P={hole})"
        else:
            seen.add(hole)
            out += f"(?P<{hole}>.+)" if star else f"(?P<{hole}>[^.]+)"
    return re.compile(out)


def _fill(name: str, values: Mapping[str, str], key: Key) -> str:
    def value(hole: re.Match[str]) -> str:
        if hole[1] not in values:
            raise WeightsError(f"the row {key} has {{{hole[1]}}} in {name}, but not in its first name of ours")
        return values[hole[1]]

    return re.sub(r"\{(\w+)\*?\}", value, name)


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {near[0]})" if near else ""


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
