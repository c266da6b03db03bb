"""Setup of all tests: one thread, checked annotations, reproducible examples, fixtures."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for spawned ranks

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))  # the import hook below looks up `typechecker` by name

if "exactflow" in sys.modules:
    raise RuntimeError(
        "exactflow was imported before tests/conftest.py could check its annotations"
    )

if find_spec("beartype") is not None and find_spec("jaxtyping") is not None:
    from jaxtyping import install_import_hook

    import typechecker  # noqa: F401 - before the hook takes jaxtyping's decorator

    install_import_hook("exactflow", "typechecker.check")

import pytest  # noqa: E402
import torch  # noqa: E402

from costs import Costs  # noqa: E402

torch.set_num_threads(1)

if find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile(
        "exactflow", deadline=None, derandomize=True, max_examples=25, database=None
    )
    settings.load_profile("exactflow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device the tests run on (default: cpu)")
    parser.addoption(
        "--costs", type=int, default=0, help="list so many tests that took the most processor time"
    )
    if find_spec("pytest_timeout") is None:  # a machine without it may still run the tests
        parser.addini("timeout", "seconds a test may take; not enforced without pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs(config.getoption("--costs")))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device named by --device; an absent one is an error, not a silent pass on the CPU."""
    chosen = torch.device(request.config.getoption("--device"))
    torch.empty(0, device=chosen)
    return chosen


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers in the repository."""
    return TESTS / "golden"
