"""Words to commands. Nothing here imports torch: `--help` answers at once."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from exactflow import __version__
from exactflow.cli.arguments import _VERBS

_SETTING = re.compile(r"[A-Za-z_]\w*\.\w*=")
_NEAR = re.compile(r"[A-Za-z_]\w*=")  # a setting whose section was forgotten, or a name


def parsed(words: Sequence[str]) -> tuple[Any, str]:
    """The command that was typed, and the module that carries it out.

    Raises:
        SystemExit: 0 after --help and --version, 2 for words that mean nothing.
    """
    if list(words) == ["--version"]:
        print(f"exactflow {__version__}")
        sys.exit(0)
    words = list(words)
    takes_settings = bool(words) and words[0] in _VERBS and _takes_settings(_VERBS[words[0]][0])
    settings = tuple(word for word in words if _SETTING.match(word))
    if settings and not takes_settings:
        names = [word for word in settings if Path(word).exists()]  # such as `v1.0=x`
        settings = tuple(word for word in settings if word not in names)
        if settings and words[0] in _VERBS:
            _refuse(f"this command takes no settings, got {settings[0]}")
    if takes_settings:
        for before, word in pairwise(words):
            if _NEAR.match(word) and not before.startswith("-") and not Path(word).exists():
                _refuse(f"expected SECTION.FIELD=VALUE, got {word!r}")
    with _plain_if_asked():
        command = tyro.extras.subcommand_cli_from_dict(
            {verb: kind for verb, (kind, _) in _VERBS.items()},
            prog="exactflow",
            description="Image models with a likelihood you can trust. "
            "`exactflow --version` prints the version.",
            args=[word for word in words if word not in settings],
            config=(tyro.conf.OmitArgPrefixes,),
        )
    if settings:
        command = replace(command, settings=settings)
    home = next(home for kind, home in _VERBS.values() if isinstance(command, kind))
    return at_home(command), home


def at_home(command: Any) -> Any:
    """The command with `~` in its paths as the home folder: no shell reads it in `--out=~/x`."""
    changes = {}
    for field in fields(command):
        value = getattr(command, field.name)
        if isinstance(value, Path):
            changes[field.name] = value.expanduser()
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            changes[field.name] = tuple(item.expanduser() for item in value)
        elif field.name in ("model", "models", "name", "source"):
            changes[field.name] = _expanded(value)
    return replace(command, **changes)


def _expanded(value: Any) -> Any:
    """Names of models and sets, of which some are paths."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return os.path.expanduser(value) if value else value


def _takes_settings(kind: type) -> bool:
    return any(field.name == "settings" for field in fields(kind))


@contextmanager
def _plain_if_asked() -> Iterator[None]:
    """tyro knows no NO_COLOR, but a terminal that has no colours."""
    before = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if before is not None:
            os.environ["TERM"] = before
        else:
            os.environ.pop("TERM", None)


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
