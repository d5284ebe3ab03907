"""report.html of a run: curves, the latest samples, speed and settings in one file that opens without a network.

Metrics NAME_seen and NAME_heldout (on pictures that are learned from, and on others) share a figure. Pictures in the
run folder that config.json names under "pictures" are shown first, with their captions.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from arvis.training import chart, folder, metrics
from arvis.training.checkpoint import write_text

_CSS = """
:root { color-scheme: light dark; --ink: #1d232b; --dim: #66707c; --line: #e3e6ea; --page: #fff; --card: #f7f8fa;
  --hue: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #98a2ae; --line: #333a43; --page: #14181d;
  --card: #1b2026; --hue: #6ea3f7; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 12px; }
p.sub { color: var(--dim); margin: 0 0 20px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.facts div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.facts b { display: block; font-size: 20px; } .facts span, figcaption { color: var(--dim); font-size: 13px; }
.curves, .samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 12px; }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(180px, 100%), 1fr)); }
.samples figure:first-child { grid-column: 1 / -1; } figure { margin: 0; } figure img { width: 100%; max-width: 640px;
  display: block; margin: 0 auto 6px; image-rendering: pixelated; }
svg { width: 100%; display: block; } svg text { font-size: 11px; fill: var(--dim); } .grid { stroke: var(--line); }
.raw, .smooth { fill: none; stroke: var(--hue); stroke-linejoin: round; } .raw { opacity: .3; }
.smooth { stroke-width: 2; } .second { fill: none; stroke: var(--ink); stroke-dasharray: 5; } .dot { fill: var(--hue); }
.log { display: none; } #log:checked ~ .curves .both .lin { display: none; }
#log:checked ~ .curves .both .log { display: block; }
table { border-collapse: collapse; font-size: 14px; }
td { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--dim); white-space: nowrap; }
"""


def write(run: Path) -> Path:
    """Write report.html from the files of the run folder, and return its path."""
    run = Path(run)
    rows, config = metrics.read(run), folder.read(run)
    write_text(run / "report.html", html(run.resolve().name, rows, config, run / "samples"))
    return run / "report.html"


def overview(run: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a report.html that shows the pictures in the run folder and leads to the reports of its parts."""
    links = ", ".join(f'<a href="{escape(part)}/report.html">{escape(part)}</a>' for part in parts)
    figures = "".join(_figure(file, file.stem) for file in sorted(run.glob("*.png")))
    body = f'<h1>{escape(title)}</h1><p class="sub">Reports of the stages: {links}</p>'
    write_text(run / "report.html", f'{_head(title)}{body}<div class="samples">{figures}</div></body></html>')
    return run / "report.html"


def html(name: str, rows: list[dict[str, Any]], config: Mapping[str, Any], samples: Path) -> str:
    """The page as text."""
    parts = [
        _head(f"{name}: training report"),
        f'<h1>{escape(name)}</h1><p class="sub">{escape(_subtitle(config))}</p>',
        _facts(rows, config),
        _pictures(samples.parent, config.get("pictures", {})),
        _curves(rows),
        _samples(samples),
        f"<h2>Settings</h2>{_table(config)}</body></html>",
    ]
    return "\n".join(parts)


def _head(title: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style><body>'
    )


def _pictures(run: Path, captions: Mapping[str, str]) -> str:
    """Pictures in the run folder with what they show."""
    return "".join(_figure(run / name, text) for name, text in captions.items() if (run / name).is_file())


def _figure(file: Path, caption: str) -> str:
    data, text = base64.b64encode(file.read_bytes()).decode(), escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _subtitle(config: Mapping[str, Any]) -> str:
    count, versions = config.get("trainable_parameters", 0), config.get("versions", {})
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{count:,} trainable parameters; {config.get('precision', '')}; {used}"


def _facts(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> str:
    if not rows:
        return "<p>No metrics yet.</p>"
    last, steps = rows[-1], config.get("fit", {}).get("steps", 0)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    speeds = {
        what: sorted(row[f"{what}_per_second"] for row in rows if row.get(f"{what}_per_second"))
        for what in ("images", "tokens")
    }
    peak = max((row["peak_mb"] for row in rows if row.get("peak_mb")), default=0.0)
    hours = max(row.get("seconds", 0.0) for row in rows) / 3600
    facts = {
        "step": f"{last['step']:,} of {steps:,}",
        "loss": chart.short(losses[-1]) if losses else "none",
        "best loss": chart.short(min(losses)) if losses else "none",
        "images per second": "none",
        **{f"{what} per second": chart.short(found[len(found) // 2]) for what, found in speeds.items() if found},
        **({"peak memory": f"{peak:,.0f} MB"} if peak else {}),
        "training time": f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min",
    }
    cards = "".join(f"<div><span>{name}</span><b>{escape(value)}</b></div>" for name, value in facts.items())
    return f'<div class="facts">{cards}</div>'


def _curves(rows: list[dict[str, Any]]) -> str:
    hidden = {"step", "seconds", "tokens_per_second", "peak_mb"}  # facts, not curves
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    figures = []
    for name in sorted(names, key=_rank):
        stem, seen, _ = name.partition("_seen")
        points, second = _points(rows, name), _points(rows, f"{stem}_heldout") if seen else []
        if not points or (name.endswith("_heldout") and name.replace("_heldout", "_seen") in names):
            continue
        smooth = 0.0 if name == "lr" or seen else 0.9
        positive = min(y for _, y in (*points, *second)) > 0
        drawn = f'<div class="lin">{chart.svg(points, name, False, smooth, second)}</div>'
        if positive:
            drawn += f'<div class="log">{chart.svg(points, name, True, smooth, second)}</div>'
        caption = f"{escape(name)}: {chart.short(points[-1][1])} at step {points[-1][0]:,}"
        if second:
            caption += f"; on pictures held out (dashed): {chart.short(second[-1][1])}"
        kind = ' class="both"' if positive else ""
        figures.append(f"<figure{kind}><figcaption>{caption}</figcaption>{drawn}</figure>")
    if not figures:
        return ""
    switch = '<input type="checkbox" id="log"> <label for="log">logarithmic scale</label>'
    return f'<h2>Curves</h2><section>{switch}<div class="curves">{"".join(figures)}</div></section>'


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _rank(name: str) -> tuple[int, str]:
    """The loss first, then other losses, metrics, and the machinery last."""
    order = ("loss", "loss_", "", "grad_norm", "lr", "images_per_second")
    if name in order:
        return order.index(name), name
    return (1 if name.startswith("loss") else 3 if name.startswith("grad_norm") else 2), name


def _samples(samples: Path, most: int = 7) -> str:
    """The latest picture large, then earlier ones, evenly chosen, the newest first."""
    files = sorted(samples.glob("*.png"), key=_step)
    if not files:
        return ""
    count = min(most, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = [_figure(file, file.stem) for file in reversed(chosen)]
    return f'<h2>Samples</h2><div class="samples">{"".join(figures)}</div>'


def _step(file: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", file.stem)
    return int(numbers[-1]) if numbers else -1, file.stem


def _table(config: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in _flat(config, ""))
    return f"<table>{cells}</table>"


def _flat(value: Any, path: str) -> list[tuple[str, str]]:
    """Dotted names and texts of nested settings."""
    if isinstance(value, Mapping):
        return [row for name, inner in value.items() for row in _flat(inner, f"{path}.{name}" if path else str(name))]
    if isinstance(value, list) and all(not isinstance(item, (Mapping, list)) for item in value):
        return [(path, " ".join(str(item) for item in value))]
    if isinstance(value, list):
        return [row for i, item in enumerate(value) for row in _flat(item, f"{path}[{i}]")]
    return [(path, str(value))]
