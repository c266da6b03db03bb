"""Tensors that several processes wrote together: PyTorch's distributed checkpoints, read safely.

    tensors/.metadata         the layout: names, shapes, file and offset of each part
            __RANK_N.distcp   the parts, each as `torch.save` writes a tensor

PyTorch stores the layout as a pickle, and a pickle is a program. This reader knows only the few
classes that a layout consists of, and replaces them by stand-ins that do nothing but keep their
fields; the real layout is built from these fields after all of them are checked.
"""

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from exactflow.core.tensor_files import check_stored

LAYOUT_FILE = ".metadata"
_LAYOUT_BYTES = 2**28
_PART = re.compile(r"__\d+_\d+\.distcp")
_DIMENSIONS = 16
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_STAND_INS = {  # module -> names of classes that are replaced
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


def read_layout(folder: Path) -> Any:
    """The layout of a folder of tensors, as `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        ValueError: it is something else; nothing in it was run.
        OSError: it cannot be read.
    """
    path = folder / LAYOUT_FILE
    if not path.is_file() or path.stat().st_size > _LAYOUT_BYTES:
        raise ValueError(f"{path}: expected a file of at most {_LAYOUT_BYTES:,} bytes")
    try:
        return _layout(_LayoutOnly(io.BytesIO(path.read_bytes())).load(), folder)
    except OSError:
        raise
    except Exception as error:  # foreign bytes can fail in any way
        raise ValueError(
            f"{path}: expected the layout of tensors and nothing else, got {error}; "
            "nothing in it was run"
        ) from error


def load_split(tensors: dict[str, Tensor], folder: Path, layout: Any, *, alone: bool) -> None:
    """Fill tensors, whole or split, with those of the same names in a folder.

    Args:
        tensors: filled in place.
        folder: holds the parts.
        layout: of it, see `read_layout`.
        alone: this process reads all by itself; else all processes call this alike.

    Raises:
        ValueError: a tensor is absent, or of another shape, or a part is damaged.
        OSError: a part cannot be read.
    """
    from torch.distributed import checkpoint as dcp  # takes seconds to import
    from torch.distributed.checkpoint.api import CheckpointException

    for name, value in tensors.items():
        described = layout.state_dict_metadata.get(name)
        found = "none" if described is None else f"one of shape {tuple(described.size)}"
        if described is None or described.size != value.shape:
            raise ValueError(
                f"{folder}: expected a tensor {name} of shape {tuple(value.shape)}, got {found}"
            )

    @final
    class Reader(dcp.FileSystemReader):
        """PyTorch's own, which would run the pickle, but with the layout that was checked."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return layout

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked
            dcp.load(tensors, storage_reader=Reader(folder), no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError):
            raise first from error
        raise ValueError(f"{folder} is damaged: {first}") from error


@final
class _LayoutOnly(pickle.Unpickler):
    """Unpickle layouts; refuse every class or function that is not part of one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # New classes for each pickle, which can set their attributes.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): _stand_in(name)
            for module, names in _STAND_INS.items()
            for name in names
        }
        self._known["torch", "Size"] = tuple

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise ValueError(f"a program that asks for {module}.{name}")


def _stand_in(name: str) -> type:
    """A class of that name whose objects keep their arguments or state, and do nothing."""

    def make(self: Any, *arguments: Any) -> None:
        self.state = arguments

    def fill(self: Any, state: Any) -> None:
        self.state = state

    return type(name, (), {"__init__": make, "__setstate__": fill})


@final
class _Slice(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _layout(found: Any, folder: Path) -> Any:
    """The real layout. Raises ValueError, KeyError or TypeError for a malformed one."""
    from torch.distributed.checkpoint import metadata as real
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    fields = _state(found, "Metadata")
    entries: dict[str, Any] = {}
    for name, entry in _mapping(fields["state_dict_metadata"]).items():
        described = _state(entry, "TensorStorageMetadata")
        dtype = _state(described["properties"], "TensorProperties")[0]
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a tensor {name!r:.80} of type {dtype!r:.80}")
        chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in described["chunks"]]
        entries[name] = real.TensorStorageMetadata(
            properties=real.TensorProperties(dtype=dtype),
            size=_size(described["size"]),
            chunks=[
                real.ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"]))
                for chunk in chunks
            ],
        )
    places: dict[Any, Any] = {}
    for index, place in _mapping(fields["storage_data"]).items():
        at, where = _state(index, "MetadataIndex"), _state(place, "_StorageInfo")
        part, offset, length = (where[key] for key in ("relative_path", "offset", "length"))
        if at["fqn"] not in entries or not _PART.fullmatch(part):
            raise ValueError(f"a part {part!r:.80} of {at['fqn']!r:.80}")
        if where.get("transform_descriptors"):
            raise ValueError(f"a part that is packed: {part}")
        _check_part(folder / part, _count(offset), _count(length))
        hint = at.get("index")
        key = real.MetadataIndex(
            at["fqn"], _size(at["offset"]), None if hint is None else _count(hint)
        )
        places[key] = _StorageInfo(part, offset, length)
    return real.Metadata(entries, storage_data=places, storage_meta=real.StorageMeta())


def _check_part(path: Path, offset: int, length: int) -> None:
    if not path.is_file() or offset + length > path.stat().st_size:
        raise ValueError(f"{length:,} bytes at {offset:,} of {path.name}, which has no such bytes")
    with path.open("rb") as file:
        check_stored(io.BufferedReader(_Slice(file, offset, length)), length, path)


def _state(value: Any, name: str) -> Any:
    """The state of a stand-in for the class of that name."""
    if type(value).__name__ != name:
        raise ValueError(f"{type(value).__name__} in place of {name}")
    return value.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} in place of a mapping")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or len(value) > _DIMENSIONS:
        raise ValueError(f"{value!r:.80} in place of a shape")
    return torch.Size([_count(number) for number in value])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.80} in place of a number of bytes or rows")
    return value
