"""A pytest plugin, `-p benchmarks.stream`: each test's outcome is a line of $OUT/tests.jsonl as soon as it is known.

pytest names what failed when all is over; a run that is cut off has then said nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes down a test that ran, and whatever failed; with pytest-xdist the workers' reports come here too."""
    if report.failed or (report.when == "call" and not report.skipped):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            line["error"] = (crash.message if crash else report.longreprtext.strip())[:300]
        if "PYTEST_XDIST_WORKER" not in os.environ:
            with Path(os.environ["OUT"], "tests.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
