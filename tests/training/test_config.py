"""A stub that ignores names, types or nesting fails here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from arvis.config import ConfigError, assignments, from_dict, override, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 2
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: float = 1e-3
    on: bool = False
    kind: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    inner: Inner = Inner()
    maybe: Inner | None = None
    limit: float | None = None
    list: tuple[Inner, ...] = ()


def test_round_trip_through_json_is_the_identity() -> None:
    config = Outer(name="a", maybe=Inner(depth=5, sizes=()), list=(Inner(), Inner(depth=7)), limit=2.5)
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_an_int_becomes_a_float_and_nothing_else_is_coerced() -> None:
    assert type(from_dict(Outer, {"name": "a", "rate": 1}).rate) is float
    for bad in (
        {"name": 3},
        {"name": "a", "rate": "1"},
        {"name": "a", "on": 1},
        {"name": "a", "inner": {"depth": 2.0}},
    ):
        with pytest.raises(ConfigError):
            from_dict(Outer, bad)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "ratee": 1.0}, ("ratee", "did you mean rate?")),
        ({"name": "a", "inner": {"deph": 1}}, ("inner.deph", "did you mean inner.depth?")),
        ({"name": "a", "inner": {"depth": True}}, ("inner.depth", "True", "int")),
        ({"name": "a", "kind": "cosin"}, ("kind", "cosin", "did you mean cosine?")),
        ({"name": "a", "betas": [0.9]}, ("betas", "1 values")),
        ({"name": "a", "list": [{"sizes": [1, "x"]}]}, ("list[0].sizes[1]", "'x'")),
        ({"name": "a", "inner": 3}, ("inner", "3")),
        ({}, ("name", "missing")),
    ],
)
def test_errors_name_the_path_the_value_and_the_way_out(values: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_override_reads_text_by_the_type_of_the_field() -> None:
    config = override(
        Outer(name="a"),
        [
            "name=3",
            "rate=1e-4",
            "on=true",
            "inner.depth=9",
            "inner.sizes=4,5,6",
            "betas=[0.5, 0.9]",
            "limit=none",
            'maybe={"depth": 4}',
            "maybe.depth=6",
        ],
    )
    assert config == Outer(
        name="3", rate=1e-4, on=True, inner=Inner(depth=9, sizes=(4, 5, 6)), betas=(0.5, 0.9), maybe=Inner(depth=6)
    )
    assert type(config.name) is str


@dataclass(frozen=True)
class Either:
    """Of the two exactly one is there."""

    left: Inner | None = None
    right: str | None = None

    def __post_init__(self) -> None:
        if (self.left is None) == (self.right is None):
            raise ValueError(f"exactly one of left and right, got {self}")


@dataclass(frozen=True)
class Whole:
    either: Either
    place: Path


def test_assignments_are_what_override_needs() -> None:
    old = Outer(name="a")
    new = Outer(
        name="b = c", rate=1e-4, on=not old.on, inner=Inner(sizes=(4, 5)), betas=(0.5, 0.25), maybe=Inner(depth=4)
    )
    for base, config in ((old, new), (new, old), (Either(left=Inner()), Either(right="x")), (old, old)):
        needed = assignments(base, config)
        assert override(base, needed) == config and (needed == ()) == (base == config)
    assert "name=b = c" in assignments(old, new) and "maybe=none" in assignments(new, old)


def test_only_what_assignments_make_together_has_to_hold() -> None:
    assert override(Either(left=Inner()), ["left=none", "right=x"]) == Either(right="x")
    whole = Whole(either=Either(left=Inner()), place=Path("a"))
    changed = override(whole, ["either.left=none", "either.right=y", "either.right=x"])
    assert changed == Whole(either=Either(right="x"), place=Path("a")), "what is not named may be anything"
    with pytest.raises(ValueError, match="exactly one of left and right"):
        override(Either(left=Inner()), ["right=x"])


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("rate", "name=value"),
        ("rates=1", "did you mean rate?"),
        ("inner.depht=1", "did you mean inner.depth?"),
        ("inner.depth=two", "'two'"),
        ("maybe.depth=1", "None"),
        ("rate.x=1", "has no fields"),
        ("on=maybe", "true or false"),
        ("betas=1", "1 values"),
    ],
)
def test_override_refuses_what_does_not_fit(assignment: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        override(Outer(name="a"), [assignment])
