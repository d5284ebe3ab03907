"""Every published preset at its full size: the networks fit the official names and shapes in both directions."""

import json
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


def layouts(slug: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((LAYOUTS / slug).glob("*.json"))]


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
        stem = PurePosixPath(file.name).stem.replace("-", "_")
        described = [
            layout
            for layout in layouts(slug)
            if stem in (layout["preset"], PurePosixPath(str(layout["official_file"])).stem.replace("-", "_"))
        ]
        reports = []
        for layout in described:
            shapes = {key: shape for key, (_, shape) in layout["tensors"].items()}
            reports.append(map_shapes(system.parts()[part], module.keys(config)[part], shapes))
        fit = [at for at, report in enumerate(reports) if report.ok and not (report.left_out or report.kept)]
        assert len(fit) == 1, f"{file.name}: {[str(report) for report in reports]}"
        assert (
            described[fit[0]]["hub_repo"] == file.repo and reports[fit[0]].parameters == described[fit[0]]["parameters"]
        )
