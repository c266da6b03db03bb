"""Folders that commands write into, and what must not be mixed there."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import final

from exactflow.models.pretrained import shipped_model
from exactflow.training.log import LOG_FILE
from exactflow.training.settings import CONFIG_FILE

_MADE = ("samples.json", "samples.png", "trace.png", "inversion.png")
_SINGLE = re.compile(r"seed_(\d+)\.png")


def is_run(folder: Path) -> bool:
    """Whether a training wrote, or writes, into this folder."""
    return any((folder / name).exists() for name in (CONFIG_FILE, LOG_FILE, "checkpoints"))


def check_no_run(out: Path) -> None:
    """Raise ValueError where a model cannot be put, since a run has its own there."""
    run = out.parent if out.name == "model" and is_run(out.parent) else out
    if is_run(run) or (run / "model").is_dir():
        raise ValueError(
            f"{run} is the folder of a run, which has a model of its own: name another folder"
        )


def own_folder(location: str, name: str) -> Path:
    """Where a verb writes about a model: `name` in its run folder, or beside its weights.

    Of a model that ships with the package or is from the hub: in runs/MODEL.
    """
    place = Path(location)
    if not place.is_dir() or shipped_model(location) is not None:
        return Path("runs") / place.name / name
    if place.name == "model" and is_run(place.parent):
        place = place.parent
    return place / name


@final
class SamplesFolder:
    """A folder whose samples are all of one call.

    The default folder of a model has those of its last call; of a folder that somebody named, no
    file of other seeds is removed.

    Args:
        path: the folder.
        seeds: of the samples that are asked for.
        own: whether it is the default folder.

    Raises:
        ValueError: it is not the default folder, and holds samples of other seeds.
    """

    def __init__(self, path: Path, seeds: range, *, own: bool) -> None:
        self.path = path
        others = [file for seed, file in self._present() if seed not in seeds]
        if others and not own:
            raise ValueError(
                f"{path} holds {len(others):,} samples of other seeds, such as {others[0].name}: "
                "whoever reads the folder would take them for these; name another with --out, or "
                "remove them"
            )

    def single(self, seed: int) -> Path:
        """The file of one sample."""
        return self.path / f"seed_{seed:06d}.png"

    def clear(self, kept: Collection[int]) -> None:
        """Remove what an earlier call left and this one does not write: all but `kept` seeds."""
        for name in _MADE:
            (self.path / name).unlink(missing_ok=True)
        for seed, file in self._present():
            if seed not in kept:
                file.unlink()

    def _present(self) -> list[tuple[int, Path]]:
        found = [(_SINGLE.fullmatch(file.name), file) for file in sorted(self.path.glob("seed_*"))]
        return [(int(match[1]), file) for match, file in found if match]
