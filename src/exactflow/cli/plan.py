"""`exactflow plan`."""

from rich.table import Table

from exactflow.cli.arguments import Plan
from exactflow.cli.settings import load_flow
from exactflow.cli.terminal import say
from exactflow.core.serialization import PLAN_FILE
from exactflow.models.pretrained import located, shipped_model
from exactflow.nn import compiled
from exactflow.sampling.plan import InversionPlan, keep_plans, read_plans
from exactflow.sampling.planner import plan


def run(command: Plan) -> None:
    """Measure for every batch size, keep the plans beside the model, and show them."""
    if shipped_model(command.model) is not None:
        raise ValueError(
            f"a plan is kept beside its model, and {command.model} lies in the package: save it in "
            f"a folder first, exactflow.from_pretrained({command.model!r}).save_pretrained(FOLDER)"
        )
    if not command.batch_size:
        raise ValueError("expected at least one batch size")
    folder = located(command.model)
    read_plans(folder)  # a damaged file is found before the work, not after it
    model = load_flow(command.model, command.device)
    for size in command.batch_size:
        found = plan(model, size, tolerance=command.tolerance, progress=True)
        keep_plans(folder, [found])
        say(_table(found))
    say(f"kept in {folder / PLAN_FILE}: `exactflow sample` goes by it")


def _earned(found: InversionPlan) -> str:
    """What the plan does not win in a short call."""
    batches = found.batches_to_earn(compiled.LOADING)
    if batches == 1:
        return ""
    return (
        f"; compiled steps take about {compiled.LOADING:g} s to load, once in a process: a first "
        f"call of fewer than {batches} such batches goes token by token instead"
    )


def _table(found: InversionPlan) -> Table:
    table = Table(
        title=f"batch {found.batch_size}: {found.speedup:.2f} times as fast as token by token",
        caption=f"{found.machine}, {found.dtype}, tolerance {found.tolerance:g}{_earned(found)}",
    )
    for name in ("block", "chosen", "ms", "ratio", "passes", "tokens", "residual"):
        table.add_column(name, justify="left" if name == "chosen" else "right")
    for index, block in enumerate(found.blocks, 1):
        seen = block.measured[str(block.chosen)]
        table.add_row(
            str(index),
            str(block.chosen),
            f"{1e3 * block.seconds:.1f}",
            f"{block.reference_seconds / block.seconds:.2f}",
            str(seen.passes),
            f"{seen.tokens:,}",
            f"{seen.residual:.0e}",
        )
    return table
