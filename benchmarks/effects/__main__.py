"""`python -m benchmarks.effects [SLUG ...] [--counted]`: the effects of systems, shown in docs/systems.md.

Only the named systems are computed anew; the others keep the rows of their last run in results/effects.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from arvis.training.checkpoint import write_text
from benchmarks.effects import Effect

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "effects.json"
PAGE = HERE.parents[1] / "docs" / "systems.md"
BEGIN, END = "<!-- effects -->", "<!-- end of effects -->"


def known() -> list[str]:
    """Slugs of the systems with a file here."""
    files = sorted(HERE.glob("*.py"))
    return [file.stem.replace("_", "-") for file in files if not file.stem.startswith("__")]


def rows(slug: str, counted_only: bool) -> list[dict[str, Any]]:
    module = import_module(f"benchmarks.effects.{slug.replace('-', '_')}")
    effects: list[Effect] = module.counted() + ([] if counted_only else module.measured())
    made = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
    return [{"system": slug, **asdict(effect), **made} for effect in effects]


def table(results: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| system | what | published | here | how |", "|---|---|---|---|---|"]
    for row in results:
        how = row["how"] if not row["note"] else f"{row['how']}: {row['note']}"
        cells = row["system"], row["quantity"], row["published"] or "-", f"{row['value']:.4g} {row['unit']}", how
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help=f"of {', '.join(known())}; all without")
    parser.add_argument("--counted", action="store_true", help="only what is counted: no timing")
    given = parser.parse_args()
    if unknown := sorted(set(given.slugs) - set(known())):
        parser.error(f"no effects of {', '.join(unknown)}; there are {', '.join(known())}")
    torch.manual_seed(0)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for slug in given.slugs or known():
        fresh = rows(slug, given.counted)
        print(table(fresh), flush=True)
        renewed = {row["how"] for row in fresh}
        results = [row for row in results if row["system"] != slug or row["how"] not in renewed] + fresh
    results.sort(key=lambda row: (row["system"], row["how"]))
    RESULTS.parent.mkdir(exist_ok=True)
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_text(PAGE, f"{head}{BEGIN}\n\n{table(results)}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
