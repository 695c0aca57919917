"""What a visit to a GPU learns, said as soon as it is known: in $OUT/results.txt for people, in $OUT/results.jsonl too.

A line is one write at the end of a file, so that whatever is killed has said all that it had finished. Three speak:
pytest (`-p benchmarks.stream`) of each test, a benchmark of each of its tasks, and benchmarks/gpu.sh of each step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

LENGTH = 300  # of a line that somebody else wrote


def tell(text: str, **line: Any) -> None:
    """Appends a line to both files, to that for people only if there is a text; nothing without OUT."""
    if "OUT" not in os.environ:
        return
    for name, content in (("results.jsonl", json.dumps(line)), ("results.txt", text)):
        if content:
            with Path(os.environ["OUT"], name).open("ab", buffering=0) as file:
                file.write(f"{content}\n".encode())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tells of a test that ran, and of whatever failed; with pytest-xdist the workers' reports come here too."""
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.failed or (report.when == "call" and report.passed)):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if not report.failed:
        tell("", **line)
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    error = _lines(crash.message if crash else report.longreprtext)[0]
    tell(f"  FAILED {report.nodeid}: {error}", **line, error=error)


def task_measured(rows: list[dict]) -> None:
    """Tells of a task of a benchmark: one row of `gpu.report`'s table for each of its sides."""
    times = ", ".join(f"{row['side']} {row['ms']} ms" for row in rows)
    tell(f"  {rows[0]['task']}: {times}", task=rows[0]["task"], sides=rows)


def step_ended(name: str, seconds: int, code: int, output: str) -> None:
    """Tells that a step is over, with the last line it printed: a sum of the tests, or why it failed."""
    how = {0: "done", 124: "its time was up", 137: "killed"}.get(code, f"exit code {code}")
    last = "" if (line := _lines(output)[-1]).startswith("{") else line  # what a case prints for programs
    tell(f"{name}: {seconds} s, {how} {last}".rstrip(), step=name, seconds=seconds, code=code, last=last)


def _lines(text: str) -> list[str]:
    """Those that are not blank, none of them long; one at least."""
    return [line.strip()[:LENGTH] for line in text.splitlines() if line.strip()] or [""]


if __name__ == "__main__":
    step_ended(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin.read())
