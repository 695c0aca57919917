"""Work in processes gives what the same work gives here, in the same order, and fails as it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi2.data import encode, processes
from phi2.data.config import EncodeConfig
from phi2.data.encode import encode_records
from phi2.data.flat import digests
from phi2.data.processes import map_in_processes
from phi2.data.records import Origin, Plain


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})


def test_results_come_in_the_order_of_the_items_from_other_processes():
    factor = 3  # no process is sent a function: this one could not be
    results = list(map_in_processes(lambda item: (factor * item, os.getpid()), range(50)))
    assert [result for result, _ in results] == [3 * item for item in range(50)]
    assert os.getpid() not in {process for _, process in results}


def test_one_processor_does_the_work_itself(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert {*map_in_processes(lambda item: os.getpid(), range(5))} == {os.getpid()}


def test_an_error_is_raised_as_it_was():
    with pytest.raises(ZeroDivisionError):
        list(map_in_processes(lambda item: 1 // item, range(5)))


def test_a_killed_process_is_told():
    with pytest.raises(OSError, match="^a process that encodes rows was killed, most likely for want of memory$"):
        list(map_in_processes(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(5)))


WAITING = """
import os, time
from phi2.data.processes import map_in_processes

os.sched_getaffinity = lambda process: {0, 1}

def wait(item):
    os.write(1, f"{os.getpid()}\\n".encode())  # whole
    time.sleep(600)

list(map_in_processes(wait, [0, 1]))
"""


def test_processes_end_with_the_one_that_started_them():
    """However it ends: killed, it can tell them nothing."""
    parent = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [*filter(is_alive, children)]


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and ") Z " not in stat.read_text()  # one that nobody has waited for is still there


def test_rows_encoded_in_processes_are_the_same_with_the_same_audit(tiny_tokenizer, plain, monkeypatch):
    records = [Plain("Q" * (i % 7), "the " * (i % 5) + "end", Origin("rows", i)) for i in range(40)]
    options = EncodeConfig(max_length=12, truncation_mode="drop")
    monkeypatch.setattr(encode, "BATCH_ROWS", 3)
    here, audit = encode_records(records, tiny_tokenizer, options, "supervised")
    used = []
    monkeypatch.setattr(encode, "PARALLEL_BATCHES", 2)
    monkeypatch.setattr(encode, "map_in_processes", lambda *given: used.append(1) or processes.map_in_processes(*given))
    there, audit_of_processes = encode_records(records, tiny_tokenizer, options, "supervised")
    assert used and audit.dropped
    assert [plain(row) for row in there] == [plain(row) for row in here]
    assert audit_of_processes == audit and digests(there) == digests(here)
