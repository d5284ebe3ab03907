"""Frozen dataclasses to plain JSON values and back, strictly, and overrides by dotted name.

A field is a str, int, float, bool, a Literal of those, a tuple, another dataclass, or any of these `| None`. Every
name and every type is checked: an unknown key is refused with the nearest valid one, a wrong value with what was
expected. Nothing is coerced except an int where a float is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that does not fit its dataclass."""


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as JSON values: dicts, lists, str, int, float, bool and None."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a dataclass instance, got {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of `cls` from JSON values; the exact inverse of `to_dict`.

    Raises ConfigError for an unknown or missing key and for a value of another type, naming the dotted path.
    """
    return _build(cls, values, "")


def override(config: T, assignments: Sequence[str]) -> T:
    """A copy of `config` with `name=value` assignments applied in order, as in `["model.depth=20", "lr=1e-3"]`; only
    what they make together has to hold together.

    Names are dotted; the text is read by the field's type: `true`/`false`, numbers, `none` where None is allowed, a
    tuple as `1,2,3` or a JSON list, a whole dataclass as a JSON object.
    """
    changes = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"expected name=value, got {assignment!r}")
        changes.append((name.strip().split("."), text.strip()))
    return _changed(config, changes, "")


def assignments(base: T, config: T) -> tuple[str, ...]:
    """What `override` needs to make `config` of `base`, field by field, as in `("depth=20", "text=none")`."""
    pairs = [(name, getattr(base, name), getattr(config, name)) for name in _types(type(base))]
    return tuple(f"{name}={_spelled(new)}" for name, old, new in pairs if old != new)


def _spelled(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(_plain(value))


def dotted(config: Any, name: str) -> str | None:
    """The dotted name of the first field of that name, here or inside, whose value is not empty; None without one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == name and value:
            return name
        if dataclasses.is_dataclass(value) and (found := dotted(value, name)):
            return f"{field.name}.{found}"
    return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ConfigError(f"a config holds plain data only, got {value!r} of type {type(value).__name__}")


def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _check_name(cls: type, name: str, path: str) -> None:
    names = list(_types(cls))
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {path}{near[0]}?" if near else f"valid names: {', '.join(names)}"
    raise ConfigError(f"unknown option {path}{name} of {cls.__name__}; {hint}")


def _build(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.') or cls.__name__}: expected an object of {cls.__name__}, got {values!r}")
    for name in values:
        _check_name(cls, name, path)
    hints = _types(cls)
    for field in dataclasses.fields(cls):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.init and field.name not in values and not has_default:
            raise ConfigError(f"{path}{field.name} is missing: {cls.__name__} needs a {_spell(hints[field.name])}")
    return cls(**{name: _value(hints[name], value, path + name) for name, value in values.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(_only(hint, path), value, path)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in arguments], n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: expected {_spell(hint)}, got {value!r}{hint_text}")
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path}: expected {_spell(hint)}, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        elif arguments == ((),):
            arguments = ()
        if len(arguments) != len(value):
            raise ConfigError(f"{path}: expected {_spell(hint)}, got {len(value)} values: {value!r}")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_value(argument, item, f"{path}[{i}]") for i, (argument, item) in pairs)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _build(hint, value, path + ".")
    if hint is float and type(value) is int:
        return float(value)
    if hint in (str, int, float, bool):
        if type(value) is hint:
            return value
        raise ConfigError(f"{path}: expected {_spell(hint)}, got {value!r} of type {type(value).__name__}")
    raise ConfigError(f"{path}: a config field cannot be of type {_spell(hint)}")


def _only(hint: Any, path: str) -> Any:
    """The one type of `X | None`."""
    rest = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if len(rest) != 1:
        raise ConfigError(f"{path}: a config field cannot be of type {_spell(hint)}; only X | None is supported")
    return rest[0]


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _changed(config: Any, changes: Sequence[tuple[list[str], str]], path: str) -> Any:
    """A copy with texts at the places of names, each dataclass made once."""
    new: dict[str, Any] = {}
    inside: dict[str, list[tuple[list[str], str]]] = {}
    for (name, *rest), text in changes:
        _check_name(type(config), name, path)
        if rest:
            inside.setdefault(name, []).append((rest, text))
        else:
            new[name] = _parse(_types(type(config))[name], text, path + name)
            inside.pop(name, None)
    for name, deeper in inside.items():
        value = new.get(name, getattr(config, name))
        if not dataclasses.is_dataclass(value):
            shown = ".".join(deeper[0][0])
            raise ConfigError(f"cannot set {path}{name}.{shown}: {path}{name} is {value!r}, which has no fields")
        new[name] = _changed(value, deeper, f"{path}{name}.")
    return dataclasses.replace(config, **new)


def _parse(hint: Any, text: str, path: str) -> Any:
    """The value that `text` spells for a field of type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _parse(_only(hint, path), text, path)
    if origin is tuple:
        words = [part.strip() for part in text.split(",") if part.strip()]
        items = _json(text, path) if text.startswith("[") else words
        if not isinstance(items, list) or any(not isinstance(item, str) for item in items):
            return _value(hint, items, path)
        kinds = arguments[:1] * len(items) if arguments[1:] == (Ellipsis,) else arguments
        if len(kinds) != len(items):
            raise ConfigError(f"{path}: expected {_spell(hint)}, got {len(items)} values: {text!r}")
        pairs = enumerate(zip(kinds, items, strict=True))
        return _value(hint, [_parse(kind, item, f"{path}[{i}]") for i, (kind, item) in pairs], path)
    if dataclasses.is_dataclass(hint):
        return _value(hint, _json(text, path), path)
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        return _value(hint, text, path)
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ConfigError(f"{path}: expected true or false, got {text!r}")
        return words[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ConfigError(f"{path}: expected {_spell(hint)}, got {text!r}") from None
    return _value(hint, text, path)


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: {text!r} is not JSON: {error}") from None
