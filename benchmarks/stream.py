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

    from benchmarks.registry import Measure

LENGTH = 300  # of a line that somebody else wrote


def tell(text: str = "", **line: Any) -> None:
    """Appends a text to the one file and a line to the other, as far as they are given; nothing without OUT."""
    folder = os.environ.get("OUT")
    if not folder:
        return
    for name, content in (("results.txt", text), ("results.jsonl", json.dumps(line) if line else "")):
        if content:
            with Path(folder, name).open("ab", buffering=0) as file:
                file.write(f"{content}\n".encode())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tells of a test that ran, and of whatever failed; with pytest-xdist the workers' reports come here too."""
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.failed or (report.when == "call" and report.passed)):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if not report.failed:
        tell(**line)
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    error = _lines(crash.message if crash else report.longreprtext)[0]
    tell(f"  FAILED {report.nodeid}: {error}", **line, error=error)


def task_measured(rows: list[dict], absent: dict[str, str]) -> None:
    """Tells of a task of a benchmark.

    Args:
        rows: of the table of `report` in benchmarks/harness/gpu.py, one for each side.
        absent: why other sides are left out.
    """
    said = [f"{row['side']} {row['ms']} ms" for row in rows] + [
        f"without {name} ({why})" for name, why in absent.items()
    ]
    tell(f"  {rows[0]['task']}: {', '.join(said)}", task=rows[0]["task"], sides=rows, absent=absent)


def measured(name: str, measures: list[Measure]) -> None:
    """Tells of what was measured on both sides, of a part of a case."""
    said = [f"{m.name} {m.ours.median:.3f} {m.unit}, theirs {m.theirs.median:.3f}" for m in measures]
    ratios = {m.name: round(m.ratio, 4) for m in measures}
    tell(f"  {'; '.join(said)}", task=name, ratios=ratios)


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
