"""Text typed by users, on command lines and in YAML files: a field's type decides its meaning.

YAML would guess: `2024` is a number, `no` is false, `010` is 8, `1e-3` is text. Here a plain
scalar stays text, marked as `Typed`, until it is read as the type of a configuration's field.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, final

import yaml

MAX_BYTES = 2**20  # of a settings file
MAX_DEPTH = 16  # of lists and mappings inside one another

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_SPECIAL = re.compile(r"[-+]?\.?(inf|nan)", re.ASCII | re.IGNORECASE)
_WIDEST = 2**63


@final
class Typed(str):
    """Text as it was typed."""

    __slots__ = ()


def is_null(text: str) -> bool:
    """Whether the text means None for a field that may be None."""
    return text in _NULLS


def scalar(hint: type, text: str) -> str | bool | int | float | None:
    """The text as a str, bool, int or float; None if it is no such value.

    Numbers are decimal. A whole number may have an exponent (1e6) and fits into 64 bits.
    """
    if hint is str:
        return str(text)
    if hint is bool:
        return _BOOLS.get(text.lower())
    if hint is float:
        plain = _NUMBER.fullmatch(text) or _SPECIAL.fullmatch(text)
        return float(text.replace(".inf", "inf").replace(".nan", "nan")) if plain else None
    if hint is int and _NUMBER.fullmatch(text):
        number = Decimal(text)
        whole = number.adjusted() < 20 and number == number.to_integral_value()
        return int(number) if whole and abs(number) < _WIDEST else None
    return None


def read_yaml_file(path: Path) -> Any:
    """The contents of a YAML file, as `read_yaml` returns them.

    Raises:
        OSError: it is absent or cannot be read.
        ValueError: it is no file, too large for settings, no UTF-8, or `read_yaml` refuses it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a YAML file, found a folder or a device")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such settings file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: expected a YAML file of at most {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16" if wide else f"byte {content[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path}: expected text in UTF-8, found {found}") from error
    return read_yaml(text, str(path))


def read_yaml(text: str, name: str) -> Any:
    """Mappings, lists and text of one YAML document; None if there is none.

    Plain scalars are `Typed`, quoted ones `str`, and keys are always text.

    Args:
        text: the document.
        name: what to call it in errors.

    Raises:
        ValueError: it is not YAML, or has a key twice, an anchor (a few hundred bytes of anchors
            can expand to gigabytes), a tag, a second document, or deep nesting.
    """
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        return _document(events, name)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{name} is not YAML: {error.problem}{line}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{name} is not YAML: {str(error).splitlines()[0]}") from error


def _document(events: Iterator[yaml.Event], name: str) -> Any:
    next(events)  # the stream's start
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    found = _node(next(events), events, name, 0)
    next(events)  # the document's end
    after = next(events)
    if not isinstance(after, yaml.StreamEndEvent):
        raise ValueError(f"{name}{_line(after)}: expected one YAML document, found a second")
    return found


def _node(event: yaml.Event, events: Iterator[yaml.Event], name: str, depth: int) -> Any:
    """The value that begins with this event."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}{_line(event)}: expected at most {MAX_DEPTH} levels of nesting")
    if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) or event.anchor:
        raise ValueError(f"{name}{_line(event)}: YAML anchors are not read here: write it out")
    if event.tag not in (None, "!"):
        raise ValueError(f"{name}{_line(event)}: YAML tags such as {event.tag} are not read here")
    if isinstance(event, yaml.ScalarEvent):
        return Typed(event.value) if event.style is None else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_node(item, events, name, depth + 1))
        return items
    return _mapping(events, name, depth)


def _mapping(events: Iterator[yaml.Event], name: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while not isinstance(start := next(events), yaml.MappingEndEvent):
        key = _node(start, events, name, depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"{name}{_line(start)}: expected text as a key, got {key!r}")
        if key in found:
            raise ValueError(f"{name}{_line(start)}: the key {str(key)!r} stands here twice")
        found[str(key)] = _node(next(events), events, name, depth + 1)
    return found


def _line(event: yaml.Event) -> str:
    return f", line {event.start_mark.line + 1}"
