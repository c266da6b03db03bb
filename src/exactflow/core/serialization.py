"""A model on disk: config.json with its `kind`, model.safetensors, and README.md, the card."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
PLAN_FILE = "plan.json"  # fast solvers for this model on this machine; void for other weights
CLASS_NAMES = "class names"  # in the card: of the classes 0, 1, ...
GUIDANCE = "guidance"  # in the card: scale that samples are meant to be drawn with
FORMAT_VERSION = 1
JSON_DEPTH = 32  # levels, at most, of files read and written; the library's own have 8
JSON_BYTES = 64 * 2**20
_NEW = ".new"


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
    write_atomically(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
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


def write_model(
    model: nn.Module, kind: str, config: Any, folder: Path, card: Mapping[str, Any]
) -> None:
    """Write `model` into `folder`; see `GenerativeModel.save_pretrained`."""
    description = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "card": dict(card),
    }
    _check_plain(description["config"], "config", JSON_DEPTH - 2)
    _check_plain(description["card"], "card", JSON_DEPTH - 2)
    count = sum(p.numel() for p in model.parameters())
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    files = {
        CONFIG_FILE: _json_bytes(description),
        CARD_FILE: _card_text(kind, count, description).encode(),
        WEIGHTS_FILE: save(state, metadata={"format": "pt"}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace_together(folder, files)


def file_of(folder: Path, name: str) -> Path:
    """Path of a file of a model's folder, even if the process replacing it was killed.

    New files are written into a folder beside the old ones. Renaming that folder to `_NEW` makes
    them valid; then they are moved over the old ones one by one.
    """
    new = folder / _NEW / name
    return new if new.exists() else folder / name


def _replace_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace some files of a folder: all of them, or none. Raises OSError."""
    _finish(folder)
    begun = folder / f"{_NEW}.partial"
    try:
        with explained_write(begun):
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
        for name, content in files.items():
            write_atomically(begun / name, content)
        with explained_write(folder):
            (folder / PLAN_FILE).unlink(missing_ok=True)
            sync_folder(begun)
            begun.rename(folder / _NEW)
            sync_folder(folder)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    _finish(folder)


def _finish(folder: Path) -> None:
    """Move the files of `_NEW`, if there are any, over the old ones. Raises OSError."""
    new = folder / _NEW
    if not new.is_dir():
        return
    with explained_write(folder):
        for path in sorted(new.iterdir()):
            path.replace(folder / path.name)
        new.rmdir()


def _check_plain(value: Any, name: str, depth: int) -> None:
    """Raise ValueError, naming the part, unless JSON can hold a value and give it back."""
    if isinstance(value, Mapping | list | tuple) and depth == 0:
        raise ValueError(f"{name}: expected at most {JSON_DEPTH} levels of nesting, got more")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"{name}: expected text for keys, got {key!r:.80}")
            _check_plain(item, f"{name}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]", depth - 1)
    elif not (value is None or isinstance(value, str | int | float)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(
            f"{name}: expected what JSON knows (text, finite numbers, true, false, null, lists and "
            f"mappings), got {value!r:.80} of type {type(value).__name__}; nothing was written"
        )


def _card_text(kind: str, parameters: int, description: Mapping[str, Any]) -> str:
    lines = [
        "---",
        "library_name: exactflow",
        f"tags: [{kind}, normalizing-flow, image-generation]",
        "---",
        f"# A {kind} model ({parameters:,} parameters)",
        "",
        "Load with `exactflow.from_pretrained(path)`.",
    ]
    for title, content in [("Configuration", description["config"]), *description["card"].items()]:
        lines += ["", f"## {str(title).capitalize()}", ""]
        if isinstance(content, Mapping):
            lines += ["| field | value |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in content.items()]
        else:
            lines.append(str(content))
    return "\n".join(lines) + "\n"
