"""Processor seconds of the tests and reasons of skipped ones, printed at the end.

Processor time is that of a test with its fixtures and the processes that it started. It hardly
depends on what else a machine does, as wall-clock time does.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

COST = "processor seconds"
SLOW = 1.0  # seconds from which a test is to be marked as slow: `make quick` leaves it out


def seconds() -> float:
    """Processor time of this process, its finished children and all forked by a server."""
    processes = sys.modules.get("processes")
    return sum(os.times()[:4]) + (processes.spent if processes else 0.0)


class Costs:
    """A plugin of pytest. With xdist, workers measure and the process that started them reports."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._began = 0.0
        self._tests: dict[str, tuple[float, bool]] = {}
        self._workers = 0.0
        self._skipped: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._began = seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report: Any = yield
        if call.when == "teardown":
            slow = item.get_closest_marker("slow") is not None
            report.user_properties.append((COST, (seconds() - self._began, slow)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == COST and report.when == "teardown":
                self._tests[report.nodeid] = tuple(value)
        if report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, tuple)
            self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._workers += getattr(node, "workeroutput", {}).get(COST, 0.0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        yield
        config: Any = session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput[COST] = seconds()
            return
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        for line in self._report() if terminal else ():
            terminal.write_line(line)

    def _report(self) -> Iterator[str]:
        if self._shown:
            dear = sorted(self._tests.items(), key=lambda each: each[1], reverse=True)
            for name, (cost, slow) in dear[: self._shown]:
                hint = "" if slow or cost < SLOW else "  (to be made cheaper, or marked as slow)"
                yield f"{cost:6.1f} s  {name}{hint}"
            total, tests = self._workers + seconds(), sum(cost for cost, _ in self._tests.values())
            yield f"{total:6.1f} s of processor time, {tests:.1f} s of it in tests"
        if self._skipped:
            reasons = (f"{count} × {reason}" for reason, count in self._skipped.most_common())
            yield f"{self._skipped.total()} skipped: {'; '.join(reasons)}"
