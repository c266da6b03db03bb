"""`exactflow convert`."""

from dataclasses import asdict

from exactflow.cli.arguments import Convert
from exactflow.cli.places import check_no_run
from exactflow.cli.terminal import say
from exactflow.cli.words import parse_words
from exactflow.core.config import checked
from exactflow.models.convert import convert

OPTIONS = ("channels", "height", "width", "levels", "noise_std")


def run(command: Convert) -> None:
    """Write the model of a published checkpoint."""
    check_no_run(command.out)
    options = {name: value for name, value in asdict(command).items() if name in OPTIONS}
    hints = {name: value for name, value in options.items() if value is not None}
    words = parse_words(command.settings, ("model",)).get("model", {})
    twice = hints.keys() & words.keys()
    if twice:
        raise ValueError(f"{min(twice)} is given twice, as an option and as a setting")
    hints |= checked(Convert, {name: words.pop(name) for name in OPTIONS if name in words})
    model = convert(command.checkpoint, preset=command.preset, **hints, **words)
    card = {"source": f"converted from {command.checkpoint.name}"}
    model.save_pretrained(command.out, card=card)
    say(
        f"{model.kind} for images {model.event_shape}, {model.num_parameters:,} parameters: "
        f"{command.out}"
    )
