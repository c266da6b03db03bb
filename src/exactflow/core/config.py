"""Frozen configurations changed by name: strict, with a suggestion for what is misspelt."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from exactflow.core.typed_text import Typed, is_null, read_yaml, scalar

Config = TypeVar("Config")

SECTIONS = ("model", "training", "data", "run")  # of the configuration of a run
TYPED = "typed"  # section of a run's config.yaml: paths of the data as they were given


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A frozen dataclass with some fields changed.

    Args:
        config: an instance.
        changes: new values; as JSON writes them, lists become tuples and whole numbers floats;
            `Typed` text becomes a value of the field's type.

    Raises:
        ValueError: an unknown field, with a suggestion, or a value of the wrong type.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"expected a configuration, got {config!r}")
    return dataclasses.replace(config, **checked(type(config), changes))


def made(config: type[Config], fields: Any, where: object, *, complete: bool = False) -> Config:
    """A dataclass from the fields that a file has.

    Args:
        config: the dataclass, which is the file's schema.
        fields: as JSON or YAML gave them.
        where: source of the fields, for messages.
        complete: whether fields with defaults are required too.

    Raises:
        ValueError: a field is absent, unknown or of another type.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected named fields, got {fields!r:.80}")
    assert dataclasses.is_dataclass(config)
    needed = [
        field.name
        for field in dataclasses.fields(config)
        if complete or field.default is field.default_factory is dataclasses.MISSING
    ]
    absent = [name for name in needed if name not in fields]
    if absent:
        raise ValueError(f"{where}: expected {', '.join(absent)}, got none")
    try:
        return config(**checked(config, fields))
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:  # of fields' own checks
        raise ValueError(f"{where}: {error}") from error


def checked(config: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with values of the types that dataclass `config` declares; errors as above."""
    hints = typing.get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"unknown field {name!r} of {config.__name__}{suggestion(name, known)}"
            )
    return {name: _as(hints[name], v, f"{config.__name__}.{name}") for name, v in fields.items()}


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(choices)}"


def _as(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, converted only where nothing is lost."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        null = value is None or (isinstance(value, Typed) and is_null(value))
        if null and type(None) in arguments:
            return None
        plain = [argument for argument in arguments if argument is not type(None)]
        return _as(plain[0], value, name)
    if origin is typing.Literal:
        if value not in arguments:
            choices = " | ".join(map(repr, arguments))
            near = suggestion(str(value), [str(a) for a in arguments]).partition(";")[2]
            raise ValueError(f"{name}: expected {choices}, got {value!r};{near}")
        return str(value) if isinstance(value, Typed) else value
    if origin is tuple:
        if isinstance(value, Typed):
            value = read_yaml(value, f"{name}={value}")
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list of values, got {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise ValueError(f"{name}: expected {len(arguments)} values, got {value!r}")
        return tuple(_as(a, v, name) for a, v in zip(arguments, value, strict=True))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}: expected named values, got {value!r:.80}")
        return {key: _as(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**1024:
            raise ValueError(f"{name}: expected float, got a number of {len(str(value))} digits")
        return float(value)
    if isinstance(value, Typed):
        meant = scalar(hint, value)
        if meant is None:
            raise ValueError(f"{name}: expected {hint.__name__}, got {value!r}")
        return meant
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    ):
        raise ValueError(f"{name}: expected {hint.__name__}, got {value!r}")
    return value
