"""The texts agree with the code: the table of systems, links, the commands that are shown."""

import ast
import re
import shlex
import tomllib
from functools import wraps
from pathlib import Path

import pytest

import arvis
from arvis import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_the_readme_lists_every_system():
    rows = re.findall(r"^\| ([\w-]+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: title for name, title in rows if name != "name"} == arvis.list_systems()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_texts_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_texts_is_one(page, monkeypatch):
    """Each takes the words and options that are shown with it; nothing is run."""
    taken = []

    def noted(command):
        return wraps(command)(lambda *words, **options: taken.append((words, options)))

    monkeypatch.setattr(cli, "COMMANDS", {name: noted(command) for name, command in cli.COMMANDS.items()})
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith("arvis ") and line != "arvis --version"]
    for line in lines:
        cli.main(shlex.split(line, comments=True)[1:])
    assert len(taken) == len(lines)


def test_every_make_target_that_is_shown_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert shown and shown <= targets


def test_no_dependency_brings_torchvision():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(p for group in project["optional-dependencies"].values() for p in group)]
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in pins
    for name in (
        "torchvision",
        "torchaudio",
        "timm",
        "lpips",
        "open_clip_torch",
        "torch-fidelity",
        "clean-fid",
        "litdata",
    ):
        assert name not in pins and not any(re.match(rf"{name}\b", need) for need in named)


def test_the_development_environment_is_pinned():
    """Each package that the development extra names has its exact version in the constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert len(pinned) == len([line for line in lines if not line.startswith("#")])
    extras = project["optional-dependencies"]
    for need in [*project["dependencies"], *extras["dev"], *extras["serve"]]:
        name = re.split(r"[\[>=]", need)[0].lower().replace("_", "-")
        assert name == "arvis" or name in pinned, f"{need} is not pinned; run `make pins`"
