"""What `exactflow info` lists of every preset, read from a file: to build them takes many seconds.

A test holds the file to the presets; `python -m exactflow.cli.preset_table` writes it anew.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from exactflow.core.config import suggestion

TABLE = Path(__file__).with_name("presets.json")


@final
@dataclass(frozen=True)
class Listed:
    """A preset as it is listed.

    Attributes:
        image: its shape, "3x64x64".
        parameters: their number.
        published: what is published of it.
        config: digest of kind and configuration, which the number was counted of.
    """

    image: str
    parameters: int
    published: str
    config: str


def listed() -> dict[str, Listed]:
    """All presets by name, family by family."""
    return {name: Listed(**row) for name, row in json.loads(TABLE.read_text("utf-8")).items()}


def check_preset(name: str, others: Sequence[str] = ()) -> None:
    """Raise ValueError with the nearest names where there is no preset of that name.

    Args:
        name: as it was typed.
        others: names that may be meant as well.
    """
    names = listed()
    if name not in names:
        raise ValueError(f"unknown preset {name!r}{suggestion(name, [*others, *names])}")


def digest(name: str) -> str:
    """Of the kind and the configuration of a preset."""
    from exactflow.models import registry

    kind = registry.family_of(name).model.kind
    return hashlib.sha256(f"{kind} {registry.preset(name).config}".encode()).hexdigest()[:16]


def counted(name: str) -> Listed:
    """A preset as it should be listed, by building it."""
    import torch

    from exactflow.models import registry

    with torch.device("meta"):
        model = registry.build(name)
    shape = "x".join(map(str, model.event_shape))
    return Listed(shape, model.num_parameters, registry.preset(name).published, digest(name))


def write() -> None:
    """Write the file anew; only what has changed is built."""
    from exactflow.models import registry

    before = listed() if TABLE.exists() else {}
    rows = {}
    for name in registry.names():
        known = before.get(name)
        current = known is not None and known.config == digest(name)
        rows[name] = asdict(known if known is not None and current else counted(name))
        rows[name]["published"] = registry.preset(name).published
    TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write()
