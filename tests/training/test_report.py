"""The report: complete, readable without a network, and right about the numbers it draws."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from arvis.training import chart, folder, metrics, report


def _run(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    folder.write(path, {"steps": 200, "lr": 1e-3}, {"precision": "float32 as asked"}, {"system": {"name": "<var>"}})
    for step in range(1, 101):
        metrics.append(path, {"step": step, "loss": 5 / step, "gap": math.sin(step), "bad": math.nan, "lr": 1e-3})
    for step in (10, 50, 100):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(path / "samples" / f"step-{step:08d}.png")
    return path


def test_the_page_stands_alone_and_shows_everything(tmp_path: Path) -> None:
    page = report.write(_run(tmp_path / "run")).read_text()
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            opened.append(tag)
            assert all(not (value or "").startswith(("http", "//")) for name, value in attrs if name in ("src", "href"))

    Checker().feed(page)
    assert opened.count("svg") == 2 + 1 + 2  # loss and lr in two scales, gap cannot be logarithmic
    assert opened.count("img") == 3 and page.index("step-00000100") < page.index("step-00000010")
    assert "system.name" in page and "&lt;var&gt;" in page and "<var>" not in page
    assert "100 of 200" in page and "loss: 0.05 at step 100" in page


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    folder.write(tmp_path, {}, {}, {})
    assert "No metrics yet" in report.write(tmp_path).read_text()


@pytest.mark.parametrize("log", [False, True])
def test_the_line_is_where_the_values_are(log: bool) -> None:
    points = [(1, 1.0), (2, 10.0), (3, 100.0)]
    drawn = ElementTree.fromstring(chart.svg(points, "loss", log, smooth=0.0))
    (line,) = (e for e in drawn if e.tag == "polyline")
    ys = [float(pair.split(",")[1]) for pair in line.attrib["points"].split()]
    assert ys[0] > ys[1] > ys[2]
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(0.5 if log else 9 / 99, abs=2e-3)


@pytest.mark.parametrize("points", [[(5, 2.0)], [(1, 3.0), (2, 3.0)], [(1, 1e-9), (2, 1e9)], [(0, -5.0), (9, 0.0)]])
def test_odd_curves_are_drawn(points: list[tuple[int, float]]) -> None:
    for log in (False, True) if points[0][1] > 0 else (False,):
        text = chart.svg(points, "a & b", log)
        ElementTree.fromstring(text)
        assert "nan" not in text and "inf" not in text and len(re.findall("<text", text)) >= 2


def test_smoothing_and_thinning_keep_level_and_end() -> None:
    assert chart.smoothed([2.0] * 9, 0.9) == pytest.approx([2.0] * 9)
    ramp = [float(i) for i in range(101)]
    assert chart.smoothed(ramp, 0.5)[50] == pytest.approx(50.0)
    thin = chart.thin([(i, float(i)) for i in range(1000)], 100)
    assert len(thin) == 100 and thin[-1] == (999, 994.5)
    assert chart.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and chart.short(5000) == "5k"


def test_metrics_survive_a_torn_line_and_are_cut(tmp_path: Path) -> None:
    for step in range(1, 6):
        metrics.append(tmp_path, {"step": step, "loss": 0.1 * step})
    with open(tmp_path / metrics.NAME, "a") as file:
        file.write('{"step": 6, "loss": 0.')
    metrics.cut(tmp_path, 3)
    assert [json.loads(line)["step"] for line in (tmp_path / metrics.NAME).read_text().splitlines()] == [1, 2, 3]
    assert metrics.read(tmp_path)[2]["loss"] == 0.1 * 3
