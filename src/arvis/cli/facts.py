"""Commands about systems and files: systems, info, parity, check, convert, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from arvis import systems
from arvis.cli.terminal import log_lines, place_for_folder, progress
from arvis.config import to_dict


def list_systems() -> None:
    """List the systems, their models, and what they are."""
    from arvis.loading import SHIPPED

    for slug, row in systems.SYSTEMS.items():
        print(f"{slug:<16} {row.kind:<12} {row.title}")
        for name, preset in systems.system(slug).PRESETS.items():
            found = "in the box" if (SHIPPED / name).is_dir() else "on the hub" if preset.files else "to be trained"
            print(f"    {name:<24} {found}, licence {preset.licence or 'unknown'}")


def info(name: Positional[str], /) -> None:
    """Show a model's configuration, size, layout and published results.

    Args:
        name: A preset, such as var-d16, or a folder of a trained model.
    """
    import torch

    if Path(name).is_dir() and ("/" in name or (Path(name) / "config.json").is_file()):
        import arvis

        loaded = arvis.load(Path(name))
        slug, full, config, system = loaded.slug, loaded.name, loaded.config, loaded.system
        files, licence, sampling = {}, loaded.source.get("licence") or "unknown", loaded.sampling()
    else:
        slug, full, preset = systems.preset(name)
        config = preset.config()
        with torch.device("meta"):
            system = systems.system(slug).build(config)
        files, licence = preset.files, preset.licence
        sampling = replace(system.Sampling(), **preset.sampling)
    print(f"{full}: {systems.SYSTEMS[slug].title}")
    for part, net in system.parts().items():
        count = sum(p.numel() for p in net.parameters())
        where = f"{files[part].repo}/{files[part].name}" if part in files else ""
        print(f"  {part:<12} {count / 1e6:10.2f} M parameters  {where}".rstrip())
    layout = system.tokenizer.layout()
    levels = ", ".join("x".join(map(str, level)) for level in layout.levels)
    print(f"  layout       {layout.n} tokens in {layout.K} groups: {levels}")
    print(f"  takes        {', '.join(system.conditions) or 'no condition'}")
    print(f"  licence      {licence or 'no published weights'}")
    print(f"  sampling     {', '.join(f'{key}={value}' for key, value in to_dict(sampling).items())}")
    for result in getattr(systems.system(slug), "RESULTS", ()):
        if result.preset == full:
            print(f"  published    {result.metric} {result.value} ({result.settings}; {result.source})")
    for line in _lines(to_dict(config), "model."):
        print(f"  {line}")


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
    name: Positional[str], out: Positional[Path], /, weights: tuple[str, ...] = (), official: bool = False
) -> None:
    """Convert official weights to our folder, or one of our folders to official files.

    Args:
        name: A preset (var-d16), or with --official a folder of ours.
        out: The folder to write.
        weights: Official files on disk, PART=FILE (tokenizer=vae.pth transformer=var_d16.pth); else from the hub.
        official: The other way round: one safetensors file per part, with the official names.
    """
    import arvis

    place_for_folder(out.parent)
    if official:
        if weights:
            raise ValueError("--weights are official files to read; --official writes them: give one of the two")
        from safetensors.torch import save_file

        from arvis.weights import to_official

        loaded = arvis.load(name)
        module = systems.system(loaded.slug)
        if not hasattr(module, "keys"):
            raise ValueError(f"{loaded.slug} has no official files: its own folder is the only form")
        keys = module.keys(loaded.config)
        place_for_folder(out)
        for part, net in loaded.system.parts().items():
            tensors = {k: v.contiguous().clone() for k, v in to_official(net, keys[part]).items()}
            partial = out / f".{part}.partial"
            try:
                save_file(tensors, partial)
                partial.replace(out / f"{part}.safetensors")
            finally:
                partial.unlink(missing_ok=True)
            print(f"{out / part}.safetensors: {len(tensors)} tensors")
        return
    pairs = dict(text.split("=", 1) for text in weights if re.match(r"\w+=.", text))
    if len(pairs) != len(weights):
        raise ValueError(f"--weights takes PART=FILE, each part once, got {' '.join(weights)}")
    with log_lines():
        loaded = arvis.load(name, weights=pairs)
    print(f"{loaded.save_pretrained(out)}: {loaded.name}, licence {loaded.source.get('licence') or 'unknown'}")


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
