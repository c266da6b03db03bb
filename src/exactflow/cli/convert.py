"""`exactflow convert`."""

from rich.console import Console

from exactflow.cli.arguments import Convert
from exactflow.hub.convert import convert


def run(command: Convert) -> None:
    """Write the model of a published checkpoint."""
    model = convert(
        command.checkpoint,
        channels=command.channels,
        height=command.height,
        width=command.width,
        levels=command.levels,
        noise_std=command.noise_std,
    )
    card = {"source": f"converted from {command.checkpoint.name}"}
    model.save_pretrained(command.out, card=card)
    Console().print(
        f"{model.kind} for images {model.event_shape}, {model.num_parameters:,} parameters: "
        f"{command.out}"
    )
