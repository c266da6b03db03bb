"""Every recipe is checked as far as possible without its data and devices."""

import re
import shlex
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from torch.distributed.run import get_args_parser

from exactflow.cli import main, running
from exactflow.cli.settings import resolve
from exactflow.cli.words import read_file
from exactflow.models import registry
from exactflow.training import TrainConfig
from exactflow.training.cost import TrainingCost, training_cost
from exactflow.training.settings import Settings

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
HEADER = ["Recipe", "Reproduces", "Data", "Hardware", "Launch", "Slurm", "Predict", "Cost"]
GIB = 2**30
LARGEST_DEVICE = 80 * GIB
PUBLISHED_PARAMETERS = {
    "tarflow-imagenet64-2-768-8-8-uniform": 460_142_784,
    "tarflow-imagenet64-2-768-8-8-0.05-unconditional": 460_142_784,
    "tarflow-imagenet64-2-768-8-8-0.05": 466_286_784,
    "tarflow-imagenet64-4-1024-8-8-0.05": 817_636_096,
    "tarflow-imagenet128-4-1024-8-8-0.15": 823_927_552,
    "tarflow-afhq256-8-768-8-8-0.07": 463_481_856,
    "denseflow-74-10-cifar10": 130_647_294,
    "denseflow-74-10-imagenet32": 130_647_294,
    "denseflow-74-10-imagenet64": 130_647_294,
    "denseflow-74-10-celeba64": 130_647_294,
    "macow-cifar10-variational": 38_403_423,
    "macow-imagenet64-variational": 123_100_393,
    "flow-matching-paper-cifar10": 171_268_099,  # if it resamples by residual blocks
    "flow-matching-paper-imagenet32": 228_149_507,
    "flow-matching-paper-imagenet64": 295_131_267,
    "flow-matching-paper-imagenet128": 542_804_483,
    "flow-matching-meta-cifar10": 55_676_419,
    "iddpm-imagenet64-vlb": 121_063_942,
    "iddpm-imagenet64-hybrid": 121_063_942,
    "iddpm-cifar10-vlb": 52_546_438,
    "adm-imagenet64": 295_904_454,
    "adm-imagenet256": 553_838_086,
    "hdit-imagenet128-ablation": 117_003_805,
    "hdit-imagenet256": 557_416_522,
    "hdit-ffhq1024": 85_079_300,
}


# Networks of thousands of small operations; each takes about 0.1 ms on fake tensors.
DEAR = ("denseflow", "macow", "hdit-ffhq1024")


def a_step_of(recipe: Path) -> Any:
    """The recipe as an argument of a test, marked if a step takes a quarter of a minute or more."""
    dear = [pytest.mark.dear, pytest.mark.slow] if recipe.stem.startswith(DEAR) else []
    return pytest.param(recipe, marks=dear)


def header(recipe: Path) -> dict[str, str]:
    """The `# Key: value` lines, joined with the `#   ` lines that continue them."""
    found: dict[str, str] = {}
    for line in recipe.read_text().splitlines():
        if entry := re.match(r"# (\w+): (.+)", line):
            found[entry[1]] = entry[2]
        elif more := re.match(r"#   (.+)", line):
            found[list(found)[-1]] += f" {more[1]}"
        else:
            return found
    return found


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command that `exactflow` parses from these words."""
    taken: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(running, "import_module", lambda _: SimpleNamespace(run=taken.append))
        patch.setattr(sys, "argv", ["exactflow", *words])
        main()
    (command,) = taken
    return command


def started(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    """Number of processes that a launch line starts with torchrun, and their command."""
    head, found, words = line.partition("torchrun ")
    assert found
    asked = get_args_parser().parse_args(shlex.split(re.sub(r"\$\(.*?\)", "HOST", words)))
    assert asked.module
    assert asked.training_script == "exactflow"
    nodes, each = int(asked.nnodes.split(":")[-1]), int(asked.nproc_per_node)
    assert asked.standalone == (nodes == 1)
    if nodes > 1:
        assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "HOST:29500")
    if head:  # one torchrun on each node
        tasks = f"--ntasks={nodes}" if nodes == 1 else "--ntasks-per-node=1"
        assert head == f"srun --nodes={nodes} {tasks} --gpus-per-node={each} "
    return nodes * each, parsed(asked.training_script_args, monkeypatch)


@cache
def cost_of_steps(preset: str, model: Any, training: TrainConfig, devices: int) -> TrainingCost:
    """Cached, since recipes for different data may train the same network alike."""
    with torch.device("meta"):
        network = registry.family_of(preset).model(model)
    return training_cost(network, training, devices=devices)


def predicted(settings: Settings, devices: int, epoch: int | None) -> TrainingCost:
    """The cost that `exactflow cost` predicts."""
    training = settings.training
    names = ("batch_size", "accumulate", "optimizer", "precision", "activation_checkpointing")
    of_steps = {name: getattr(training, name) for name in (*names, "ema_decay")}
    family = min(registry.family_of(settings.preset).presets)
    cost = cost_of_steps(family, settings.model, TrainConfig(**of_steps), devices)
    steps = training.steps if epoch is None else training.schedule(epoch).total
    return replace(cost, config=training, epoch=epoch, steps=steps)


def told(cost: TrainingCost) -> str:
    """The cost as the header states it."""
    memory, devices = cost.memory.total / GIB, cost.devices
    where = "one device" if devices == 1 else f"each of {devices} devices"
    return (
        f"{cost.parameters:,} parameters, {cost.flops:.3g} FLOPs in all, "
        f"{memory:.1f} GiB on {where}"
    )


def test_there_are_recipes_and_each_is_checked() -> None:
    presets = {read_file(recipe)["preset"] for recipe in RECIPES}
    assert presets == set(PUBLISHED_PARAMETERS)
    assert len(presets) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_header_says_how_to_run_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = header(recipe)
    assert list(entries) == HEADER
    assert re.search(
        r"arXiv \d{4}\.\d{5}|facebookresearch/flow_matching", " ".join(entries.values())
    )
    monkeypatch.chdir(ROOT)
    launched, slurm = (started(entries[key], monkeypatch) for key in ("Launch", "Slurm"))
    assert launched == slurm
    devices, command = launched
    assert command.config.resolve() == recipe
    assert command.out == Path("runs") / recipe.stem
    verb, *words = shlex.split(entries["Predict"])
    assert verb == "exactflow"
    asked = parsed(words, monkeypatch)
    assert words[0] == "cost"
    assert (asked.config, asked.gpus) == (command.config, devices)


@pytest.mark.parametrize("recipe", [a_step_of(recipe) for recipe in RECIPES], ids=NAMES)
def test_a_step_can_be_taken_and_costs_what_the_header_says(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors: build the model, run loss and gradient of a micro-batch."""
    # Shapes of these layers are checked in small models; here it would take half of the time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    settings = resolve(None, (), recipe)
    asked = parsed(shlex.split(header(recipe)["Predict"])[1:], monkeypatch)
    found = predicted(settings, asked.gpus, asked.images)
    assert found.parameters == PUBLISHED_PARAMETERS[settings.preset]
    assert found.memory.total < LARGEST_DEVICE
    assert header(recipe)["Cost"] == told(found)


def test_what_info_prints_is_what_the_header_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "recipes" / "flow-matching-meta-cifar10.yaml"
    entries = header(recipe)
    monkeypatch.setattr(sys, "argv", shlex.split(entries["Predict"]))
    main()
    printed = capsys.readouterr().out
    for number in re.findall(r"[\d,]{9,}|[\d.]+e\+\d+", entries["Cost"]):
        assert number in printed
    assert "8 devices" in printed


def test_the_page_shows_the_recipes_as_they_are() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert (ROOT / "recipes" / "tarflow-imagenet64-likelihood.yaml").read_text() in page
    for recipe in RECIPES:
        parameters, flops, memory, devices = re.findall(
            r"[\d,]+ parameters|\S+ FLOPs|\S+ GiB|one device|\d+ devices", header(recipe)["Cost"]
        )
        numbers = [words.split()[0] for words in (parameters, flops, devices, memory)]
        row = " | ".join(numbers).replace("| one |", "| 1 |")
        assert f"| `{recipe.stem}` | {row} |" in page
