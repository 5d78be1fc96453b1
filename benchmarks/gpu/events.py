"""How a step reports what it has finished: one JSON line an event, appended to the file that BRIDGE_STG_EVENTS names.

The run reads the file while the step works, so that what a killed step finished is known. As a pytest plugin
(`-p benchmarks.gpu.events`) this module reports every test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "BRIDGE_STG_EVENTS"
TEXT_LINES = 40  # of a failing test's traceback


@dataclass(frozen=True)
class Event:
    """One finished case or test.

    Attributes:
        name: unique within its step.
        status: "ok", "failed" or "skipped".
        note: why it is not "ok", in one line.
        text: the traceback of a failing test.
        rows: lines of the results table, by column.
    """

    name: str
    status: str = "ok"
    note: str = ""
    text: str = ""
    rows: Sequence[Mapping[str, str]] = ()


def emit(event: Event) -> None:
    """Append the event; nothing happens where no run asks for events."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    line = json.dumps(asdict(event)) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())  # one write: lines of two processes do not mix
    finally:
        os.close(descriptor)


def pytest_runtest_logreport(report: Any) -> None:
    """Report a test when its call is over, or when its setup or teardown failed."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the controller reports it
    if report.failed:
        lines = str(report.longrepr).splitlines()
        note = lines[-1] if lines else ""
        emit(Event(report.nodeid, "failed", f"{report.when}: {note}", "\n".join(lines[-TEXT_LINES:])))
    elif report.when == "call" or report.skipped:
        emit(Event(report.nodeid, "skipped" if report.skipped else "ok"))


def pytest_collectreport(report: Any) -> None:
    """Report a test file that cannot be collected."""
    if report.failed:
        emit(Event(report.nodeid, "failed", "collection", str(report.longrepr)))
