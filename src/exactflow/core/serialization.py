"""A model on disk: config.json with its `kind`, model.safetensors, and README.md, the card."""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from exactflow.core.files import (
    JSON_DEPTH,
    explained_write,
    json_bytes,
    sync_folder,
    write_atomically,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
PLAN_FILE = "plan.json"  # fast solvers for this model on this machine; void for other weights
CLASS_NAMES = "class names"  # in the card: of the classes 0, 1, ...
GUIDANCE = "guidance"  # in the card: scale that samples are meant to be drawn with
FORMAT_VERSION = 1
_NEW = ".new"


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
        CONFIG_FILE: json_bytes(description),
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
