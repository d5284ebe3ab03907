"""`python -m benchmarks.pairs NAME|all --official DIR [--batch 1 4] [--precision float32 bfloat16] [--repeats 3]`.

DIR is the official checkout, or a folder of such checkouts under their usual names.

Builds both sides in one number format, checks that they agree, times them alternately (the median counts), measures our
peak memory in a process of its own, and adds the rows to results/pairs.json. `--table` writes docs/performance.md from
these rows alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import cache
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from arvis import cost
from arvis.loading import empty
from arvis.training.checkpoint import write_text
from benchmarks.pairs import Run, known, named

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "pairs.json"
PAGE = HERE.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- pairs -->", "<!-- end of pairs -->"


def seconds(run: Run, batch: int) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


@cache
def counted(name: str, batch: int) -> tuple[cost.Work, ...]:
    """The work of a batch of a pair in float32, by phase."""
    pair = named(name)
    slug, config, settings = pair.generation()
    system = empty(slug, config).eval()
    if pair.part is not None:
        return (cost.work(pair.part(system, batch)),)
    return tuple(cost.count(system, replace(system.Sampling(), **settings), batch).phases.values())


def floor(name: str, batch: int, dtype: torch.dtype) -> float:
    """The least seconds in which this machine could do the counted work; narrower numbers are fewer bytes."""
    best, narrower = quickest(dtype), dtype.itemsize / torch.float32.itemsize
    return sum(
        cost.Work((flops, moved * narrower) for flops, moved in work).floor(best) for work in counted(name, batch)
    )


def quickest(dtype: torch.dtype, runs: int = 3) -> cost.Machine:
    """The best of several measurements: a shared machine is slower at times, and no floor may be above what was run."""
    found = [cost.measure(dtype) for _ in range(runs)]
    return replace(
        found[0], flops=max(machine.flops for machine in found), bandwidth=max(machine.bandwidth for machine in found)
    )


def peak(name: str, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """Megabytes of a process that has only our side: the most during a run, and weights and caches counted."""
    command = [sys.executable, "-m", "benchmarks.peak", name, str(batch), str(dtype).removeprefix("torch.")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(name: str, folder: Path, batches: list[int], dtype: torch.dtype, repeats: int) -> Iterator[dict[str, Any]]:
    pair = named(name)
    sides = pair.make(folder, dtype)
    for batch in batches:
        agreement = pair.agreement(sides.ours(batch), sides.official(batch))  # the first run of each, not timed
        if agreement < pair.least[dtype]:
            raise SystemExit(f"{name}, batch {batch}: the outputs agree by {agreement:.4f} only; nothing was timed")
        times = [(seconds(sides.ours, batch), seconds(sides.official, batch)) for _ in range(repeats)]
        ours, official = (statistics.median(side) for side in zip(*times, strict=True))
        row = {
            "name": name,
            "batch": batch,
            "precision": str(dtype).removeprefix("torch."),
            "ours_s": round(ours, 4),
            "official_s": round(official, 4),
            "ratio": round(official / ours, 3),
            "agreement": round(agreement, 4),
            "runs": repeats,
            "machine": machine(),
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "commit": commit()},
        }
        if pair.preset:
            least = floor(name, batch, dtype)
            row |= {"floor_s": round(least, 4), "floor_share": round(least / ours, 3)}
        if pair.preset and pair.part is None:
            row |= {f"{key}_mb": round(value) for key, value in peak(name, batch, dtype).items()}
        yield row


def keep(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a row in place of an earlier one of its kind; returns all rows."""
    kind = itemgetter("name", "batch", "precision", "machine")
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results = sorted([*(r for r in held if kind(r) != kind(row)), row], key=kind)
    RESULTS.parent.mkdir(exist_ok=True)
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def machine() -> str:
    """The processor and the threads in use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if any(unit in line for line in lines)]
    return ", ".join([names[0] if names else platform.machine(), *units[:1], f"{torch.get_num_threads()} threads"])


def commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return told.stdout.strip()


def best(results: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """How much sooner than the quicker of the official number formats; None where only one was timed."""
    same = [r for r in results if (r["name"], r["batch"], r["machine"]) == (row["name"], row["batch"], row["machine"])]
    return min(r["official_s"] for r in same) / row["ours_s"] if len(same) > 1 else None


def table(results: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("what", "batch", "precision", "official", "arvis", "ratio", "against its best", "floor", "of it", "memory")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results:
        least, share = (f"{row['floor_s']:.2f} s", f"{row['floor_share']:.0%}") if "floor_s" in row else ("-", "-")
        memory = f"{row['peak_mb']} MB, {row['kept_mb']} MB" if "peak_mb" in row else "-"
        cells = [
            row["name"],
            str(row["batch"]),
            row["precision"],
            f"{row['official_s']:.2f} s",
            f"{row['ours_s']:.2f} s",
        ]
        against = best(results, row)
        cells += [f"{row['ratio']:.2f}", "-" if against is None else f"{against:.2f}", least, share, memory]
        lines.append(f"| {' | '.join(cells)} |")
    told = sorted({f"{row['machine']}; torch {row['versions']['torch']}; {row['date']}" for row in results})
    return "\n".join([*lines, "", *told])


def checkout(name: str, folder: Path) -> Path:
    """The official checkout of a pair: the folder, or the one in it that has its name."""
    inside = folder / import_module(f"benchmarks.pairs.{known()[name]}").CHECKOUT
    return (inside if inside.is_dir() else folder).resolve()


def everything(folder: Path, rest: list[str]) -> None:
    """Each pair whose checkout is there, in a process of its own: official packages share names."""
    for name in known():
        if checkout(name, folder) != folder.resolve():
            command = [sys.executable, "-m", "benchmarks.pairs", name, "--official", str(folder), *rest]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=", ".join(known()))
    parser.add_argument("--official", type=Path, help="a checkout of the official repository")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only write the table of the rows that are there")
    given = parser.parse_args()
    if given.name == "all" and given.official is not None:
        everything(given.official, sys.argv[sys.argv.index(str(given.official)) + 1 :])
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if not given.table:
        if given.name not in known() or given.official is None:
            parser.error(f"give one of {', '.join(known())} and --official DIR")
        for precision in given.precision:
            batches = given.batch or list(named(given.name).batches)
            dtype = getattr(torch, precision)
            for row in rows(given.name, checkout(given.name, given.official), batches, dtype, given.repeats):
                print(json.dumps(row), flush=True)
                results = keep(row)
            gc.collect()
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_text(PAGE, f"{head}{BEGIN}\n\n{table(results)}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
