"""What verbs that read a model and images open, and what they leave: one way for all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from exactflow.cli.arguments import verb_of
from exactflow.cli.arguments.shared import OfImages
from exactflow.cli.places import own_folder
from exactflow.cli.settings import data_of, load_model, some
from exactflow.core.files import finite, write_atomically, write_json
from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig, ImageDataset, Split, load
from exactflow.metrics.bits_per_dim import check_fits
from exactflow.training.folder import check_apart

Model = TypeVar("Model", bound=GenerativeModel)


@final
@dataclass(frozen=True)
class Opened(Generic[Model]):
    """A model, its data, and the folder that a verb writes.

    Attributes:
        model: on its device.
        data: where its images are.
        verb: name of the files that are written.
        out: folder to write, not yet made.
    """

    model: Model
    data: DataConfig
    verb: str
    out: Path

    def images(self, split: Split, most: int | None = None) -> ImageDataset:
        """A split, or at most so many images of it. Raises ValueError if the model is of others."""
        dataset = load(self.data, split) if most is None else some(self.data, split, most)
        check_fits(self.model, dataset)
        return dataset

    def write(self, numbers: Mapping[str, Any], picture: bytes | None = None) -> None:
        """Write VERB.json, and VERB.png if there is a picture."""
        self.out.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            write_atomically(self.out / f"{self.verb}.png", picture)
        write_json(self.out / f"{self.verb}.json", finite(numbers))


def opened(command: OfImages, expected: Callable[[GenerativeModel], Model]) -> Opened[Model]:
    """Load the model of a command, and find its data and the folder to write.

    Args:
        command: what was typed.
        expected: returns the model, or raises ValueError for one that the verb cannot take.

    Raises:
        ValueError: the folder is among the images that are read; see also `data_of`.
    """
    verb = verb_of(type(command))
    model = expected(load_model(command.model, command.device))
    data = data_of(model, command.model, command.settings)
    out = command.out or own_folder(command.model, verb)
    check_apart(out, data)
    return Opened(model, data, verb, out)
