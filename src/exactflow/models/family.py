"""What the library knows of a kind of model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from exactflow.core.model import GenerativeModel
from exactflow.models.foreign import PublishedFiles
from exactflow.models.presets import Preset


@final
@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        model: its class; `kind` is the family's name.
        config: the class of its configuration.
        presets: by name.
        files: how published files are read; None where there are none.
    """

    model: type[GenerativeModel]
    config: type
    presets: Mapping[str, Preset]
    files: PublishedFiles | None = None
