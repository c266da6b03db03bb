"""Carries out a command, alone or in one of the processes that torchrun started."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

from exactflow.core.processes import Processes, ProcessLostError, joined


def carry_out(command: Any, module: str, *, shared: bool) -> None:
    """Run one command; exits with 1 (an error, in one message) or 128 + signal, or returns.

    Args:
        command: what was typed.
        module: whose `run` takes it.
        shared: whether several processes may work on it.
    """
    group = Processes()
    try:
        with joined() as group, group.explained_loss():
            if group.count > 1 and not shared:
                raise ValueError(
                    "this command works in one process: start it without torchrun, "
                    f"which started {group.count}"
                )
            with nullcontext() if group.is_main else _silence():
                import_module(module).run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, ArithmeticError, ImportError, OSError, ProcessLostError) as error:
        place = "" if group.count == 1 else f" in process {group.rank} of {group.count}"
        print(f"error{place}: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _silence() -> Iterator[None]:
    """People hear the main process only, but for errors."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
