"""Words to commands. Nothing here imports torch: `--help` answers at once."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from exactflow import __version__
from exactflow.cli.arguments import GROUPS, VERBS, Info, Train, verb_of
from exactflow.cli.arguments.shared import TakesSettings
from exactflow.core.config import suggestion

_SETTING = re.compile(r"[A-Za-z_]\w*\.\w*=")
_NEAR = re.compile(r"[A-Za-z_]\w*=")  # a setting whose section was forgotten, or a name
_LOOK = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
_WORDS = {  # what the help says of settings, by the sections that a verb takes
    ("data",): "Words data.FIELD=VALUE say how images are read and split; by default as for the "
    "model's training.",
    ("model", "training", "data", "run"): "Words SECTION.FIELD=VALUE set a field of model, "
    "training, data or run: `exactflow train PRESET --help` lists them.",
    ("data", "protocol"): "Words data.FIELD=VALUE and protocol.FIELD=VALUE change how images are "
    "read and how much is measured.",
    ("model",): "Words model.FIELD=VALUE set a field of the model.",
}


def parsed(words: Sequence[str]) -> Any:
    """The command that was typed. `train PRESET --help` ends in the list that `info PRESET` prints.

    Raises:
        SystemExit: 0 after --help and --version, 2 for words that mean nothing.
    """
    verb, *words = words or [""]
    if verb == "--version":
        print(f"exactflow {__version__}")
        sys.exit(0)
    if verb in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if verb not in VERBS:
        _refuse(f"unknown verb {verb!r}{suggestion(verb, VERBS)}" if verb else _overview())
    kind = VERBS[verb]
    settings = _settings(words, kind)
    rest = [word for word in words if word not in settings]
    helped = not {"-h", "--help"}.isdisjoint(rest)
    try:
        command = _typed(kind, ["--help"] if helped else rest)
    except SystemExit:
        preset = next((word for word in rest if not word.startswith("-")), None)
        if kind is not Train or preset is None or not helped:
            raise
        print()
        command = Info(name=preset)  # after the help, what can be set
    return _at_home(replace(command, settings=settings) if settings else command)


def _overview() -> str:
    """What `exactflow --help` prints."""
    lines = [
        "usage: exactflow VERB [OPTIONS]",
        "",
        "Image models with a likelihood you can trust.",
        "`exactflow VERB --help` lists a verb's options, `exactflow --version` the version.",
    ]
    for group, kinds in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {verb_of(k):<12} {(k.__doc__ or '').splitlines()[0]}" for k in kinds]
    return "\n".join(lines)


def _settings(words: Sequence[str], kind: type) -> tuple[str, ...]:
    """The words that are settings."""
    found = tuple(word for word in words if _SETTING.match(word))
    if not issubclass(kind, TakesSettings):
        found = tuple(word for word in found if not Path(word).exists())  # such as `v1.0=x`
        if found:
            _refuse(f"this command takes no settings, got {found[0]}")
        return found
    for before, word in pairwise([verb_of(kind), *words]):
        if word in found or not _NEAR.match(word):
            continue
        if not before.startswith("-") and not Path(word).exists():
            _refuse(f"expected SECTION.FIELD=VALUE, got {word!r}")
    return found


def _typed(kind: type, words: Sequence[str]) -> Any:
    """The arguments in these words, by tyro; which knows no NO_COLOR, but a plain terminal."""
    description = cleandoc(kind.__doc__ or "")
    if issubclass(kind, TakesSettings):
        description += f"\n\n{_WORDS[kind.sections]}"
    before = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        prog = f"exactflow {verb_of(kind)}"
        return tyro.cli(kind, prog=prog, description=description, args=words, config=_LOOK)
    finally:
        if before is not None:
            os.environ["TERM"] = before
        else:
            os.environ.pop("TERM", None)


def _at_home(command: Any) -> Any:
    """The command with `~` in its paths as the home folder: no shell reads it in `--out=~/x`."""
    found = {field.name: getattr(command, field.name) for field in fields(command)}
    return replace(command, **{name: _expanded(value, name) for name, value in found.items()})


def _expanded(value: Any, name: str) -> Any:
    """The value of a field, if it is a path or may be one: models and sets have names too."""
    if isinstance(value, tuple):
        return tuple(_expanded(item, name) for item in value)
    if isinstance(value, Path):
        return value.expanduser()
    named = isinstance(value, str) and name in ("model", "models", "name", "source")
    return os.path.expanduser(value) if named else value


def _refuse(reason: str) -> None:
    print(f"error: {reason}" if "\n" not in reason else reason, file=sys.stderr)
    sys.exit(2)
