"""Processes that train together, forked from one that has everything imported.

    python ranks.py ROUNDS

takes a JSON list of rounds, carries them out one after the other, and prints a JSON list of what
became of each round's processes. A round names a `job` of this file, how many processes do it
(`count`), its `options`, and `node`, how many of them torchrun would have started on one machine.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # before processes are forked: it takes seconds

from exactflow import registry
from exactflow.core.config import override
from exactflow.training import Progress, TrainConfig, fit
from training_worker import EVERYTHING, Toy, ToyConfig, make_data, make_toy

DEADLINE = 60.0  # seconds in which all processes must end once one of them has


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(job: Callable[..., Any], options: Mapping[str, Any], told: int) -> None:
    """One process: its result or its error, as JSON, into the pipe."""
    try:
        result: dict[str, Any] = {"value": job(**options)}
    except BaseException as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    with os.fdopen(told, "w") as pipe:
        json.dump(result, pipe)


def carry_out(
    job: str, count: int, options: Mapping[str, Any], node: int | None = None
) -> list[dict[str, Any]]:
    """What each process says, or the signal that ended it."""
    port, children = free_port(), []
    for rank in range(count):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
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
    """Wait for all; those that outlive the first by the deadline are killed, and called hanging."""
    codes: dict[int, int] = {}
    first = None
    while len(codes) < len(children):
        for child, _ in children:
            if child not in codes and os.waitpid(child, os.WNOHANG)[0]:
                codes[child] = 1
                first = first or time.monotonic()
        if first is not None and time.monotonic() - first > DEADLINE:
            for child, _ in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            first = None
        time.sleep(0.01)
    found = []
    for _, heard in children:
        with os.fdopen(heard) as pipe:
            text = pipe.read()
        found.append(json.loads(text) if text else {"error": "killed"})
    return found


def train(
    folder: str,
    config: Mapping[str, Any],
    kill: tuple[int, int] | None = None,
    order: tuple[int, int] | None = None,
    poison: tuple[int, int] | None = None,
    toy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the toy. At a step of a rank: SIGKILL, SIGTERM, or an infinite weight gradient."""
    model = make_toy(ToyConfig(**{"num_classes": 3, "volume_preserving": True, **(toy or {})}))
    rank = int(os.environ.get("RANK", "0"))
    plain = torch.optim.AdamW.step
    begun = [0]

    def step(self: Any) -> Any:
        result = plain(self)
        return result

    def strike(told: Progress) -> dict[str, float]:
        here = (rank, told.step)
        if kill is not None and here == tuple(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        if order is not None and here == tuple(order):
            os.kill(os.getpid(), signal.SIGTERM)
        begun[0] = told.step
        weight = told.model.state_dict()["blocks.0.shift.weight"].double()
        return {"weight": float(weight.mean())}

    torch.optim.AdamW.step = step
    if poison is not None and rank == poison[0]:
        poison_loss(int(poison[1]))
    made = replace(EVERYTHING, precision="float32", **config)
    result = fit(model, make_data(classes=3), made, folder, every={1: strike}, progress=False)
    state = model.state_dict()
    return {
        "step": result.step,
        "digest": {name: value.double().sum().item() for name, value in state.items()},
    }


def poison_loss(step: int) -> None:
    """From that step on this process's losses are not numbers."""
    plain, calls = Toy.loss, [0]

    def loss(self: Toy, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += self.training
        return plain(self, *args, **kwargs) * (float("nan") if calls[0] >= step else 1.0)

    Toy.loss = loss  # pyright: ignore[reportAttributeAccessIssue]


def family(folder: str, preset: str, changes: Mapping[str, Any]) -> list[float]:
    """Losses of some steps of a registered model."""
    made = registry.preset(preset)
    model = registry.build(preset)
    given = {**made.training, "batch_size": 8, "steps": 3, "warmup_steps": 1, "log_every": 1}
    given |= {"fine_tuning_epochs": 0.0, "precision": "float32", **changes}
    config = override(TrainConfig(), given)
    classes = model.num_classes
    data = make_data(16, classes, model.event_shape, model.levels)
    losses: list[float] = []

    def note(told: Progress) -> dict[str, float]:
        return {}

    fit(model, data, config, folder, every={1: note}, progress=False)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    losses += [json.loads(line)["loss"] for line in lines]
    return losses


JOBS: dict[str, Callable[..., Any]] = {"train": train, "family": family}


def main(rounds: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    print(json.dumps([carry_out(**described) for described in rounds]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
