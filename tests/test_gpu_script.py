"""A visit to a GPU, walked without one: the same script, kernels in the interpreter, tiny tasks on the host's clock."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KILLS = (signal.SIGTERM, signal.SIGKILL)
MOMENTS = random.Random(6).sample(range(18), 4)  # 2, 15, 8 and 0 lines
TESTS = """
import time
from pathlib import Path

import pytest

@pytest.mark.parametrize("number", range(12))
def test_one(number):
    time.sleep(0.05)
    with Path(__file__).with_name("done").open("a") as file:
        print(number, file=file, flush=True)
    assert number != 3, "three is wrong"
"""
# Stands in for python: what `-m benchmarks.run --case tiny` runs on a CPU, and all else as python runs it.
PYTHON = f"""#!{sys.executable}
import os, sys, time
if sys.argv[1:4] != ["-m", "benchmarks.run", "--case"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
name = sys.argv[4]
if name == "hangs":
    time.sleep(600)
if name == "fails":
    sys.exit("Traceback:\\nRuntimeError: an illegal memory access")
os.environ["TRITON_INTERPRET"] = "1"
import torch
from benchmarks import run
from benchmarks.cases.elementwise import compare_gelu, compare_rotary
from benchmarks.harness import gpu
from benchmarks.registry import case

@case("tiny", 3, "a tiny gelu and a tiny rotary")
def tiny(turns):
    cpu, dtype = torch.device("cpu"), torch.float32
    compared = [compare_gelu(cpu, dtype, 3, 48), compare_rotary(cpu, dtype, 1, 7, 2, 80, 32)]
    compared[0].peers["Liger"] = lambda: exec("import no_such_package")
    return gpu.report(compared, turns, {{}})

def timed(calls, turns):
    return {{name: [seconds(call) for _ in range(turns)] for name, call in calls.items()}}

def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

gpu.timed, gpu.measured_rates = timed, lambda: gpu.Rates(1, 1)
gpu.peak_memory, torch.cuda.empty_cache = lambda implementation, inputs: 0.0, lambda: None
run.RESULTS = run.Path(os.environ["OUT"], "kept")
sys.exit(run.main(sys.argv[3:]))
"""


@pytest.fixture
def visit(tmp_path: Path):
    """visit(*steps, limit=seconds) starts the script, which writes into tmp_path / "out"; what it leaves is ended."""
    (tmp_path / "test_numbers.py").write_text(TESTS)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "out").mkdir()
    started = []

    def start(*steps: str, limit: int = 300) -> subprocess.Popen:
        own = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
        tests = f"-n 2 {tmp_path}/test_numbers.py"
        settings = dict(PYTHON=f"{tmp_path}/python", OUT=f"{tmp_path}/out", TESTS=tests, LIMIT=str(limit))
        command = ["bash", ROOT / "benchmarks" / "gpu.sh", *steps]
        with (tmp_path / "said").open("w") as said:
            started.append(
                subprocess.Popen(
                    command, env=own | settings, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
                )
            )
        return started[-1]

    yield start
    for process in started:
        end(process)


def running(process: subprocess.Popen) -> list[int]:
    """What is left of the session that a process leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if int(session) == process.pid and state != "Z" else []
    return found


def end(process: subprocess.Popen) -> None:
    while left := running(process):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()


def is_over(process: subprocess.Popen) -> bool:
    """Whether nothing of the session runs any more, or soon will not."""
    deadline = time.monotonic() + 15
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(process)


def told(out: Path) -> list[dict]:
    """What results.jsonl says; every line of it is whole, and so is every line for people."""
    texts = [file.read_text() for file in out.glob("results.*")]
    assert all(text == "" or text.endswith("\n") for text in texts)
    return [json.loads(line) for file in out.glob("results.jsonl") for line in file.read_text().splitlines()]


def of(kind: str, lines: list[dict]) -> list:
    return [line[kind] for line in lines if kind in line]


def test_a_visit_tells_each_test_each_measurement_and_each_step(visit, tmp_path):
    process = visit("tests", "fails", "tiny")
    assert process.wait(timeout=120) == 1
    lines, said = told(tmp_path / "out"), (tmp_path / "said").read_text()
    assert sorted(of("outcome", lines)) == ["failed"] + 11 * ["passed"]
    (failed,) = (line for line in lines if line.get("outcome") == "failed")
    assert failed["test"].endswith("test_one[3]") and failed["error"] == "AssertionError: three is wrong"
    assert of("task", lines) == ["gelu", "rotary"] and of("case", lines) == ["tiny"]
    assert list(zip(of("step", lines), of("code", lines), strict=True)) == [("tests", 1), ("fails", 1), ("tiny", 0)]
    assert "test_one[3]: AssertionError: three is wrong\ntests: " in said and "1 failed, 11 passed" in said
    assert "exit code 1 RuntimeError: an illegal memory access\n  gelu: ours " in said
    assert "without Liger (ModuleNotFoundError: No module named 'no_such_package')\n" in said
    assert (tmp_path / "out" / "results.txt").read_text() in said


def test_a_step_that_hangs_leaves_the_others_their_share(visit, tmp_path):
    started = time.monotonic()
    process = visit("hangs", "fails", limit=6)
    assert process.wait(timeout=60) == 1
    assert of("code", told(tmp_path / "out")) == [124, 1] and is_over(process)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("how", "lines"), [*zip(2 * KILLS, MOMENTS, strict=True)])
def test_killed_at_any_moment_it_has_told_what_it_knew(how, lines, visit, tmp_path):
    """A moment is so many written lines; some fall into the tests and some into the case."""
    out = tmp_path / "out"
    process = visit("tests", "fails", "tiny")
    while process.poll() is None and len(told(out)) < lines:
        time.sleep(0.01)
    os.killpg(process.pid, how)
    assert process.wait(timeout=30) in (-how, 128 + how)
    if how == signal.SIGKILL:  # what it had started does not hear of it
        end(process)
    assert is_over(process)
    done = len((tmp_path / "done").read_text().splitlines()) if (tmp_path / "done").exists() else 0
    cases = sum(len(file.read_text().splitlines()) for file in out.glob("kept/*"))
    assert len(told(out)) >= lines
    assert 0 <= done - len(of("outcome", told(out))) <= 4  # on their way from two workers
    assert 0 <= cases - len(of("case", told(out))) <= 1
