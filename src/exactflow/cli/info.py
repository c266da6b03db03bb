"""`exactflow info`."""

from dataclasses import asdict
from pathlib import Path

import yaml

from exactflow.cli.arguments import Info
from exactflow.cli.cost import on_meta
from exactflow.cli.settings import resolve
from exactflow.core.config import SECTIONS
from exactflow.core.files import finite
from exactflow.models import registry, shipped
from exactflow.models.pretrained import from_pretrained
from exactflow.training.settings import Settings


def run(command: Info) -> None:
    """Describe a preset or a saved model."""
    name = command.name
    if name is None and command.config is None:
        raise ValueError("expected a preset, or --config FILE that names one")
    elif name is not None and name not in registry.names():
        _saved(command, name)
    else:
        _preset(resolve(name, command.settings, command.config, reads_data=False))


def _preset(settings: Settings) -> None:
    name, model = settings.preset, on_meta(settings)
    published = registry.preset(name).published
    print(f"# {name}: {model.num_parameters:,} parameters. {published}".rstrip())
    print("# Every key below can be set: exactflow train", name, "SECTION.FIELD=VALUE")
    described = settings.describe()
    for section in SECTIONS:
        fields = {section: described[section]}
        print(yaml.safe_dump(fields, sort_keys=False, default_flow_style=None), end="")


def _saved(command: Info, name: str) -> None:
    if not (Path(name).is_dir() or "/" in name or name in shipped.NAMES):
        registry.preset(name)  # raises, with a suggestion
    if command.settings or command.config:
        raise ValueError(f"settings are those of a preset, {name} is a saved model")
    model = from_pretrained(name)
    print(f"# {model.kind}, {model.num_parameters:,} parameters, images {model.event_shape}")
    described = {"kind": model.kind, "config": asdict(model.config), "card": dict(model.card)}
    print(yaml.safe_dump(finite(described), sort_keys=False), end="")
