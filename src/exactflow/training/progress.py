"""What a run passes to its callbacks, and returns at its end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from exactflow.core.model import GenerativeModel


@final
@dataclass(frozen=True)
class Progress:
    """The state of a run, for its callbacks.

    Attributes:
        step: optimizer steps done.
        images_seen: step times batch size.
        seconds: wall-clock time of the run so far, in all its sessions.
        step_seconds: the part of it that optimizer steps took, without callbacks and files.
        model: in eval mode, with the averaged weights where there is an average; a callback must
            not change it.
        folder: of the run, with its log so far.
        end: ends the run after this step when called; the run then counts as finished.
    """

    step: int
    images_seen: int
    seconds: float
    step_seconds: float
    model: GenerativeModel
    folder: Path
    end: Callable[[], None]


@final
@dataclass(frozen=True)
class FitResult:
    """The state of a run at its end; attributes as in `Progress`.

    Attributes:
        checkpoint: folder of the last checkpoint.
        metrics: last line of the log.
    """

    step: int
    images_seen: int
    seconds: float
    step_seconds: float
    checkpoint: Path
    metrics: Mapping[str, Any]


Callback = Callable[[Progress], Mapping[str, float] | None]


def with_metrics(line: Mapping[str, Any], metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """A line of the log with the numbers of a callback. Raises ValueError for a repeated name."""
    found = metrics or {}
    taken = found.keys() & line.keys()
    if taken:
        raise ValueError(f"two metrics are called {', '.join(sorted(taken))}")
    return {**line, **{name: float(value) for name, value in found.items()}}
