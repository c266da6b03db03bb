"""Laws of scripts that loader processes import: without a main guard they end with an error."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exactflow
from exactflow.core.density_flow import FittedFlow
from exactflow.core.main_guard import require_main_guard
from exactflow.data import evaluation_batches, training_batches
from exactflow.models import registry
from exactflow.training import TrainConfig, fit
from exactflow.training.fitting import fit_closed_form
from training_worker import make_data, make_toy

MESSAGE = "expected that work under `if __name__ == '__main__':`"

SCRIPT = """
import multiprocessing, sys
from exactflow.core.main_guard import require_main_guard
def help():
    require_main_guard()  # it has imported everything
    assert "torch" not in sys.modules
def work():
    require_main_guard()
    helper = multiprocessing.get_context({method!r}).Process(target=help)
    helper.start()
    helper.join()
    sys.exit(helper.exitcode)
{guard}work()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("guard", ["if __name__ == '__main__': ", ""])
def test_a_helper_that_imports_the_work_says_what_is_missing(
    method: str, guard: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(method=method, guard=guard))
    path = str(Path(str(exactflow.__file__)).parents[1])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if guard else 1), done.stderr
    assert (MESSAGE in done.stderr) == (not guard)


def doors(tmp_path: Path) -> list[Callable[[], Any]]:
    data, config = make_data(), TrainConfig(steps=1, batch_size=4)
    name = "whitening-tiny"
    assert issubclass(registry.family_of(name).model, FittedFlow)
    fitted = registry.build(name)
    images = make_data(8, 0, fitted.event_shape, fitted.levels)
    return [
        lambda: fit(make_toy(), data, config, tmp_path / "run"),
        lambda: fit_closed_form(fitted, images, config, tmp_path / "run"),
        lambda: training_batches(data, 4, seed=0, num_workers=1),
        lambda: evaluation_batches(data, 4, num_workers=1),
    ]


def test_the_doors_are_closed_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_main_guard()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    for door in doors(tmp_path):
        with pytest.raises(RuntimeError, match=MESSAGE):
            door()
    assert not (tmp_path / "run").exists()
