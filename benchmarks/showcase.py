"""Samples of two compared models side by side, class by class, with what a sample costs.

`python benchmarks/showcase.py FOLDER OUT.png MODEL MODEL`: FOLDER is what `exactflow compare`
wrote, the models are two of its names. The samples are the first ones of each class.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from exactflow.core.files import write_atomically
from exactflow.pictures.figures import in_style, new_figure, png_of
from exactflow.pictures.grids import grid

CLASSES = 10
EACH = 5  # of a class


def sheet(folder: Path, name: str) -> torch.Tensor:
    """The first samples of each class, a column for each; classes were drawn in turn."""
    parts = sorted((folder / "models" / name / "samples").glob("*.npz"))
    return torch.from_numpy(np.concatenate([np.load(part)["images"] for part in parts]))[
        : CLASSES * EACH
    ]


@in_style()
def main() -> None:
    """Write the picture."""
    folder, out, *names = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    report = json.loads((folder / "report.json").read_text())
    found = {result["name"]: result for result in report["results"]}
    figure = new_figure(11, 3.2)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        samples, training = found[name]["samples"], found[name]["training"]
        image = grid(sheet(folder, name), report.get("levels", 256), CLASSES)
        axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(
            f"{name}\n{training['step_seconds']:.0f} s of training, "
            f"{1000 * samples['seconds_per_sample']:.1f} ms per sample, "
            f"FD {samples['frechet']:.1f}"
        )
    write_atomically(out, png_of(figure))


if __name__ == "__main__":
    main()
