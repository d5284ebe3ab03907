"""The rooms of the house: a file imports only from rooms above its own, and shared code names no system.

Each rule is tried on a small false house first, so that a rule that sees nothing fails here.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import arvis

ROOMS = (
    ("config", "tokens", "noise", "rows", "orders"),
    ("nn",),
    ("diffusion", "denoise", "sampling", "dist", "reveal", "state"),
    ("quant", "tokenizers"),
    ("next_token", "walk", "search", "speculative", "editing"),
    ("published", "weights"),
    ("training", "data", "evaluation", "rewards"),
    ("systems",),
    ("cost", "loading", "model", "recipes", "parity", "laws", "checks", "doctor"),
    ("serving", "cli"),
)
"""From the top of the house to its bottom; inside a room, too, a file imports only from those named before it."""

FLOOR = {name: at for at, name in enumerate(itertools.chain(*ROOMS))}
ORDINARY = {"brush", "code", "liquid", "star", "var"}
"""Systems whose names are ordinary words: as names in Python they mean nothing, as whole strings they do."""
ELSEWHERE = {"code"}
"""Of these, the ones that are ordinary as strings, too (the key of an error in JSON)."""
BESIDE = {"parity", "checks"}
"""Rooms with one file per system, which may import and name its own."""


class Import(NamedTuple):
    target: str
    line: int
    kind: str  # "top", "inside" a function, or for "types" alone


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of the files of a package, a folder's `__init__` by the folder's name."""
    out = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """The modules of the package that a file imports, wherever it does."""
    package = name.partition(".")[0]
    inside_of = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, kind: str) -> Iterator[Import]:
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = inside_of.split(".")[: len(inside_of.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            targets = [full if full in known else base for full in whole]
        for target in dict.fromkeys(targets):
            if target.partition(".")[0] == package:
                yield Import(target, node.lineno, kind)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "inside"
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from visit(child, "types")
            for child in node.orelse:
                yield from visit(child, kind)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, kind)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "top")


def room(name: str) -> str:
    """The room of a module: the first name below the package, or "" for the package itself."""
    return [*name.split("."), ""][1]


def system_beside(name: str) -> str:
    """The system whose file a module of the rooms BESIDE is, with _ for -, or ""."""
    return name.split(".")[2] if room(name) in BESIDE and name.count(".") == 2 else ""


def wrong_imports(root: Path) -> list[str]:
    """Every import from a room that is not above the file's own; files in no room; systems with wrong bases."""
    known, faults = modules(root), []
    bases: dict[str, dict[str, int]] = {}
    for name, path in known.items():
        own = room(name)
        if own and own not in FLOOR:
            faults.append(f"{name}: the room {own} has no place in ROOMS")
            continue
        for target, line, _ in imports(name, path, known):
            other, where = room(target), f"{name}:{line}"
            if not other or not own:
                continue
            if other not in FLOOR or (other != own and FLOOR[other] >= FLOOR[own]):
                faults.append(f"{where} imports {target}, which is not above {own}")
            elif other == "systems" and target.count(".") > 1:
                if system_beside(name) == target.split(".")[2]:
                    continue
                if own != "systems" or name.count(".") == 1:
                    faults.append(f"{where} imports {target}: shared code names no system; use the registry")
                elif target != name:
                    bases.setdefault(name, {}).setdefault(target, line)
    for name, found in bases.items():
        if len(found) > 1:
            faults.append(f"{name} has {len(found)} base systems, {', '.join(found)}; one is allowed")
        for base, line in found.items():
            if base in bases:
                faults.append(f"{name}:{line} imports {base}, which has a base system itself; one level is allowed")
    return faults


def cycles(root: Path) -> list[str]:
    """Modules that import each other while they are being imported."""
    known = modules(root)
    graph = {
        n: {i.target for i in imports(n, p, known) if i.kind == "top" and i.target in known} for n, p in known.items()
    }
    faults, done = [], set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            faults.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name] - {name}):
                walk(target, [*trail, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return faults


def named_systems(root: Path, slugs: set[str]) -> list[str]:
    """Where code outside systems/ names a system: as a whole string (or a preset of it), or in a name of Python.

    Docstrings may cite. A system whose name is an ordinary word counts in strings only.
    """
    faults = []
    for name, path in modules(root).items():
        if room(name) == "systems":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                hits = {s for s in slugs - ELSEWHERE if re.fullmatch(rf"(.*\bsystems\.)?{s}(-[\w.]+)*", node.value)}
            else:
                words = {word.lower() for given in _given(node) for word in _words(given)}
                hits = {s for s in slugs - ORDINARY if {s.replace("-", "_"), s.replace("-", "")} & words}
            if hits and system_beside(name).replace("_", "-") not in hits:  # a hyphen may be all that tells two apart
                faults.append(f"{name}:{node.lineno} names the system {min(hits)}")
    return faults


def _given(node: ast.AST) -> list[str]:
    """Names that a piece of code gives or uses."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.keyword(arg=str(name)):
            return [name]
    return []


def _words(name: str) -> set[str]:
    """`load_FlexVARConfig` -> the whole, load, FlexVARConfig, and every run of its humps: flexvar, ..."""
    parts = [part for dotted in name.split(".") for part in dotted.split("_") if part]
    humps = [re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", part) for part in parts]
    runs = {"".join(h[i:j]) for h in humps for i in range(len(h)) for j in range(i + 1, len(h) + 1)}
    joined = {"_".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return runs | joined | set(parts)


# -- the rules, on a false house ------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """A package from file names and their text."""

    def build(**files: str) -> Path:
        root = tmp_path / "arvis"
        for name, text in {"__init__": "", **files}.items():
            path = root / f"{name.replace('__init__', 'INIT').replace('__', '/').replace('INIT', '__init__')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        return root

    return build


GOOD = {
    "tokens": "import torch",
    "noise": "from arvis.tokens import NEVER",
    "nn__cache": "from arvis import noise\nfrom .block import Block",
    "nn__block": '"""As in infinity (arXiv 2412.04431)."""',
    "tokenizers__grid": "from arvis.quant.vq import VQ",
    "quant__vq": "from ..nn import cache",
    "systems__var": "from arvis.nn.cache import Cache",
    "systems__hmar": "from arvis.systems.var import VAR\nfrom arvis.systems import var",
    "parity__hmar": "from arvis.systems.hmar import HMAR\nHMAR('hmar-d16')",
    "model": "from arvis.systems import SYSTEMS\nvariance = x.var()\nstar = code = 'starry'",
}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("tokens", "from arvis.noise import Noise", "arvis.tokens:1 imports arvis.noise, which is not above tokens"),
        ("nn__block", "def f():\n    import arvis.dist", "arvis.nn.block:2 imports arvis.dist, which is not above nn"),
        ("quant__vq", "from ..tokenizers import grid", "imports arvis.tokenizers.grid, which is not above quant"),
        ("noise", "if TYPE_CHECKING:\n    from arvis import model", "arvis.noise:2 imports arvis.model"),
        ("tokens", "from arvis.elsewhere import x", "imports arvis.elsewhere, which is not above tokens"),
        ("utils", "", "the room utils has no place in ROOMS"),
        (
            "model",
            "from arvis.systems import var",
            "arvis.model:1 imports arvis.systems.var: shared code names no system",
        ),
        ("parity__hmar", "import arvis.systems.var", "arvis.parity.hmar:1 imports arvis.systems.var: shared"),
        ("systems____init__", "from arvis.systems.var import VAR", "arvis.systems:1 imports arvis.systems.var: shared"),
        ("systems__flexvar", "import arvis.systems.hmar", "imports arvis.systems.hmar, which has a base system itself"),
        ("systems__x", "import arvis.systems.a\nimport arvis.systems.var", "arvis.systems.x has 2 base systems"),
    ],
)
def test_a_wrong_import_is_seen(house, name, text, told):
    good = {n: t for n, t in GOOD.items() if n != name}
    assert wrong_imports(house(**good)) == []
    faults = wrong_imports(house(**{name: text}))
    assert len(faults) == 1 and told in faults[0]


def test_a_cycle_is_seen(house):
    assert cycles(house(**GOOD)) == []
    lazy = "def f():\n    from arvis.nn import cache\nif TYPE_CHECKING:\n    from arvis.nn import cache"
    assert cycles(house(nn__block=lazy)) == []
    found = cycles(house(nn__block="from arvis.nn.cache import Cache"))
    assert found == ["arvis.nn.block -> arvis.nn.cache -> arvis.nn.block"]


@pytest.mark.parametrize(
    "text",
    [
        'if name == "var": pass',
        'preset = "var-d16"',
        "x = import_module('arvis.systems.var')",
        'x = {"self-forcing-pp": 1}',
        "def load_infinity(): pass",
        "class FlexVARCache: pass",
        "f(hmar=True)",
        "x = config.is_hmar",
        "def f(self_forcing_pp): pass",
    ],
)
def test_a_named_system_is_seen(house, text):
    slugs = {"var", "code", "infinity", "flexvar", "hmar", "self-forcing-pp", "mar", "star"}
    assert named_systems(house(**GOOD), slugs) == []
    assert len(named_systems(house(walk=text), slugs)) == 1


# -- the real house -------------------------------------------------------------------------------------------------

ROOT = Path(arvis.__file__).parent


def test_every_file_imports_from_above():
    assert len(modules(ROOT)) > 30, "the test looks at the wrong folder"
    assert wrong_imports(ROOT) == []


def test_no_import_cycles():
    assert cycles(ROOT) == []


def test_shared_code_names_no_system():
    assert named_systems(ROOT, set(arvis.list_systems())) == []


def test_every_system_is_registered():
    files = {path.stem.replace("_", "-") for path in (ROOT / "systems").glob("[!_]*.py")}
    assert files == set(arvis.list_systems())


def test_no_file_is_a_drawer():
    drawers = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert [name for name in modules(ROOT) if drawers & set(name.split("."))] == []
