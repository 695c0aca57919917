"""Libraries compared: each lives in a process of its own, and they take turns at the same work.

What a process runs is a function `worker(timer, job)`. It prepares what it needs, then goes around

    timer.start()              waits for its turn, and starts the clock
    ...                        the work
    timer.stop()               stops the clock
    timer.report(loss=...)     what came of it

until `start` ends the process. A machine that slows down slows all, and the peak of a process's memory is the peak of
one library: on a GPU that of the memory that its torch has given out. What all report is compared after every turn:
that is the gate.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.registry import GateError, Measure

THREADS = 2  # of torch, in either process
WARM_UP = 2  # turns that are compared but not timed
MIB = 2**20
SETTINGS = {"OMP_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

Worker = Callable[["Timer", Any], None]


class Turn(NamedTuple):
    """One turn of a worker.

    Attributes:
        seconds, cpu_seconds: between `start` and `stop`, on the clock and of all the process's threads together.
        resident, peak: bytes of its memory before the first turn, and at most since the second one began.
        outcome: what was reported; both must report the same.
    """

    seconds: float
    cpu_seconds: float
    resident: int
    peak: int
    outcome: dict[str, Any]


class Timer:
    """The worker's end of the line."""

    def __init__(self, line: Connection, device: str) -> None:
        self._line, self._meter, self._resident, self._count = line, meter(device), 0, 0

    def start(self) -> None:
        if self._count == 0:
            self._resident = self._meter.held()
            self._line.send("ready")
        try:
            self._line.recv()
        except (EOFError, ConnectionResetError):  # the other end is closed: nothing more to do
            sys.exit()
        if self._count == 1:
            self._meter.forget_peak()
        self._meter.wait()
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self._meter.wait()
        self._took = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        self._count += 1

    def report(self, **outcome: Any) -> None:
        self._line.send(Turn(*self._took, self._resident, self._meter.peak(), outcome))


def memory(name: str) -> int:
    """Bytes of physical memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Meter(NamedTuple):
    """What the work of a process is measured with, by the device that does it.

    Attributes:
        wait: until the device has done all that it was given.
        held, peak: bytes of memory now, and at most since `forget_peak`.
    """

    wait: Callable[[], None]
    held: Callable[[], int]
    peak: Callable[[], int]
    forget_peak: Callable[[], None]


def meter(device: str) -> Meter:
    if device == "cpu":
        return Meter(lambda: None, partial(memory, "VmRSS"), partial(memory, "VmHWM"), forget_peak)
    from torch import cuda

    return Meter(cuda.synchronize, cuda.memory_allocated, cuda.max_memory_allocated, cuda.reset_peak_memory_stats)


class _Process:
    """A worker in its process."""

    def __init__(self, worker: Worker, job: Any, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self._line, theirs) = worker.__name__, context.Pipe()
        self._process = context.Process(target=_work, args=(worker, job, theirs, device), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        try:
            return self._line.recv()
        except EOFError:
            raise ChildProcessError(f"{self.name} ended before its turn was over; its error stands above") from None

    def turn(self) -> Turn:
        self._line.send("go")
        return self.wait()

    def stop(self) -> None:
        self._line.close()
        self._process.join()


def _work(worker: Worker, job: Any, line: Connection, device: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  trainers print; the report is the parent's
    worker(Timer(line, device), job)


class Result(NamedTuple):
    """All turns of both, warm-up first, and the largest difference between what they reported."""

    ours: list[Turn]
    theirs: list[Turn]
    largest_difference: dict[str, float]

    def agreement(self) -> str:
        """The gate in words."""
        apart = ", ".join(f"{name} by at most {value:.1e}" for name, value in self.largest_difference.items())
        return f"{len(self.ours)} turns, relative differences: {apart}"

    def relative(self, name: str, value: Callable[[Turn], float], **settings: Any) -> Measure:
        """Of the turns behind the warm-up, in units of the peer's median."""
        ours, theirs = ([value(turn) for turn in turns[WARM_UP:]] for turns in (self.ours, self.theirs))
        unit = np.median(theirs)
        return Measure.of(name, "relative", np.divide(ours, unit), np.divide(theirs, unit), **settings)

    def times(self, target: float | None, name: str = "") -> list[Measure]:
        """Of a turn, on the clock and of the processors."""
        return [
            self.relative(f"{name}time", lambda turn: turn.seconds, target=target),
            self.relative(f"{name}CPU time", lambda turn: turn.cpu_seconds),
        ]

    def speeds(self, **target: float) -> list[Measure]:
        """Turns per time, on the clock and of the processors."""
        return [
            self.relative("tok/s", lambda turn: 1 / turn.seconds, more_is_better=True, **target),
            self.relative("tokens per CPU time", lambda turn: 1 / turn.cpu_seconds, more_is_better=True, **target),
        ]

    def seconds_and_peak(self, name: str, time: float, peak: float) -> list[Measure]:
        """Seconds of a turn, and the most memory that torch gave out in one, weights included; with their targets."""
        seconds = ([turn.seconds for turn in turns[WARM_UP:]] for turns in (self.ours, self.theirs))
        gib = ([turns[-1].peak / 2**30] for turns in (self.ours, self.theirs))
        return [
            Measure.of(f"{name}: time", "s", *seconds, target=time),
            Measure.of(f"{name}: peak", "GiB", *gib, target=peak),
        ]

    def memory(self, **target: float) -> list[Measure]:
        """Peak of the whole process, and how far that is above what stood there before the first turn."""
        last = self.ours[-1], self.theirs[-1]
        peak, grown = ([turn.peak / MIB] for turn in last), ([(turn.peak - turn.resident) / MIB] for turn in last)
        return [
            Measure.of("peak RSS of the process", "MiB", *peak, **target),
            Measure.of("peak RSS above loaded model", "MiB", *grown, **target),
        ]


def compare(
    ours: Worker, theirs: Worker, job: Any, turns: int, tolerance: Mapping[str, float], device: str = "cpu"
) -> Result:
    """`compare_all` with one other."""
    (result,) = compare_all(ours, [theirs], job, turns, tolerance, device)
    return result


def compare_all(
    ours: Worker,
    others: Sequence[Worker],
    job: Any,
    turns: int,
    tolerance: Mapping[str, float],
    device: str = "cpu",
) -> list[Result]:
    """Lets all take `turns` turns behind the warm-up, one after the other; ours beside each of the others.

    Args:
        ours, others: importable functions; they are called in processes of their own.
        job: what all are given; it is pickled.
        tolerance: how far each thing that all report may differ from ours, as a share of its largest number.
        device: where all work, "cpu" or "cuda".
    Raises:
        GateError: as soon as one differs by more.
        ChildProcessError: when one fails.
    """
    with mock.patch.dict(os.environ, SETTINGS):
        processes = [_Process(worker, job, device) for worker in (ours, *others)]
    mine: list[Turn] = []
    results = [Result(mine, [], dict.fromkeys(tolerance, 0.0)) for _ in others]
    try:
        for process in processes:
            process.wait()
        for _ in range(WARM_UP + turns):
            for process, taken in zip(processes, [mine, *(result.theirs for result in results)], strict=True):
                taken.append(process.turn())
            for result in results:
                _require_agreement(result, tolerance)
    finally:
        for process in processes:
            process.stop()
    return results


def _require_agreement(result: Result, tolerance: Mapping[str, float]) -> None:
    """Of both sides' last turns; notes how far they are apart."""
    for name, allowed in tolerance.items():
        mine, reference = (np.asarray(taken[-1].outcome[name], dtype=float) for taken in (result.ours, result.theirs))
        apart = float(np.abs(mine - reference).max() / max(np.abs(reference).max(), 1e-12))
        result.largest_difference[name] = max(result.largest_difference[name], apart)
        if not apart <= allowed:
            number = len(result.ours)
            raise GateError(f"turn {number}: {name} differs by {apart:.1e} of its size, allowed {allowed:.0e}")
