"""`exactflow plan`."""

from rich.table import Table

from exactflow.cli.arguments import Plan
from exactflow.cli.settings import load_flow
from exactflow.cli.terminal import say
from exactflow.core.model import Flow
from exactflow.core.progress import shown_progress
from exactflow.core.serialization import PLAN_FILE
from exactflow.models.pretrained import shipped_model
from exactflow.nn import compiled
from exactflow.sampling.plan import InversionPlan, keep_plans, read_plans
from exactflow.sampling.planner import make_plan, number_of_blocks


def run(command: Plan) -> None:
    """Measure for every batch size, keep the plans beside the model, and show them."""
    model = load_flow(command.model, command.device)
    assert model.home is not None  # it was loaded from a folder
    if shipped_model(model.home) is not None:
        raise ValueError(
            f"a plan is kept beside its model, and {command.model} lies in the package: save it in "
            f"a folder first, exactflow.from_pretrained({command.model!r}).save_pretrained(FOLDER)"
        )
    if not command.batch_size:
        raise ValueError("expected at least one batch size")
    read_plans(model.home)  # a damaged file is found before the work, not after it
    for size in command.batch_size:
        plan = _measured(model, size, command.tolerance)
        keep_plans(model.home, [plan])
        say(_table(plan))
    say(f"kept in {model.home / PLAN_FILE}: `exactflow sample` goes by it")


def _measured(model: Flow, size: int, tolerance: float | None) -> InversionPlan:
    measured = 0
    with shown_progress(number_of_blocks(model), f"batch {size}", unit="blocks") as advance:

        def report(block: int, blocks: int, what: str) -> None:
            nonlocal measured
            advance(block - measured, f"block {block + 1} of {blocks}: {what}")
            measured = block

        return make_plan(model, size, tolerance=tolerance, progress=report)


def _earned(plan: InversionPlan) -> str:
    """What the plan does not win in a short call."""
    batches = plan.batches_to_earn(compiled.LOADING)
    if batches == 1:
        return ""
    return (
        f"; compiled steps take about {compiled.LOADING:g} s to load, once in a process: a first "
        f"call of fewer than {batches} such batches goes token by token instead"
    )


def _table(plan: InversionPlan) -> Table:
    table = Table(
        title=f"batch {plan.batch_size}: {plan.speedup:.2f} times as fast as token by token",
        caption=f"{plan.machine}, {plan.dtype}, tolerance {plan.tolerance:g}{_earned(plan)}",
    )
    for name in ("block", "chosen", "ms", "ratio", "passes", "tokens", "residual"):
        table.add_column(name, justify="left" if name == "chosen" else "right")
    for index, block in enumerate(plan.blocks, 1):
        found = block.measured[str(block.chosen)]
        table.add_row(
            str(index),
            str(block.chosen),
            f"{1e3 * block.seconds:.1f}",
            f"{block.reference_seconds / block.seconds:.2f}",
            str(found.passes),
            f"{found.tokens:,}",
            f"{found.residual:.0e}",
        )
    return table
