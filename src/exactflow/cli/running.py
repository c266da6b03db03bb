"""Carries out a command, alone or in one of the processes that torchrun started."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

import torch

from exactflow.cli.arguments import SHARED, verb_of
from exactflow.cli.guard import leaving_at_once
from exactflow.cli.terminal import safe_record, show_warning
from exactflow.parallel.process_group import ProcessLostError, joined


def carry_out(command: Any) -> None:
    """Run one command.

    Raises:
        MemoryError: the processor's or an accelerator's memory is full.
        ConnectionError: another process of the group was lost.
    """
    with leaving_at_once():
        verb = import_module(f"exactflow.cli.{verb_of(type(command))}")
    try:
        with joined() as group, group.explained_loss():
            if group.count > 1 and not isinstance(command, SHARED):
                raise ValueError(
                    "this command works in one process: start it without torchrun, "
                    f"which started {group.count}"
                )
            with nullcontext() if group.is_main else _silence(), _plain_messages():
                verb.run(command)
    except ProcessLostError as error:
        raise ConnectionError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Warnings and logs are lines on stderr, in which names are made printable."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(safe_record)
    logging.getLogger("exactflow").addHandler(handler)
    before, warnings.showwarning = warnings.showwarning, show_warning
    try:
        yield
    finally:
        warnings.showwarning = before
        logging.getLogger("exactflow").removeHandler(handler)


@contextmanager
def _silence() -> Iterator[None]:
    """People hear the main process only, but for errors."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
