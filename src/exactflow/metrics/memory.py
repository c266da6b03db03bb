"""Peak memory of a part of a program."""

import re
from pathlib import Path
from typing import final

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak of the resident set to what it is


@final
class PeakMemory:
    """Most bytes in use since this was made: of the allocator on a GPU, else of the process.

    The latter are its resident set, with all that was in use before; only Linux reports them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """The peak; None where the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return None if found is None else int(found[1]) * 1024
