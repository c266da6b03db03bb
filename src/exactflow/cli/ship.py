"""`python -m exactflow.cli.ship RUN NAME`: a finished run as a model that ships with the package.

Writes models/shipped/NAME: the weights in float16, a card with what is measured of these weights on
the test split, and some test images with their likelihoods, which tests hold the model to.
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from exactflow import __version__
from exactflow.cli.settings import resolve, some
from exactflow.core.files import finite, write_atomically
from exactflow.core.model import GenerativeModel
from exactflow.core.serialization import GUIDANCE, WEIGHTS_FILE
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.data.config import BUILT_IN, is_path
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics.bits_per_dim import evaluate, with_labels
from exactflow.models import registry, shipped
from exactflow.models.pretrained import READING, from_pretrained
from exactflow.training.settings import CONFIG_FILE, Settings

IMAGES = 8  # kept with their likelihoods
UNKNOWN = "FOLDER"  # in place of a path of the machine that trained
# of the data, by their id: what may be shipped must be known
LICENCES = {
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
    "fashion-mnist": "MIT (Zalando SE)",
    "cifar10-jpeg": "none stated by its authors (Krizhevsky 2009); a JPEG copy, for research",
}


def ship(
    run: Path,
    name: str,
    *,
    samples: Mapping[str, Any] | None = None,
    images: int | None = None,
    threads: int | None = None,
) -> Path:
    """Put a run's model into the package, and return its folder.

    Args:
        run: folder that `exactflow train` wrote; its data must be found where they were.
        name: of the model from then on; to be listed in `shipped.NAMES`.
        samples: what was measured of samples, for the card.
        images: at most so many of the test split are scored; all by default.
        threads: that the training took, where its card does not tell.

    Raises:
        ValueError: the run has not ended, nobody tells its threads, the licence of its data is not
            known, or a weight is larger than float16 can hold.
    """
    settings = resolve(None, (), run / CONFIG_FILE)
    model = from_pretrained(run)
    told = model.card
    data, cost = told.get("training data"), told.get("cost")
    if data is None or cost is None:
        raise ValueError(f"{run}: expected a finished run of `exactflow train`")
    if threads is None and "threads" not in cost:
        raise ValueError(f"{run} does not say on how many threads it was trained: give --threads")
    if data["id"] not in LICENCES:
        raise ValueError(f"expected data of known licence, {list(LICENCES)}, got {data['id']!r}")
    folder = shipped.FOLDER / name
    _halve(model)
    model.save_pretrained(folder)
    test = some(settings.data, "test", images) if images else load(settings.data, "test")
    scored = from_pretrained(folder)  # as its users have it
    card = {
        "training data": {**data, "licence": LICENCES[data["id"]]},
        READING: reading(settings.data, data["id"]),
        "training": {"command": command(settings, data["id"]), "threads": threads, **cost},
        "test": finite(evaluate(scored, test, progress=True).describe()),
        **({"samples": dict(samples)} if samples else {}),
        GUIDANCE: told.get(GUIDANCE, 0.0),
        "weights": {
            "sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
            "stored": "float16",
            "computed": "float32",
        },
        "made": {
            "date": date.today().isoformat(),
            "exactflow": __version__,
            "torch": torch.__version__,
        },
    }
    model.save_pretrained(folder, card=card)  # the same weights
    write_atomically(folder / shipped.CHECK_FILE, save(check(scored.double(), test)))
    return folder


def reading(data: DataConfig, id: str) -> dict[str, Any]:
    """The fields that differ from the defaults, without paths; and the source if it has a name.

    Args:
        data: how the images were read.
        id: of the set.
    """
    default = asdict(DataConfig())
    local = {"source", "validation", "cache_dir", "cache_gib"}
    fields = {n: v for n, v in asdict(data).items() if n not in local and v != default[n]}
    source = _named(data.source, id)
    return fields if source == UNKNOWN else {"source": source, **fields}


def command(settings: Settings, id: str) -> str:
    """What trains such a model anew: the preset, and every field that differs from it.

    Args:
        settings: of the run.
        id: of its data.
    """
    plain = resolve(settings.preset, (), None, reads_data=False).describe()
    plain["data"]["source"] = registry.preset(settings.preset).data.get("source")
    asked, data = settings.describe(), settings.data
    asked["data"] |= {
        "source": _named(data.source, id),
        "validation": data.validation and UNKNOWN,
        "cache_dir": None,
    }
    words = [
        f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section in ("model", "training", "data")
        for name, value in asked[section].items()
        if value != plain[section][name]
    ]
    return shlex.join(["exactflow", "train", settings.preset, *words])


def check(model: GenerativeModel, test: ImageDataset) -> dict[str, Tensor]:
    """The first test images, their classes if the model has any, and nats by the model's type."""
    images, label = with_labels(model, test, slice(IMAGES))
    nats = log_likelihood(model, images, label, seed=0).nats
    found = {"images": images, "nats": nats}
    return found if label is None else {**found, "label": label}


def _named(source: str, id: str) -> str:
    """The source under a name that other machines know."""
    if not is_path(source):
        return source
    return id if id in BUILT_IN else UNKNOWN


def _halve(model: GenerativeModel) -> None:
    """Round what is float32 to float16."""
    state = {
        name: value.half() if value.dtype == torch.float32 else value
        for name, value in model.state_dict().items()
    }
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"expected weights that float16 can hold, got larger ones in {name}")
    model.load_state_dict(state, assign=True)


def main() -> None:
    """Read the words, and say what was made."""
    parser = argparse.ArgumentParser(prog="exactflow.cli.ship", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished training")
    parser.add_argument("name", metavar="NAME", help="of the model in the package")
    parser.add_argument(
        "--fd", nargs=2, metavar=("NUMBER", "HOW"), help="Frechet distance, and how it was measured"
    )
    parser.add_argument("--threads", type=int, help="of the training, where RUN does not tell")
    parser.add_argument("--images", type=int, help="score at most so many test images")
    given = parser.parse_args()
    samples = given.fd and {"frechet_distance": float(given.fd[0]), "how": given.fd[1]}
    folder = ship(
        given.run, given.name, samples=samples, images=given.images, threads=given.threads
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    card = from_pretrained(folder).card
    print(json.dumps(card, indent=2))
    print(f"{folder}: {size:,} bytes; to be listed in {shipped.__file__}")


if __name__ == "__main__":
    main()
