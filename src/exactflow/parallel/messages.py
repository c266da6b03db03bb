"""Values and errors sent between processes: pickled, with all tensors on the CPU."""

import copyreg
import io
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor


def pickled(value: Any) -> bytes:
    """A value for another process, which may lack the devices of this one."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {Tensor: _from_cpu}
    pickler.dump(value)
    return content.getvalue()


def unpickled(content: bytes) -> Any:
    """The value that a process of the same program gave to `pickled`."""
    return pickle.loads(content)


@final
@dataclass(frozen=True)
class SentError:
    """An exception for other processes.

    Attributes:
        content: the pickled exception. One that pickle cannot restore (its constructor takes other
            arguments than the message) is sent as the nearest built-in one.
        note: process and traceback.
    """

    content: bytes
    note: str

    @classmethod
    def of(cls, error: Exception, where: str) -> "SentError":
        """The message for `error`, which was raised in process `where`."""
        lines = "".join(traceback.format_exception(error))
        return cls(_as_picklable(error), f"\nIn {where}:\n\n{lines}")

    def error(self) -> Exception:
        """The exception, with the note attached."""
        found = pickle.loads(self.content)
        found.add_note(self.note)
        return found


def _as_picklable(error: Exception) -> bytes:
    """The error pickled, or the nearest built-in one that unpickles unchanged."""
    text = f"{type(error).__name__}: {error}"
    built_in = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    attempts: list[Callable[[], Any]] = [lambda: error]
    attempts += [lambda kind=kind: kind(text) for kind in built_in]
    for attempt in attempts:
        try:
            sent = attempt()
            content = pickle.dumps(sent)
            found = pickle.loads(content)
        except Exception:
            continue
        if type(found) is type(sent) and str(found) == str(sent):
            return content
    return pickle.dumps(Exception(text))


def _from_cpu(tensor: Tensor) -> Any:
    return tensor.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
