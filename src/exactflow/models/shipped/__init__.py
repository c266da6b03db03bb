"""Small trained models that come with the package: for each name a folder beside this file.

They are stored in float16, which halves them, and compute in float32 once they are loaded. Where
images come from, how one was trained and what it scores stands in its card: `exactflow info NAME`.
`python -m exactflow.cli.ship` makes them. Nothing is ever written here on use.
"""

import difflib
from pathlib import Path

NAMES: tuple[str, ...] = ("digits", "fashion-mnist", "fashion-mnist-samples", "cifar10")
FOLDER = Path(__file__).resolve().parent
CHECK_FILE = "check.safetensors"  # test images, their classes if any, and nats in float64, seed 0


def no_model(place: str) -> str:
    """The message about a place where there is no model, with the shipped ones one may have meant.

    Args:
        place: as it was typed.
    """
    near = difflib.get_close_matches(place, NAMES, n=1)
    told = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(NAMES) or 'none'}"
    return (
        "expected a model folder, a hub id 'owner/name' or the name of a shipped model, "
        f"got {place!r}: no such folder; {told}"
    )
