"""Measurements kept as soon as they are known, so that a killed evaluation goes on where it was.

Every measurement has a name and an identity: all that its numbers depend on. What a folder holds of
the same identity is read; of another one, it is measured again.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from rich.progress import Progress

from exactflow.core.serialization import write_atomically

Arrays = dict[str, np.ndarray]


@final
@dataclass(frozen=True)
class Stages:
    """The measurements of one model.

    Attributes:
        folder: where they are kept.
        identity: what all of them depend on, JSON-able.
        progress: show bars.
    """

    folder: Path
    identity: Mapping[str, Any]
    progress: bool = False

    def keep(
        self, name: str, identity: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What `measure` returns, JSON-able, from now or from before."""
        whole = self._whole(identity)
        path = self.folder / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["identity"] == whole:
                return kept["result"]
        result = _plain(measure())
        self._write(path, json.dumps({"identity": whole, "result": result}, indent=1).encode())
        return result

    def collect(
        self,
        name: str,
        identity: Mapping[str, Any],
        count: int,
        size: int,
        measure: Callable[[range], Arrays],
    ) -> Arrays:
        """Arrays of `count` rows measured `size` at a time, each part kept; joined on their axis 0.

        Args:
            name: of a folder of parts.
            identity: what the rows depend on, besides what all measurements do.
            count: rows in all.
            size: rows of a part.
            measure: arrays of the rows of a range; an array may have one row for the whole part.
        """
        folder, whole = self.folder / name, self._whole({**identity, "rows of a part": size})
        known = folder / "identity.json"
        if not known.is_file() or json.loads(known.read_text()) != whole:
            shutil.rmtree(folder, ignore_errors=True)
            self._write(known, json.dumps(whole, indent=1).encode())
        parts = []
        with Progress(transient=True, disable=not self.progress) as bar:
            for start in bar.track(range(0, count, size), description=name):
                rows = range(start, min(start + size, count))
                path = folder / f"{rows.start:08d}-{rows.stop:08d}.npz"
                if not path.is_file():
                    buffer = io.BytesIO()
                    arrays: dict[str, Any] = measure(rows)
                    np.savez(buffer, **arrays)
                    self._write(path, buffer.getvalue())
                with np.load(path) as part:
                    parts.append(dict(part))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _whole(self, identity: Mapping[str, Any]) -> Any:
        return _plain({**self.identity, **identity})

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
