"""One metric over the steps as inline SVG: the measured line faint, a smoothed one over it, linear or log scale.

A second line, dashed, shows the same metric elsewhere (on pictures held out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 240, 58, 12, 10, 24


def svg(points: Points, title: str, log: bool = False, smooth: float = 0.9, second: Points = ()) -> str:
    """A line chart. `smooth` is the weight of the past in the running average; with `log` all values are positive."""
    points, second = thin(points), thin(second) if second else []
    scale = math.log10 if log else float
    values, others = ([scale(y) for _, y in line] for line in (points, second))
    low, high = min(*values, *others, values[0]), max(*values, *others, values[0])
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - margin, high + margin
    steps = [x for x, _ in (*points, *second)]
    first, last = min(steps), max(*steps, min(steps) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    def line(points: Points, ys: Sequence[float], css: str) -> str:
        places = [at(x, y) for (x, _), y in zip(points, ys, strict=True)]
        if len(places) == 1:
            return f'<circle class="dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
        return f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'

    grid = []
    for tick in log_ticks(low, high) if log else ticks(low, high, 5):
        y = at(first, tick)[1]
        label = short(10**tick if log else tick)
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks(first, last, 5):
        x = at(tick, low)[0]
        anchor = "end" if x > _WIDTH - _RIGHT - 20 else "middle"
        grid.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{short(tick)}</text>')
    drawn = line(points, values, "raw" if smooth else "smooth")
    drawn += line(points, smoothed(values, smooth), "smooth") if smooth else ""
    drawn += line(second, others, "second") if second else ""
    label = escape(f"{title} over steps, {'logarithmic' if log else 'linear'} scale")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(grid)}{drawn}</svg>'


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, the last step kept in place."""
    size = math.ceil(len(points) / most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The exponential average over the neighbours of both sides, so that it does not lag behind the values."""
    ways = []
    for way in (values, values[::-1]):
        total, mass, out = 0.0, 0.0, []
        for value in way:
            total, mass = weight * total + value, weight * mass + 1.0
            out.append((total, mass))
        ways.append(out)
    both = zip(ways[0], reversed(ways[1]), values, strict=True)
    return [(t0 + t1 - value) / (m0 + m1 - 1.0) for (t0, m0), (t1, m1), value in both]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents of round numbers between 10^low and 10^high: powers of ten, with 2 and 5 where there are few."""
    powers = [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    if len(powers) >= 3:
        return powers[:: math.ceil(len(powers) / 6)]
    fine = [i + math.log10(m) for i in range(math.floor(low), math.floor(high) + 1) for m in (1, 2, 5)]
    fine = [tick for tick in fine if low <= tick <= high]
    if len(fine) >= 2:
        return fine
    return [math.log10(tick) for tick in ticks(10**low, 10**high, 4) if tick > 0]


def short(value: float) -> str:
    """A number in few characters: 0.013, 250, 1.2k, 3.1e-05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2g}"
    if abs(value) >= 1000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"
