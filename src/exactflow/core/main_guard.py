"""What a script lacks whose helpers start it again. Nothing here imports torch."""

import multiprocessing


def require_main_guard() -> None:
    """Call this before long work, or before other processes are started.

    Where processes are not forked (macOS, Windows, or as asked for), each begins by importing the
    script that started it, and would do the script's work again, and wait for ever for its own
    helpers.

    Raises:
        RuntimeError: this process is such a helper, and is still importing the script.
    """
    # The mark that multiprocessing sets for the same question; it asks only when a helper starts
    # helpers of its own.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this process was started to help another one, and to begin with imports the same "
            "script, whose work it would do again: expected that work under "
            "`if __name__ == '__main__':`, found it outside"
        )
