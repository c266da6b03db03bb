"""`exactflow ...`: words to a command, and the command to the verb that carries it out."""

import sys

from exactflow.cli.guard import guarded, leaving_at_once


def main() -> None:
    """Run one command.

    Exits with 0, 1 (an error, in one message), 2 (usage), 70 (a fault of this program) or
    128 + signal.
    """
    with guarded():
        with leaving_at_once():
            from exactflow.cli.parsing import parsed

            command = parsed(sys.argv[1:])
            from exactflow.cli import early

            if early.answered(command):
                return
            from exactflow.cli.running import carry_out  # imports torch
        carry_out(command)
