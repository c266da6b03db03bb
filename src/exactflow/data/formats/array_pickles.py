"""Reading pickles of arrays and plain values from untrusted files.

A pickle is a program. Here it may call only what builds an array, and its operations are counted
before it is run: each takes a byte or more of the file, and at most about sixty of memory.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, final

import numpy as np

# Operations besides those for the images of a file, which have 192 bytes each at least.
_MOST_OPERATIONS = 2**22
_BYTES_PER_OPERATION = 64

_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
_WIDTH_OF_LENGTH = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_TWO_LINES = ("GLOBAL", "INST")
_MEMOS = ("PUT", "BINPUT", "LONG_BINPUT")


def load_arrays(stream: BufferedReader) -> Any:
    """The content of a pickle.

    Raises:
        UnpicklingError, EOFError, ...: it holds anything but arrays and plain values, is damaged or
            cut short, or would become far larger than its file.
    """
    _check_operations(stream)
    stream.seek(0)
    return _ArraysOnly(stream, encoding="bytes").load()


def _check_operations(stream: BufferedReader) -> None:
    """Raise an error for unknown or too many operations; arguments are skipped."""
    most = _MOST_OPERATIONS + os.fstat(stream.fileno()).st_size // _BYTES_PER_OPERATION
    for done in range(most):
        code = stream.read(1)
        operation = _OPERATIONS.get(code.decode("latin-1"))
        if operation is None:
            raise EOFError("no end") if not code else pickle.UnpicklingError(f"operation {code!r}")
        if operation.name == "STOP":
            return
        argument = operation.arg
        if argument is None:
            continue
        if argument.n == pickletools.UP_TO_NEWLINE:
            value = _line(stream)
            if operation.name in _TWO_LINES:
                _line(stream)
        elif argument.n < 0:
            width = _WIDTH_OF_LENGTH[argument.n]
            stream.seek(int.from_bytes(stream.read(width), "little"), os.SEEK_CUR)
            continue
        else:
            value = stream.read(argument.n)
        if operation.name in _MEMOS:
            # Unpickling reserves space for all numbers below it.
            number = int(value) if operation.name == "PUT" else int.from_bytes(value, "little")
            if number > done:
                raise pickle.UnpicklingError(f"memory for {number} values after {done} operations")
    raise pickle.UnpicklingError(f"more than {most} operations, where arrays need a few")


def _line(stream: BufferedReader) -> bytes:
    """Skip a line; returns its end."""
    while True:
        part = stream.readline(2**16)
        if not part:
            raise EOFError("no end")
        if part.endswith(b"\n"):
            return part


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them in the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Empty bytes in these protocols; `bytes` itself would make zeros from a number."""
    return b""


def _empty_array(kind: str, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The empty array that unpickling starts from; its state, of matching size, is set later."""
    if kind != _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError(f"an array {shape} without values")
    return np.ndarray((0,), dtype=np.int8)


# What the pickle of an array may call, by its names in all versions of NumPy. The class itself may
# only be an argument: a call of it would make an array of any size from a few bytes.
_NDARRAY = "numpy.ndarray"
_frombuffer = np.ndarray((0,)).__reduce_ex__(5)[0]
_scalar = np.uint8(0).__reduce__()[0]
_ADMITTED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{(home, "bytes"): _no_bytes for home in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


@final
class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain values; refuses to load anything else."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}, which no array needs")
        return _ADMITTED[module, name]
