"""Keep measurements in files as they are made, so that an evaluation that was killed can resume.

Every measurement has a name and an identity: all facts that its numbers depend on. A file of the
same name and identity is read; one of another identity is replaced.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.core.files import parse_json, write_atomically
from exactflow.core.progress import tracked
from exactflow.parallel.process_group import current

Arrays = dict[str, np.ndarray]


@final
@dataclass(frozen=True)
class Memo:
    """The kept measurements of one model.

    Attributes:
        folder: of the files.
        identity: facts that all measurements depend on, JSON-able.
        progress: show bars.
    """

    folder: Path
    identity: Mapping[str, Any]
    progress: bool = False

    def keep(
        self,
        name: str,
        identity: Mapping[str, Any],
        measure: Callable[[], Mapping[str, Any]],
        *,
        together: bool = False,
    ) -> dict[str, Any]:
        """Return the kept result, or that of `measure`, JSON-able, which is then kept.

        The main process measures alone, or all processes do it `together`.
        """
        whole = self._whole(identity)
        path, group = self.folder / f"{name}.json", current()

        def known() -> dict[str, Any] | None:
            kept = parse_json(path.read_bytes(), path) if path.is_file() else {}
            return kept["result"] if kept.get("identity") == whole else None

        def measured() -> dict[str, Any]:
            result = _plain(found or measure())
            content = json.dumps({"identity": whole, "result": result}, indent=1)
            self._write(path, content.encode())
            return result

        before = group.on_main(known)
        found = measure() if before is None and together else None
        return group.on_main(measured) if before is None else before

    def collect(
        self,
        name: str,
        identity: Mapping[str, Any],
        count: int,
        size: int,
        measure: Callable[[range], Arrays],
    ) -> Arrays:
        """Arrays of `count` rows, measured `size` at a time, joined along axis 0; parts are kept.

        Processes that work together share the parts.

        Args:
            name: of a folder of parts.
            identity: further facts that the rows depend on.
            count: rows in all.
            size: rows of a part.
            measure: arrays of the rows of a range; an array may have one row for the whole part.
        """
        folder, whole = self.folder / name, self._whole({**identity, "rows of a part": size})
        known = folder / "identity.json"

        def begin() -> None:
            if not known.is_file() or parse_json(known.read_bytes(), known) != whole:
                shutil.rmtree(folder, ignore_errors=True)
                self._write(known, json.dumps(whole, indent=1).encode())

        def part(start: int) -> Arrays:
            rows = range(start, min(start + size, count))
            path = folder / f"{rows.start:08d}-{rows.stop:08d}.npz"
            if not path.is_file():
                buffer = io.BytesIO()
                arrays: dict[str, Any] = measure(rows)
                np.savez(buffer, **arrays)
                self._write(path, buffer.getvalue())
            with np.load(path) as kept:
                return dict(kept)

        group = current()
        group.on_main(begin)
        starts = range(0, count, size)
        shown = partial(tracked, total=len(starts), title=name, shown=self.progress)
        parts = group.spread(starts, part, shown=shown)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _whole(self, identity: Mapping[str, Any]) -> Any:
        return _plain({**self.identity, **identity})

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def _plain(value: Any) -> Any:
    """The value as it is read back from JSON."""
    return json.loads(json.dumps(value))
