"""Journals: files with a line of JSON for each finished part of a long job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Entry = TypeVar("_Entry")


def read_journal(file: Path, parse: Callable[[Any], _Entry]) -> list[_Entry]:
    """The entries of a journal, which is made if it is missing.

    The file is cut off at the first line that is incomplete, as after a kill, or that `parse`
    refuses with a ValueError, KeyError or TypeError.
    """
    file.touch()
    entries: list[_Entry] = []
    end = 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            entries.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    os.truncate(file, end)
    return entries
