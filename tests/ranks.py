"""Processes forked from one that has everything imported; tests/processes.py asks for them.

    python ranks.py

reads lines of JSON and answers each with one: the `answer`, and the `seconds` of a processor that
all processes have taken since the line before. A line is either

- a list of rounds, carried out one after the other. A round names a `job` of this file, how many
  processes do it together (`count`), its `options`, and `node`, how many of them torchrun would
  have started on one machine. The answer is what became of each round's processes.
- `words`, which a process does as `python WORDS` would; the answer is its number.
- such a number that has `ended`; the answer is its exit status, or null before its end.
"""

import contextlib
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # before processes are forked: it takes seconds
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

import faults
from exactflow.comparison.compare import compare
from exactflow.comparison.protocol import Protocol
from exactflow.core.config import override
from exactflow.data import DataConfig
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics.extractors import pixels
from exactflow.models import registry
from exactflow.parallel.process_group import joined
from exactflow.sampling.sample import sample
from exactflow.training import Progress, TrainConfig, fit
from exactflow.training.log import LOG_FILE
from training_worker import EVERYTHING, Toy, ToyConfig, make_data, make_toy

DEADLINE = 300.0  # seconds in which all processes must end once one of them has


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(job: Callable[..., Any], options: Mapping[str, Any], told: int) -> None:
    """Run one process's job; write its result or error to the pipe, as JSON."""
    faulthandler.enable(told)
    try:
        result: dict[str, Any] = {"value": job(**options)}
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    with os.fdopen(told, "w") as pipe:
        json.dump(result, pipe)


def carry_out(
    job: str, count: int, options: Mapping[str, Any], node: int | None = None
) -> list[dict[str, Any]]:
    """Results of each process, or the signal that ended it."""
    port, children = free_port(), []
    for rank in range(count):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            # Else what this process forks, and may leave behind, would keep the pipe open.
            os.register_at_fork(after_in_child=partial(os.close, told))
            if count > 1:
                place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % (node or count)}
                place |= {"LOCAL_WORLD_SIZE": node or count, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            work(JOBS[job], options, told)
            os._exit(0)
        os.close(told)
        children.append((child, heard))
    return collect(children)


def collect(children: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Wait for all processes; kill, as a failure, those that outlive the first by a deadline."""
    status: dict[int, int] = {}
    first = None
    while left := [child for child, _ in children if child not in status]:
        status |= {child: code for child in left if (code := ended(child)) is not None}
        if status:
            first = first or time.monotonic()
            if time.monotonic() - first > DEADLINE:
                for child in left:
                    os.kill(child, signal.SIGKILL)
                raise RuntimeError(f"{len(left)} processes outlived another by {DEADLINE} s")
        time.sleep(0.01)
    found = []
    for child, heard in children:
        with os.fdopen(heard) as pipe:
            text = pipe.read()
        found.append(
            json.loads(text) if status[child] == 0 else {"error": ending(status[child], text)}
        )
    return found


def ending(status: int, stacks: str) -> str:
    """How a process ended that wrote neither a result nor an error."""
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"{name}\n{stacks}" if stacks else name


def train(
    folder: str,
    config: Mapping[str, Any],
    kill: tuple[int, int] | None = None,
    order: tuple[int, int] | None = None,
    poison: tuple[int, int] | None = None,
    strike: tuple[int, int, str, Any] | None = None,
    toy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the toy; (rank, micro-batch) says where SIGKILL, SIGTERM, a NaN or a fault strikes.

    Micro-batches are counted from the start of this session, in training alone.
    """
    rank, plain, taken = int(os.environ.get("RANK", "0")), Toy.loss, [0]
    undo: list[faults.Undo] = []

    def loss(self: Toy, *args: Any, **kwargs: Any) -> torch.Tensor:
        taken[0] += self.training
        here = [rank, taken[0]]
        if here == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if here == order:
            os.kill(os.getpid(), signal.SIGTERM)
        if strike is not None and here == list(strike[:2]):
            undo.append(faults.FAULTS[strike[2]](strike[3]))
        found = plain(self, *args, **kwargs)
        broken = poison is not None and rank == poison[0] and taken[0] >= poison[1]
        return found * float("nan") if broken else found

    def weight(told: Progress) -> dict[str, float]:
        state = told.model.state_dict()
        return {"weight": float(state["blocks.0.shift.weight"].double().mean())}

    Toy.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
    made = override(EVERYTHING, config)
    model = make_toy(ToyConfig(**{"num_classes": 3, "volume_preserving": True, **(toy or {})}))
    model = model.double() if made.precision == "float32" else model  # see `family`
    try:
        result = fit(model, make_data(classes=3), made, folder, every={5: weight}, progress=False)
    finally:
        for act in undo:
            act()
    sums = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    return {"step": result.step, "sums": sums}


def beset(folder: str, config: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Train the toy; at step 15 and at the end another process tries the same training."""
    said = []

    def begin(told: Progress) -> dict[str, float]:
        said.append(carry_out("train", 1, {"folder": folder, "config": config}))
        return {}

    made, model = override(EVERYTHING, config), make_toy(ToyConfig(3, volume_preserving=True))
    fit(model, make_data(classes=3), made, folder, every={15: begin}, progress=False)
    return said


def family(folder: str, preset: str, changes: Mapping[str, Any]) -> list[float]:
    """Losses of some steps of a registered model, in float64 unless a lower precision is asked for.

    An optimiser's first steps hardly depend on a gradient's size, so they turn the rounding of
    gradients near zero into differences of weights: 1e-6 of a loss in float32.
    """
    model, given = registry.build(preset), dict(registry.preset(preset).training)
    given |= {"batch_size": 8, "steps": 3, "warmup_steps": 1, "log_every": 1}
    given |= {"fine_tuning_epochs": 0.0, "precision": "float32", **changes}
    made = override(TrainConfig(), given)
    model = model.double() if made.precision == "float32" else model
    data = make_data(16, model.num_classes, model.event_shape, model.levels)
    fit(model, data, made, folder, progress=False)
    lines = (Path(folder) / LOG_FILE).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def verbs(preset: str) -> dict[str, Any]:
    """Samples and likelihoods of a model, with their costs."""
    torch.manual_seed(0)
    model = registry.build(preset).eval()
    classes = model.num_classes
    label = torch.arange(5) % classes if classes else None
    data = make_data(7, classes, model.event_shape, model.levels)
    with joined():
        drawn = sample(model, 5, label, seed=3, batch_size=2)
        images, labels = data.tensors()
        labels = labels if classes else None
        scored = log_likelihood(model, images[:7], labels, seed=1, batch_size=2)
        one = sample(model, 1, None if label is None else label[:1], seed=4)
    return {
        "x": drawn.x.tolist(),
        "seeds": drawn.seeds,
        "evaluations": drawn.evaluations,
        "one": one.x.tolist(),
        "nats": scored.nats.tolist(),
        "kind": scored.kind,
        "details": dict(scored.details),
    }


def comparison(folder: str) -> dict[str, Any]:
    """Numbers of two models on the same images."""
    torch.manual_seed(0)
    fields = {"image_shape": (1, 8, 8), "levels": 17}
    flow = registry.build("tarflow-tiny", **fields)
    models = {"flow": flow, "path": registry.build("hdit-tiny", **fields)}
    protocol = Protocol(30, 6, 4, ode_steps=2, samples=20, evaluations=(4, 2), curve_samples=18)
    data = DataConfig("digits", limit=160)
    with joined():
        compare(models, data, folder, extractor=pixels(), protocol=protocol)
    found = json.loads((Path(folder) / "report.json").read_text())
    return {
        each["name"]: [each["likelihood"]["bits_per_dim"], each["samples"]["frechet"]]
        for each in found["results"]
    }


def refuse(what: str) -> None:
    """One process fails at its share of work."""
    with joined() as group:

        def work(item: int) -> int:
            if item == 3:
                raise ValueError(f"item {item} cannot be done")
            return item

        assert group.spread(range(3), work) == [0, 1, 2]
        if what == "main":
            group.on_main(lambda: work(3))
        group.spread(range(5), work)


JOBS: dict[str, Callable[..., Any]] = {
    "train": train,
    "beset": beset,
    "family": family,
    "verbs": verbs,
    "comparison": comparison,
    "refuse": refuse,
}


def python(words: Sequence[str]) -> None:
    """Run `python WORDS` in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(first, run_name="__main__")


def launch(count: int, words: Sequence[str]) -> None:
    """Run it in `count` processes, as `torchrun` does, without importing anything again."""
    options = ["--nproc-per-node", str(count), "--master-port", str(free_port())]
    config, _, _ = torchrun.config_from_args(torchrun.parse_args([*options, "-m", "exactflow"]))
    config.start_method = "fork"
    elastic_launch(config, python)(words)


@cache
def import_digits() -> None:
    """Import what the built-in images need (two seconds) before processes are forked."""
    with contextlib.suppress(ImportError):
        import sklearn.datasets  # noqa: F401


def start(words: Sequence[str], cwd: str, torchrun: int, out: str, errors: str) -> int:
    """Fork a process that runs the words; in it, this function ends with SystemExit."""
    import_digits()
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(cwd)
    for file, place in ((out, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, place)
        os.close(opened)
    if torchrun:
        launch(torchrun, words)
    else:
        python(words)
    sys.exit()


def ended(child: int) -> int | None:
    """The exit status of a process, negative where a signal ended it, once it has ended."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def answer(request: Any) -> Any:
    if isinstance(request, list):
        return [carry_out(**rounds) for rounds in request]
    return ended(request["ended"]) if "ended" in request else start(**request)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    before = 0.0
    for line in sys.stdin:
        found = {"answer": answer(json.loads(line))}
        now = sum(os.times()[:4])
        answers.write(json.dumps({**found, "seconds": now - before}) + "\n")
        answers.flush()
        before = now


if __name__ == "__main__":
    main()
