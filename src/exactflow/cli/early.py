"""What needs no torch: errors that can be seen at once, lists, and published results."""

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from exactflow.cli import results
from exactflow.cli.arguments import Compare, Cost, Info, Results, Train
from exactflow.cli.arguments.shared import TakesSettings
from exactflow.cli.preset_table import check_preset, listed
from exactflow.cli.terminal import say
from exactflow.cli.words import parse_words, read_file
from exactflow.models import shipped


def answered(command: Any) -> bool:
    """Whether the command is done already, since it needs no torch.

    Raises:
        ValueError: words, a settings file or a preset's name that mean nothing.
        FileNotFoundError: no such model or settings file.
    """
    given = vars(command)
    if isinstance(command, TakesSettings):
        parse_words(command.settings, command.sections)
    if given.get("config") is not None:
        read_file(given["config"])
    if "model" in given:
        _check_model(given["model"])
    if isinstance(command, Train | Cost) and command.preset is not None:
        check_preset(command.preset)
    names = command.models if isinstance(command, Compare) else ()
    for name in (command.name,) if isinstance(command, Info) and command.name else names:
        if not (Path(name).exists() or "/" in name or name in shipped.NAMES):
            check_preset(name, shipped.NAMES)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if command == Info() and alone:
        _list()
        return True
    if isinstance(command, Results) and alone:
        results.run(command)
        return True
    return False


def _check_model(text: str) -> None:
    """What `from_pretrained` says of a place that holds no model, without loading anything."""
    if Path(text).exists() or text in shipped.NAMES:
        return
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(shipped.no_model(text))


def _list() -> None:
    table = Table(title="presets")
    for name in ("preset", "image", "parameters", "published"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for name, row in listed().items():
        table.add_row(name, row.image, f"{row.parameters:,}", row.published)
    say(table)
    if shipped.NAMES:
        say(f"trained models in this package: {', '.join(shipped.NAMES)}")
