"""Files that are whole or absent, and JSON of bounded depth. Nothing here imports torch."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_DEPTH = 32  # levels, at most, of files read and written; the library's own have 8
JSON_BYTES = 64 * 2**20


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one that names `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or leave the old one: a temporary name, fsync, then a rename.

    Raises:
        OSError: it could not be written; the error names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained_write(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; see `parse_json`.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():  # pipes and devices need not have an end
        raise ValueError(f"{path}: expected a JSON file, got a folder, a pipe or a device")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(
            f"{path}: expected a JSON file of at most {JSON_BYTES:,} bytes, "
            f"got {path.stat().st_size:,}"
        )
    return parse_json(path.read_bytes(), path, constant=_refuse_constant)


def parse_json(
    text: str | bytes, where: object, *, constant: Callable[[str], float] = float
) -> dict[str, Any]:
    """A mapping from JSON of bounded depth, so that recursive functions can process it.

    Args:
        text: JSON.
        where: its source, for messages.
        constant: reads NaN and Infinity, which are not JSON though Python writes them.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{where}: expected JSON {JSON_DEPTH} levels deep at most") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    level, depth = [value], 0
    while level:
        if depth == JSON_DEPTH:
            raise ValueError(f"{where}: expected JSON {JSON_DEPTH} levels deep at most, got more")
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [v for values in inside for v in values if isinstance(v, dict | list)]
        depth += 1
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON. Raises ValueError for a number that JSON does not know."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The text of `write_json`. Raises ValueError for a number that JSON does not know."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def json_hash(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """fsync a folder: the names of its files are on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """The value with None for infinity and NaN, which JSON lacks, at any depth."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
