"""Seconds, memory and the machine they were measured on."""

import ctypes
import gc
import math
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LONGEST_LIMIT = 1e6  # seconds: no timer is set for infinity


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and versions that a number was measured with."""
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        commit = done.stdout.strip()
    found = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown",
        "load at the end": f"{os.getloadavg()[0]:.1f}",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def interleaved(
    actions: dict[str, Callable[[], Any]],
    pairs: int,
    device: torch.device,
    *,
    at_least: float = 0.0,
    at_most: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every action, in turn (A B A B), so that drift of the machine affects both.

    Args:
        actions: what to time; called once before by the caller, to warm up.
        pairs: rounds, one at least.
        device: where the work is done.
        at_least: seconds to spend, on at most ten times as many rounds.
        at_most: seconds after which no round starts.
    """
    took: dict[str, list[float]] = {name: [] for name in actions}
    began = time.perf_counter()
    for done in range(10 * pairs):
        spent = time.perf_counter() - began
        if done and (spent > at_most or (done >= pairs and spent >= at_least)):
            break
        for name, action in actions.items():
            took[name].append(seconds(action, device))
    return took


@contextmanager
def time_limit(most: float, reason: str) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds, in the main thread; at once if none."""

    def stop(*_: object) -> None:
        raise TimeoutError(reason)

    if most <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(most, LONGEST_LIMIT))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, least and greatest ratio slow / fast of the pairs; "best": ratio of least times."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "median": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "best": min(slow) / min(fast),
    }


def relative_error(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value; infinite where anything is not finite."""
    first, second = first.detach().double(), second.detach().double()
    error = (first - second).abs().max() / second.abs().max()
    return float(error) if bool(error.isfinite()) else float("inf")


def resident_megabytes(field: str) -> float:
    """VmRSS or VmHWM (the peak) of this process in MiB; NaN on systems without /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return float("nan")


def peak_megabytes(action: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Peak MiB while `action` runs once, in all and beyond what was allocated before ("added").

    On the CPU it is that of the whole process, so call it in a new one. On a GPU it is what
    PyTorch's allocator gave out.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
        action()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):  # forget the peak of the preparations
            Path("/proc/self/clear_refs").write_text("5")
        before = resident_megabytes("VmRSS")
        action()
        peak = resident_megabytes("VmHWM")
    return {"peak": peak, "added": peak - before}
