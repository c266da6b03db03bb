"""Files of tensors from untrusted sources: sizes are checked first, and no code in them is run."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Tensors may share memory (tied weights), but views of one number can expand to more than any
# machine has: all together may take _SHARING times the file's size, or _SMALL bytes.
_SHARING = 8
_SMALL = 2**30


def read_pickled(path: Path) -> Any:
    """The contents of a `torch.save` file: tensors, which stay on disk until used, plain values.

    Raises:
        ValueError: anything else, among it a pickle that asks for more than that, an archive that
            would grow when unpacked, and tensors that stand for far more than the file holds.
        OSError: the file cannot be read.
    """
    require_regular(path)
    packed = zipfile.is_zipfile(path)
    if packed:
        with path.open("rb") as file:
            check_stored(file, path.stat().st_size, path)
    try:
        # A Namespace holds plain values: what a trainer's command line was, beside the weights.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about protocols; the error follows
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed or None)
    except OSError:
        raise
    except Exception as error:  # unpickling foreign bytes can fail in any way
        raise ValueError(
            f"{path} is not a PyTorch file of plain tensors (nothing else is loaded, and nothing "
            f"in it was run): {_reason(error)}"
        ) from error
    check_size(_tensors_in(content), path)
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, which stay on disk until used, and its metadata.

    Raises:
        ValueError: it is no such file, or incomplete.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, file.metadata() or {}
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: it cannot be mapped
        raise ValueError(f"{path} is not a whole file of safetensors: {error}") from error


def require_regular(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless this is a regular file, which has a size."""
    if not path.exists():
        raise FileNotFoundError(f"expected a file of tensors, got {path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of tensors, got a folder, a pipe or a device")


def check_stored(file: Any, size: int, path: Path) -> None:
    """Raise ValueError unless the archive is uncompressed, as PyTorch writes it.

    Args:
        file: the archive, open for reading.
        size: of it, in bytes.
        path: its name in messages.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole archive of PyTorch: {error}") from error
    total = sum(member.file_size for member in members)
    if total > size or any(member.compress_type for member in members):
        raise ValueError(
            f"{path} is not as PyTorch writes it: expected members as they are, got packed ones "
            f"that would grow from {size:,} to {total:,} bytes"
        )


def check_size(tensors: Iterable[Tensor], path: Path) -> None:
    """Raise ValueError where views of little memory stand for far more than the file holds."""
    total = sum(value.numel() * value.element_size() for value in tensors)
    size = path.stat().st_size
    if total > _SHARING * size + _SMALL:
        raise ValueError(
            f"{path}: expected tensors that are in the file, got some that stand for {total:,} "
            f"bytes, in a file of {size:,}"
        )


def _tensors_in(content: Any) -> list[Tensor]:
    """All tensors of nested mappings and lists; each container is entered once."""
    found, left, seen = [], [content], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value
    return found


def _reason(error: Exception) -> str:
    """PyTorch's reason, without its colours and its advice to run the file anyway."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    asked = re.search(r"GLOBAL ([\w.]+)", text)
    if asked:
        return f"it asks for {asked[1]}"
    if "weights_only" in text:
        found = re.search(r"WeightsUnpickler error: (.+)", text)
        return f"it is another kind of pickle{f' ({found[1].strip()[:100]})' if found else ''}"
    first = next(iter(text.splitlines()), "").split(". ")[0]
    return f"{type(error).__name__}{f': {first[:200]}' if first else ''}"
