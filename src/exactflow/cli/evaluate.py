"""`exactflow evaluate`."""

import json
import sys

from rich.console import Console
from rich.table import Table

from exactflow.cli.arguments import Evaluate
from exactflow.cli.settings import data_of, load_flow
from exactflow.cli.train import likelihood_row
from exactflow.core.serialization import write_atomically
from exactflow.data import load
from exactflow.evaluation.bits_per_dim import evaluate


def run(command: Evaluate) -> None:
    """Score a split and print the number with everything it depends on."""
    model = load_flow(command.model, command.device)
    dataset = load(data_of(command.model, command.settings), command.split)
    evaluation = evaluate(
        model,
        dataset,
        k=command.k,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=sys.stderr.isatty(),
    )
    result = evaluation.describe()
    table = Table(title=f"{command.model} on {dataset.id}, {command.split}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row(*likelihood_row(evaluation, command.split))
    for name in ("kind", "k", "levels", "dequantization", "images"):
        table.add_row(name, str(result[name]))
    table.add_row("images/s", f"{result['images_per_second']:.1f}")
    table.add_row("data version", dataset.version)
    table.add_row("preprocessing", dataset.preprocessing)
    table.add_row("fingerprint", dataset.fingerprint[:16])
    Console().print(table)
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        per_image = {"nats_per_image": evaluation.likelihood.nats.tolist()}
        text = json.dumps({"model": command.model, **result, **per_image}, indent=2)
        write_atomically(command.out, (text + "\n").encode())
