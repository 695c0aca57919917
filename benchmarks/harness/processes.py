"""Two libraries side by side: each lives in a process of its own and they take turns at the same work.

A side is a function `side(turns, task)`. It prepares what it needs, then goes around

    turns.begin()              waits for its turn, and starts the clock
    ...                        the work
    turns.end()                stops the clock
    turns.report(loss=...)     what came of it

until `begin` ends the process. A machine that slows down slows both sides, and the peak of a process's memory is the
peak of one side. What both report is compared after every turn: that is the gate.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.registry import GateError, Measure, Spread

THREADS = 2  # of torch, in either process
WARM_UP = 2  # turns that are compared but not timed
MIB = 2**20

Side = Callable[["Turns", Any], None]


class Turn(NamedTuple):
    """One turn of a side.

    Attributes:
        seconds, cpu_seconds: between `begin` and `end`, on the clock and of all the process's threads together.
        flops: multiplications and additions of its matmuls; counted in the first turn only, which is slower for it.
        resident, peak: bytes of memory of the process before the first turn, and at most since the second one began.
        outcome: what the side reported; both must report the same.
    """

    seconds: float
    cpu_seconds: float
    flops: int
    resident: int
    peak: int
    outcome: dict[str, Any]


class Turns:
    """The side's end of the line."""

    def __init__(self, line: Connection) -> None:
        self._line, self._resident, self._flops = line, 0, 0
        self._count = 0

    def begin(self) -> None:
        if self._count == 0:
            self._resident = _memory("VmRSS")
            self._line.send("ready")
        try:
            self._line.recv()
        except (EOFError, ConnectionResetError):  # the other end is closed: nothing more to do
            sys.exit()
        self._counting = ExitStack()
        if self._count == 0:
            self._counter = self._counting.enter_context(flop_counter())
        if self._count == 1:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._took = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        self._counting.close()
        if self._count == 0:
            self._flops = self._counter.get_total_flops()
        self._count += 1

    def report(self, **outcome: Any) -> None:
        self._line.send(Turn(*self._took, self._flops, self._resident, _memory("VmHWM"), outcome))


def flop_counter():
    """torch's, which cannot look into our log-prob head."""
    from torch.utils.flop_counter import FlopCounterMode

    import phi2_kernels.linear_logprob  # noqa: F401  registers the ops

    ops = torch.ops.phi2
    formulas = {ops.linear_logprob: _head_flops, ops.linear_logprob_backward: _head_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _head_flops(hidden, weight, bias, targets, adapter_hidden, adapter_weight, entropy, save_grad, triton, **_) -> int:
    """Logits, and with `save_grad` the gradient of what they are made of. Shapes stand for tensors."""
    adapter = prod(adapter_hidden) if adapter_hidden else 0
    return (1 + save_grad) * 2 * weight[0] * (prod(hidden) + adapter)


def _head_backward_flops(
    grad, hidden, weight, bias, targets, adapter_hidden, adapter_weight, lse, needs, triton, **_
) -> int:
    """Logits once more, and a matmul for each gradient that is needed."""
    adapter = prod(adapter_hidden) if adapter_hidden else 0
    whole, low_rank = 1 + needs[0] + needs[1], 1 + needs[3] + needs[4]
    return 2 * weight[0] * (whole * prod(hidden) + low_rank * adapter)


def _memory(name: str) -> int:
    """Bytes of physical memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class _Process:
    """A side in its process."""

    def __init__(self, side: Side, task: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self._line, theirs) = side.__name__, context.Pipe()
        self._process = context.Process(target=_work, args=(side, task, theirs), daemon=True)
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


def _work(side: Side, task: Any, line: Connection) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  trainers print; the report is the parent's
    torch.set_num_threads(THREADS)
    side(Turns(line), task)


class Duel(NamedTuple):
    """All turns of two sides, warm-up first, and the largest difference between what they reported."""

    ours: list[Turn]
    theirs: list[Turn]
    largest_difference: dict[str, float]

    def times(self, **target: Any) -> list[Measure]:
        """Time of a turn in units of the peer's median, on the clock and of the processors."""
        return [
            Measure("time", "relative", *self._relative(lambda turn: turn.seconds), **target),
            Measure("CPU time", "relative", *self._relative(lambda turn: turn.cpu_seconds)),
        ]

    def speeds(self, **target: Any) -> list[Measure]:
        """Turns per time in units of the peer's median, on the clock and of the processors."""
        more = dict(more_is_better=True)
        return [
            Measure("tok/s", "relative", *self._relative(lambda turn: 1 / turn.seconds), **target, **more),
            Measure("tokens per CPU time", "relative", *self._relative(lambda turn: 1 / turn.cpu_seconds), **more),
        ]

    def _relative(self, value: Callable[[Turn], float]) -> tuple[Spread, Spread]:
        mine, reference = ([value(turn) for turn in turns[WARM_UP:]] for turns in (self.ours, self.theirs))
        unit = Spread.of(reference).median
        return Spread.of([v / unit for v in mine]), Spread.of([v / unit for v in reference])

    def flops(self) -> Measure:
        return _single("matmul work", "GFLOP", *(turns[0].flops / 1e9 for turns in self[:2]))

    def memory(self, **target: Any) -> list[Measure]:
        """Peak of the whole process, and how far that is above what stood there before the first turn."""
        last = self.ours[-1], self.theirs[-1]
        peaks = [turn.peak / MIB for turn in last]
        grown = [(turn.peak - turn.resident) / MIB for turn in last]
        return [
            _single("peak RSS of the process", "MiB", *peaks, **target),
            _single("peak RSS above loaded model", "MiB", *grown, **target),
        ]


def _single(name: str, unit: str, ours: float, theirs: float, **target: Any) -> Measure:
    return Measure(name, unit, Spread(ours, ours, ours), Spread(theirs, theirs, theirs), **target)


def duel(ours: Side, theirs: Side, task: Any, turns: int, tolerance: Mapping[str, float]) -> Duel:
    """Lets both sides take `turns` turns behind the warm-up, one after the other.

    Args:
        ours, theirs: importable functions; they are called in processes of their own.
        task: what both are given; it is pickled.
        tolerance: how far each thing that both report may differ, as a share of its largest number.
    Raises:
        GateError: as soon as they differ by more.
        ChildProcessError: when a side fails.
    """
    sides = [_Process(side, task) for side in (ours, theirs)]
    done: tuple[list[Turn], list[Turn]] = [], []
    differences = dict.fromkeys(tolerance, 0.0)
    try:
        for side in sides:
            side.wait()
        for number in range(1, WARM_UP + turns + 1):
            for side, taken in zip(sides, done, strict=True):
                taken.append(side.turn())
            for name, allowed in tolerance.items():
                mine, reference = (torch.as_tensor(taken[-1].outcome[name]).double() for taken in done)
                apart = ((mine - reference).abs().max() / reference.abs().max().clamp(min=1e-12)).item()
                differences[name] = max(differences[name], apart)
                if not apart <= allowed:
                    raise GateError(f"turn {number}: {name} differs by {apart:.1e} of its size, allowed {allowed:.0e}")
    finally:
        for side in sides:
            side.stop()
    return Duel(*done, differences)
