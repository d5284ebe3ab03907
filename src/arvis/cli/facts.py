"""Commands about systems and files: systems, info, parity, check, convert, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from arvis import systems
from arvis.cli.settings import Set
from arvis.cli.speed import print_cost
from arvis.cli.terminal import log_lines, place_for_folder, progress
from arvis.config import to_dict
from arvis.published import File, Preset

if TYPE_CHECKING:
    from arvis.weights import Remote


def list_systems() -> None:
    """List the systems, their models, and what they are."""
    for slug, row in systems.SYSTEMS.items():
        print(f"{slug:<16} {row.kind:<12} {row.title}")
        for name, preset in systems.system(slug).PRESETS.items():
            print(f"    {name:<24} {_where(name, preset)}, licence {preset.licence or 'unknown'}")


def _where(name: str, preset: Preset) -> str:
    """Where the weights of a preset are to be had."""
    from arvis.loading import SHIPPED

    if (SHIPPED / name).is_dir():
        return "in the box"
    if not preset.files:
        return "to be trained"
    return "in the cache" if all(_cached(file) for file in preset.files.values()) else "on the hub"


def _cached(file: File) -> tuple[Remote, ...]:
    """An official file in the cache of this machine, without a network; empty where it is not there."""
    from arvis.weights import Hub, WeightsError

    try:
        return Hub(local_files_only=True).find(file.repo, file.name, file.revision)
    except WeightsError:
        return ()


def info(
    name: Positional[str],
    /,
    cost: bool = False,
    batch: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    set: Set = (),
) -> None:
    """Show a model's configuration, size, what it takes, layout and published results; nothing is downloaded.

    Args:
        name: A preset, such as var-d16, or a folder of a trained model.
        cost: Count what a generation takes instead: operations, bytes moved, memory, by phase; and the least time in
            which this machine could, which is measured for three seconds.
        batch: Pictures at once, for the cost.
        precision: The number format that is counted and measured.
        device: cpu or cuda, for the measurement.
        set: Sampling settings, such as cfg_scale=1 (no guidance halves the work), for the cost.
    """
    from arvis.config import from_dict
    from arvis.loading import empty, refuse_official_repository
    from arvis.weights import read_header, takes

    preset, stored, sampling = None, None, {}
    if _a_folder(name):
        header = read_header(Path(name))
        slug, full = header.system, header.source.get("name", Path(name).name)
        config, stored = from_dict(systems.system(slug).CONFIG, header.config), header.source
        sampling, licence = stored.get("sampling") or {}, stored.get("licence") or "unknown"
    else:
        refuse_official_repository(name)
        slug, full, preset = systems.preset(name)
        config, sampling, licence = preset.config(), preset.sampling, preset.licence or "no published weights"
    system = empty(slug, config)
    known = {field.name for field in fields(system.Sampling)}
    sampling = replace(system.Sampling(), **{key: value for key, value in sampling.items() if key in known})
    if cost:
        print_cost(full, system, sampling, batch, precision, device, set)
        return
    print(f"{full}: {systems.SYSTEMS[slug].title}")
    for part, net in system.parts().items():
        count = sum(p.numel() for p in net.parameters())
        where = _file(preset.files[part], net) if preset and part in preset.files else ""
        print(f"  {part:<12} {count / 1e6:10.2f} M parameters  {where}".rstrip())
    if preset and preset.text:
        there = _cached(File(repo=preset.text, name=""))
        print(f"  {'text':<12} {preset.text} ({'in the cache' if there else 'fetched when the first prompt comes'})")
    print(f"  memory       {takes(system)}")
    for row in (stored or {}).get("files", ()):
        at = f" at {row['revision']}" if "revision" in row else ""
        print(f"  converted    {row['part']} from {row['file']}{at}, sha256 {row.get('sha256', 'unknown')}")
    layout = system.tokenizer.layout()
    levels = ", ".join("x".join(map(str, level)) for level in layout.levels)
    print(f"  layout       {layout.n} tokens{f' in {layout.K} groups' if layout.K > 1 else ''}: {levels}")
    print(f"  takes        {', '.join(system.conditions) or 'no condition'}")
    print(f"  licence      {licence}")
    print(f"  sampling     {', '.join(f'{key}={value}' for key, value in to_dict(sampling).items())}")
    for result in getattr(systems.system(slug), "RESULTS", ()):
        if result.preset == full:
            print(f"  published    {result.metric} {result.value} ({result.settings}; {result.source})")
    for line in _lines(to_dict(config), "model."):
        print(f"  {line}")


def _a_folder(name: str) -> bool:
    """Whether a name is that of a folder of ours, and not of a preset."""
    return Path(name).is_dir() and ("/" in name or (Path(name) / "config.json").is_file())


def _file(file: File, net: Any) -> str:
    """An official file, with its size where it is here, or what it will be."""
    from arvis.weights import tensor_bytes, told

    there = _cached(file)
    if there:
        state = f"in the cache, {told(sum(remote.size for remote in there))}"
    else:
        state = f"to be downloaded, {told(tensor_bytes(net))} in float32"
    return f"{file.repo}/{file.name} ({state})"


def parity(slug: Positional[str], /, fixture: Path | None = None, keys: Path | None = None) -> None:
    """Compare with recordings of the official code, tensor by tensor; exits with 1 if any differs.

    Args:
        slug: A system, such as var, or "quantizers".
        fixture: A folder with config.json, weights.safetensors and io.safetensors; the search path has the default.
        keys: A full-size key layout (.json) to map on the meta device in both directions instead.
    """
    from arvis import parity as room

    if slug not in room.runners():
        systems.system(slug)  # says what is nearest to a name that nobody has
    if keys is not None:
        report = room.map_keys(slug, keys)
        print(report)
        sys.exit(0 if report.ok else 1)
    found = [room.find(name) for name in room.recordings(slug)] if fixture is None else [room.Fixture(fixture)]
    broken = False
    for recording in found:
        rows = room.run(slug, recording)
        for row in rows:
            print(row)
        failed = [row for row in rows if not row.ok]
        agree = f"{len(rows) - len(failed)} of {len(rows)} tensors of {recording.slug}"
        print(f"{agree} agree with the official recording")
        broken |= bool(failed)
    sys.exit(1 if broken else 0)


def check(slug: Positional[str], /, mutants: bool = False) -> None:
    """Run a system's claim at laptop scale; exits with 1 if it does not hold.

    Args:
        slug: A system, such as var.
        mutants: Also break the trained model on purpose, and require that the check notices.
    """
    from arvis import checks

    systems.system(slug)
    with log_lines(), progress(None, "step") as bar:
        claims = checks.run(slug, mutants, bar.update)
    for claim in claims:
        print(claim)
    sys.exit(0 if all(claim.ok for claim in claims) else 1)


def convert(
    name: Positional[str],
    out: Positional[Path],
    /,
    weights: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    official: bool = False,
    anyway: bool = False,
) -> None:
    """Convert official weights to our folder with a model card, or one of our folders to official files.

    Args:
        name: A preset (var-d16), or with --official a folder of ours.
        out: The folder to write.
        weights: Official files on disk, PART=FILE (tokenizer=vae.pth transformer=var_d16.pth), one file with its
            official name, or a folder of them; else from the hub.
        dtype: The number format to store; loading widens it to float32 again.
        official: The other way round: one safetensors file per part, with the official names.
        anyway: Try even where memory or disk seem too small.
    """
    place_for_folder(out.parent)
    if official:
        if weights or dtype != "float32":
            raise ValueError(
                "--official writes official files, --weights and --dtype are for ours: give one of the two"
            )
        _to_official(name, out)
        return
    pairs = dict(text.split("=", 1) for text in weights if re.match(r"\w+=.", text))
    alone = weights[0] if len(weights) == 1 and not pairs else None
    if alone is None and len(pairs) != len(weights):
        raise ValueError(f"--weights takes PART=FILE, each part once, or one file or folder; got {' '.join(weights)}")
    _to_ours(name, out, alone or pairs or None, dtype, anyway)


def _to_official(name: str, out: Path) -> None:
    """One safetensors file per part, with the official names."""
    import arvis
    from arvis.weights import to_official, write

    loaded = arvis.load(name)
    module = systems.system(loaded.slug)
    if not hasattr(module, "keys"):
        raise ValueError(f"{loaded.slug} has no official files: its own folder is the only form")
    keys = module.keys(loaded.config)
    place_for_folder(out)
    for part, net in loaded.system.parts().items():
        tensors = to_official(net, keys[part])
        print(f"{write(tensors, out / f'{part}.safetensors')}: {len(tensors)} tensors")


def _to_ours(name: str, out: Path, weights: Any, dtype: str, anyway: bool) -> None:
    """Our folder of official weights: configuration, tensors, and a card that says where they come from."""
    import torch

    import arvis
    from arvis.loading import published
    from arvis.weights import Hub, card, save_pretrained, tensor_bytes, told

    stored = getattr(torch, dtype)
    slug, full, preset = ("", "", None) if _a_folder(name) else systems.preset(name)
    if preset is None or not preset.files:  # ours already, or in the box: only the number format changes
        loaded = arvis.load(Path(name) if preset is None else name, weights=weights, anyway=anyway)
        source = {**loaded.source, "name": loaded.name, "sampling": loaded.settings}
        slug, full, config, system, text = loaded.slug, loaded.name, loaded.config, loaded.system, ""
        _room(out, system, stored, anyway)
    else:
        with log_lines():
            found = published(slug, full, preset, "cpu", Hub(), weights, anyway)
            _room(out, found.system, stored, anyway)
            files = found.fetch()
            found.fill(files)
        source = {**found.source(files), "name": full, "sampling": preset.sampling}
        config, system = found.config, found.system
        text = card(full, systems.SYSTEMS[slug].title, source, dtype, system.conditions, arvis.__version__, out.name)
    save_pretrained(system, to_dict(config), out, system=slug, source=source, dtype=stored, card=text)
    size = told(tensor_bytes(system) * stored.itemsize // torch.float32.itemsize)
    print(f"{out}: {full}, {size} in {dtype}, licence {source.get('licence') or 'unknown'}")
    for row in source.get("files", ()) if text else ():
        print(f"  {row['part']:<12} {row['file']}  sha256 {row['sha256']}")


def _room(out: Path, system: Any, stored: Any, anyway: bool) -> None:
    """WeightsError where a folder of the stored weights does not fit on its disk."""
    import torch

    from arvis.weights import WeightsError, free_disk, tensor_bytes, told

    needed, free = tensor_bytes(system) * stored.itemsize // torch.float32.itemsize, free_disk(out)
    if free is not None and needed > free and not anyway:
        raise WeightsError(f"{out} takes {told(needed)}, and {told(free)} are free there: free some space, or --anyway")


def doctor() -> None:
    """Say what this machine has, what arvis makes of it, and what to do about what is missing.

    Exits with 1 where arvis cannot work.
    """
    from arvis import doctor as room

    heading, broken = "", False
    for finding in room.examine():
        if finding.heading != heading:
            heading = finding.heading
            print(heading)
        print(f"  {finding.name:<16} {finding.value}")
        if finding.fix:
            print(f"  {'':<16} -> {finding.fix}")
        broken |= finding.broken
    sys.exit(1 if broken else 0)


def _lines(values: dict[str, Any], path: str) -> Iterator[str]:
    """A configuration as the overrides that --set takes."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{path}{name}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')
            yield f"{path}{name}={'none' if value is None else shown}"
