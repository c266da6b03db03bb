"""Words and files that set things, by section and field. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exactflow.core.config import SECTIONS, TYPED, suggestion
from exactflow.core.typed_text import Typed, read_yaml_file


def read_file(path: Path) -> dict[str, Any]:
    """A YAML file's sections; a path of the data is the recorded one, or as typed if only that is.

    Raises:
        OSError: it cannot be read.
        ValueError: anything else, naming file and key.
    """
    content = read_yaml_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping with {', '.join(('preset', *SECTIONS))}")
    for name, section in content.items():
        if name not in ("preset", *SECTIONS, TYPED):
            raise ValueError(f"{path}: unknown section {name!r}{suggestion(name, SECTIONS)}")
        if name == "preset" and not isinstance(section, str):
            raise ValueError(f"{path}: expected a preset's name, got {section!r}")
        if name != "preset" and not isinstance(section, dict):
            raise ValueError(f"{path}: expected a mapping under {name!r}, got {section!r}")
    for name, typed in content.pop(TYPED, {}).items():
        recorded = content.get("data", {}).get(name)
        if not _exists(recorded) and _exists(typed):  # project moved as a whole, say
            content.setdefault("data", {})[name] = typed
    return content


def _exists(path: object) -> bool:
    return isinstance(path, str) and Path(path.removeprefix("hub:")).expanduser().exists()


def parse_words(words: Sequence[str], sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """`section.field=value` words; its field will say what a value means.

    Raises:
        ValueError: for other words.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot or section not in sections:
            near = suggestion(section, sections)
            raise ValueError(f"expected SECTION.FIELD=VALUE, got {word!r}{near}")
        changes.setdefault(section, {})[name] = Typed(text)
    return changes


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put the sections of `changes` over those of `base`, field by field."""
    for section, fields in changes.items():
        base[section] = {**base.get(section, {}), **fields}
