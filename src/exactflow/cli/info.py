"""`exactflow info`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from exactflow import registry
from exactflow.cli.arguments import Info
from exactflow.cli.settings import RunConfig
from exactflow.core.config import override
from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig
from exactflow.hub.pretrained import from_pretrained, read_config
from exactflow.training import TrainConfig


def run(command: Info) -> None:
    """List presets, or describe one thing."""
    if command.name is None:
        _list()
    elif command.name in registry.names():
        _preset(command.name)
    elif Path(command.name).is_dir() or "/" in command.name:
        _model(command.name)
    else:
        registry.preset(command.name)  # raises, with a suggestion


def _list() -> None:
    table = Table(title="presets")
    for name in ("preset", "image", "parameters", "published"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for name in registry.names():
        model = _on_meta(name)
        shape = "x".join(map(str, model.event_shape))
        count = f"{model.num_parameters:,}"
        table.add_row(name, shape, count, registry.preset(name).published)
    Console().print(table)


def _preset(name: str) -> None:
    preset = registry.preset(name)
    model = _on_meta(name)
    print(f"# {name}: {model.num_parameters:,} parameters. {preset.published}".rstrip())
    print("# Every key below can be set: exactflow train", name, "SECTION.FIELD=VALUE")
    sections: dict[str, Any] = {
        "model": preset.config,
        "training": override(TrainConfig(), preset.training),
        "data": override(DataConfig(), preset.data),
        "run": RunConfig(),
    }
    for section, config in sections.items():
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        print(yaml.safe_dump({section: fields}, sort_keys=False, default_flow_style=None), end="")


def _model(location: str) -> None:
    model = from_pretrained(location)
    print(f"# {model.kind}, {model.num_parameters:,} parameters, images {model.event_shape}")
    folder = Path(location)
    nested = folder / "model"
    description = read_config(nested if nested.is_dir() else folder)
    print(yaml.safe_dump(description, sort_keys=False), end="")


def _on_meta(name: str) -> GenerativeModel:
    with torch.device("meta"):
        return registry.build(name)
