"""Every published preset at its full size: the networks fit the official names and shapes in both directions."""

import json
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from arvis import loading, systems
from arvis.weights import map_shapes

LAYOUTS = Path(__file__).parents[3] / "shared" / "keys"
PRESETS = [
    (slug, name)
    for slug in systems.SYSTEMS
    for name, preset in getattr(systems.system(slug), "PRESETS", {}).items()
    if preset.files
]


@cache
def layouts() -> tuple[dict, ...]:
    """Of all systems: some share a tokenizer."""
    return tuple(json.loads(file.read_text()) for file in sorted(LAYOUTS.glob("*/*.json")))


def plain(name: str) -> str:
    return PurePosixPath(name).stem.replace("-", "_")


def names(layout: dict) -> list[str]:
    """What a file of this layout may be called."""
    files = layout["official_file"] or []
    return [plain(name) for name in (layout["preset"], *([files] if isinstance(files, str) else files))]


@pytest.mark.parametrize(("slug", "name"), PRESETS)
def test_each_part_fits_the_official_file_it_names(slug, name):
    """With the sizes of the preset itself, not those that the layout states."""
    if not (LAYOUTS / slug).is_dir():
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    module = systems.system(slug)
    preset = module.PRESETS[name]
    config = preset.config()
    system = loading.empty(slug, config)
    for part, file in preset.files.items():
        described = [
            layout
            for layout in layouts()
            if layout["hub_repo"] == file.repo
            and (plain(file.name) in names(layout) or (layout["official_file"] is None and layout["preset"] == name))
        ]
        reports = []
        for layout in described:
            shapes = {key: shape for key, (_, shape) in layout["tensors"].items()}
            reports.append(map_shapes(system.parts()[part], module.keys(config)[part], shapes))
        fit = [at for at, report in enumerate(reports) if report.ok and not report.left_out]
        fit = [at for at in fit if not reports[at].kept] or fit  # statistics of another list of scales are kept
        assert len(fit) == 1, f"{file.name}: {[str(report) for report in reports]}"
        assert reports[fit[0]].parameters == described[fit[0]]["parameters"]
