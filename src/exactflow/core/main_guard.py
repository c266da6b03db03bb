"""The check that a script guards its work from helper processes. Nothing here imports torch."""

import multiprocessing


def require_main_guard() -> None:
    """Refuse to work in a helper process that is still importing the script; call it before work.

    Processes that are spawned and not forked (the default on macOS and Windows) begin by importing
    the script that started them. Without a guard they would do its work again, and wait for ever
    for helpers of their own.

    Raises:
        RuntimeError: this process is such a helper.
    """
    # multiprocessing sets this mark, but checks it only when a helper starts helpers of its own.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this process was started to help another one, and to begin with imports the same "
            "script, whose work it would do again: expected that work under "
            "`if __name__ == '__main__':`, found it outside"
        )
