"""`exactflow info`."""

from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from exactflow import registry
from exactflow.cli import cost
from exactflow.cli.arguments import Info
from exactflow.cli.settings import SECTIONS, Settings, resolve
from exactflow.core.serialization import finite
from exactflow.hub.pretrained import describe, from_pretrained


def run(command: Info) -> None:
    """List presets, describe one thing, or say what its training costs."""
    name = command.name
    if name is None and command.config is None:
        if command.settings or cost.is_asked(command):
            raise ValueError("expected a preset, or --config FILE that names one")
        _list()
    elif name is not None and name not in registry.names():
        _saved(command, name)
    else:
        settings = resolve(name, command.settings, command.config, reads_data=False)
        if cost.is_asked(command):
            cost.show(command, settings)
        else:
            _preset(settings)


def _list() -> None:
    table = Table(title="presets")
    for name in ("preset", "image", "parameters", "published"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for name in registry.names():
        with torch.device("meta"):
            model = registry.build(name)
        shape = "x".join(map(str, model.event_shape))
        count = f"{model.num_parameters:,}"
        table.add_row(name, shape, count, registry.preset(name).published)
    Console().print(table)


def _preset(settings: Settings) -> None:
    name, model = settings.preset, cost.on_meta(settings)
    published = registry.preset(name).published
    print(f"# {name}: {model.num_parameters:,} parameters. {published}".rstrip())
    print("# Every key below can be set: exactflow train", name, "SECTION.FIELD=VALUE")
    described = settings.describe()
    for section in SECTIONS:
        fields = {section: described[section]}
        print(yaml.safe_dump(fields, sort_keys=False, default_flow_style=None), end="")


def _saved(command: Info, name: str) -> None:
    if not (Path(name).is_dir() or "/" in name):
        registry.preset(name)  # raises, with a suggestion
    if command.settings or command.config or cost.is_asked(command):
        raise ValueError(f"costs and settings are those of a preset, {name} is a saved model")
    model = from_pretrained(name)
    print(f"# {model.kind}, {model.num_parameters:,} parameters, images {model.event_shape}")
    print(yaml.safe_dump(finite(describe(model)), sort_keys=False), end="")
