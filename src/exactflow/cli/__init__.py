"""The command line: the same verbs as the Python API."""

from exactflow.cli.entry import main

__all__ = ["main"]
