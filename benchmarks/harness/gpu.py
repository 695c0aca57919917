"""What the cases on a GPU have in common: sides of one task, the gate before the clock, and the limits of the device.

A task is one piece of work with a reference in float32, our side, and peers. The gate lets every side compute fresh
inputs: ours must be right, or there is no number; a peer that is missing, fails or computes something else is left out
and the report says why. Sides that stand are timed in turns, one call each, so that a clock that drops slows all.

Only the clock needs a GPU: the gate runs on a CPU too, where the kernels are interpreted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import stream
from benchmarks.registry import GateError, Measure, Report, Spread

Inputs = tuple[Any, ...]
Outputs = dict[str, Tensor]

OURS = "ours"
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # ||out - ref|| / ||ref|| that is right
WRONG = 0.1  # of that, what no rounding explains
WARM_UP = 5  # turns that are not timed
FLUSH_BYTES = 2 * 2**30  # written before each call: empties the caches, and lets the host run ahead of the GPU
PACKAGES = ("torch", "triton", "transformers", "liger-kernel")
PEER_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


class DeviceError(Exception):
    """This machine lacks the device that a case needs."""


def device() -> torch.device:
    """The GPU.

    Raises:
        DeviceError: where there is none.
    """
    if not torch.cuda.is_available():
        raise DeviceError("it needs a CUDA GPU, and torch sees none on this machine")
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Side:
    """One way to do a task.

    Attributes:
        run: what is timed: inputs to outputs by name.
        prepare: from the inputs of the task to those of `run`, before the clock.
        finish: from the outputs of `run` to those of the reference, for the gate.
        is_compared: False for a side that does part of the work only, to say how long that part takes.
    """

    run: Callable[..., Outputs]
    prepare: Callable[..., Inputs] = lambda *inputs: inputs
    finish: Callable[[Outputs], Outputs] = lambda outputs: outputs
    is_compared: bool = True


class Work(NamedTuple):
    """What a task needs at least: operations of its matmuls, and bytes of inputs and outputs, each counted once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Task:
    """The same work for all sides.

    Attributes:
        inputs: fresh ones of a seed.
        plain: torch in the same dtype; ours may be twice as far from the reference as it is.
        peers: functions that make a side; they may raise `PEER_ERRORS`.
        rounding: how far any output may be from the reference's, ||out - ref|| / ||ref||.
        targets: of the ratio to a peer; a name that ends in * means the fastest peer whose name begins so.
        per_second: how many of what one call does, for a measure of speed; without it the measure is of time.
        peak_limit: GB that our side may allocate beside its inputs.
        sets: how many inputs the calls go around.
        in_graph: the calls are so short that they are timed as one CUDA graph that goes around all sets.
        is_fact: stands in the table only.
    """

    name: str
    inputs: Callable[[int], Inputs]
    reference: Callable[..., Outputs]
    ours: Side
    plain: Side
    peers: dict[str, Callable[[], Side]]
    work: Work
    rounding: float
    targets: dict[str, float] = field(default_factory=dict)
    per_second: tuple[float, str] | None = None
    peak_limit: float | None = None
    sets: int = 3
    in_graph: bool = False
    is_fact: bool = False


def pulled_back(forward: Callable[..., Tensor], names: str) -> Callable[..., Outputs]:
    """A function's output and the gradients of those of its arguments that require one.

    Args:
        forward: takes as many tensors as there are names.
        names: of the arguments, separated by spaces. The result takes one tensor more, the gradient of the output.
    """

    def run(*inputs: Tensor) -> Outputs:
        *arguments, grad = inputs
        output = forward(*arguments)
        leaves = {name: x for name, x in zip(names.split(), arguments, strict=True) if x.requires_grad}
        grads = torch.autograd.grad(output, list(leaves.values()), grad)
        return {"output": output.detach(), **{f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)}}

    return run


def in_float32(*inputs: Tensor) -> Inputs:
    """Copies of the inputs, those of floating point as float32 leaves."""
    return tuple(
        x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x.clone() for x in inputs
    )


def random(seed: int, device: torch.device) -> Callable[..., Tensor]:
    """normal(*shape, dtype=..., scale=1.0, grad=False): random tensors, the same ones for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = False) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale
        return x.to(dtype).requires_grad_(grad)

    return normal


def compiled(function: Callable, device: torch.device) -> Callable:
    """By torch.compile on a GPU; as it is on a CPU, where only the gate runs."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


class Standing(NamedTuple):
    """What the gate found: sides that may be timed, the largest error of each, and why other peers are left out."""

    sides: dict[str, Side]
    errors: dict[str, float]
    absent: dict[str, str]


def gate(task: Task) -> Standing:
    """Lets every side compute fresh inputs.

    Raises:
        GateError: when our side is wrong.
    """
    inputs = task.inputs(0)
    expected = task.reference(*inputs)
    plain = _errors(task.plain, inputs, expected)
    with poisoned_memory():
        errors = _errors(task.ours, inputs, expected)
    for name, error in errors.items():
        allowed = min(WRONG, max(task.rounding, 2 * plain[name]))
        if not error <= allowed:
            raise GateError(f"{task.name}: {name} is off by {error:.1e} of its size, allowed {allowed:.1e}")
    found = Standing({OURS: task.ours}, {OURS: max(errors.values())}, {})
    for name, make in task.peers.items():
        reason = _admit(name, make, inputs, expected, found)
        if reason:
            found.absent[name] = reason
    return found


def _admit(name: str, make: Callable[[], Side], inputs: Inputs, expected: Outputs, found: Standing) -> str:
    """Adds a peer to those that stand, or says in one line why not."""
    from triton.errors import TritonError

    try:
        side = make()
        errors = _errors(side, inputs, expected)
    except (*PEER_ERRORS, TritonError) as error:
        return f"{type(error).__name__}: {str(error).strip()[:160]}".splitlines()[0]
    for output, error in errors.items():
        if not error <= WRONG:
            return f"{output} is off by {error:.1e} of its size"
    found.sides[name] = side
    found.errors[name] = max(errors.values(), default=math.nan)
    return ""


def _errors(side: Side, inputs: Inputs, expected: Outputs) -> dict[str, float]:
    outputs = side.run(*side.prepare(*inputs))
    if not side.is_compared:
        return {}
    outputs = side.finish(outputs)
    assert outputs.keys() == expected.keys(), (set(outputs), set(expected))
    return {name: relative_error(outputs[name], expected[name]) for name in expected}


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||; infinite for another shape."""
    if output.shape != reference.shape:
        return math.inf
    apart = torch.linalg.vector_norm(output.double() - reference.double())
    return (apart / torch.linalg.vector_norm(reference.double()).clamp(min=1e-30)).item()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is full of NaN, which torch does in its deterministic mode: an output nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ops that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Rates(NamedTuple):
    """How fast a device is: half-precision matmuls in TFLOP/s, memory in GB/s."""

    tflops: float
    gbytes: float

    def floor(self, work: Work) -> float:
        """The roofline: the milliseconds that work takes at least."""
        return max(work.flops / self.tflops / 1e9, work.bytes / self.gbytes / 1e6)


DATASHEET = {  # dense, of the name that CUDA gives
    "A100-SXM4-40GB": Rates(312, 1555),
    "A100-SXM4-80GB": Rates(312, 2039),
    "A100-PCIE-40GB": Rates(312, 1555),
    "A100 80GB PCIe": Rates(312, 1935),
    "H100 PCIe": Rates(756, 2000),
    "H100 80GB HBM3": Rates(989, 3350),
    "H200": Rates(989, 4800),
}


def datasheet() -> Rates | None:
    """Of this device; None when it is not in the table."""
    name = torch.cuda.get_device_name()
    return next((rates for key, rates in DATASHEET.items() if key in name), None)


def measured_rates() -> Rates:
    """Of a large copy, bytes read plus bytes written, and of a large bfloat16 matmul of random numbers."""
    side, count = 8192, 2**29
    normal = random(0, torch.device("cuda"))
    a, b = (normal(side, side, dtype=torch.bfloat16) for _ in range(2))
    c, source = torch.empty_like(a), normal(count, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = laps({"matmul": [lambda: torch.mm(a, b, out=c)], "copy": [lambda: target.copy_(source)]}, turns=20)
    matmul, copy = (Spread.of(times[name]).median for name in ("matmul", "copy"))
    return Rates(2 * side**3 / matmul / 1e9, 4 * count / copy / 1e6)


def laps(calls: dict[str, list[Callable[[], Any]]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each timed call of each side; a side's calls go around, and sides take turns."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(WARM_UP + turns):
        for name, around in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            around[turn % len(around)]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs[WARM_UP:]] for name, pairs in events.items()}


def race(
    inputs: Callable[[int], Inputs], sides: dict[str, Side], turns: int, sets: int, in_graph: bool
) -> dict[str, list[float]]:
    """Milliseconds of `turns` calls of each side; arguments as the attributes of `Task`."""
    made = [inputs(seed) for seed in range(1, sets + 1)]
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, side in sides.items():
        own = [partial(side.run, *side.prepare(*each)) for each in made]
        for call in own:  # compiles, and lets libraries make their plans
            call()
        calls[name] = [_captured(own)] if in_graph else own
    share = sets if in_graph else 1
    return {name: [time / share for time in times] for name, times in laps(calls, turns).items()}


def _captured(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """All calls as one CUDA graph. It knows their inputs by address only, so the calls live as long as it does."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda _kept=tuple(calls): graph.replay()


def peak_memory(side: Side, inputs: Inputs) -> float:
    """GB that one call allocates at most beside its inputs; what it returns is part of it."""
    own = side.prepare(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.run(*own)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def report(tasks: list[Task], turns: int, facts: dict[str, str | int | float]) -> Report:
    """Gate, clock and roofline of each task.

    Raises:
        GateError: when our side of one is wrong; then no task has a number.
    """
    found = [gate(task) for task in tasks]
    measured, promised = measured_rates(), datasheet()
    facts = {**facts, "limits": _limits(measured, promised)}
    measures, table = [], []
    for task, standing in zip(tasks, found, strict=True):
        facts |= {f"{task.name}, without {name}": reason for name, reason in standing.absent.items()}
        peaks = {name: peak_memory(side, task.inputs(0)) for name, side in standing.sides.items()}
        times = race(task.inputs, standing.sides, turns, task.sets, task.in_graph)
        torch.cuda.empty_cache()
        measures += [] if task.is_fact else [*_speeds(task, times), *_peaks(task, peaks)]
        rows = [_row(task, name, times[name], peaks[name], standing, measured, promised) for name in times]
        stream.task_measured(rows, standing.absent)
        table += rows
    errors = max(standing.errors[OURS] for standing in found)
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return Report(versions, f"all outputs within {errors:.1e} of their size of float32", measures, facts, table)


def _limits(measured: Rates, promised: Rates | None) -> str:
    sheet = f"{promised.tflops:g} and {promised.gbytes:g}" if promised else "not known here"
    return f"measured {measured.tflops:.0f} TFLOP/s and {measured.gbytes:.0f} GB/s, by the datasheet {sheet}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _speeds(task: Task, times: dict[str, list[float]]) -> list[Measure]:
    """Ours beside each peer, and beside the fastest of those that a target names together."""
    peers = {name: (name, task.targets.get(name)) for name in times if name != OURS}
    for pattern in (pattern for pattern in task.targets if pattern.endswith("*")):
        matching = [name for name in peers if name.startswith(pattern[:-1])]
        if matching:
            fastest = min(matching, key=lambda name: Spread.of(times[name]).median)
            peers[f"best {pattern}"] = fastest, task.targets[pattern]

    def spread(name: str) -> Spread:
        amount = task.per_second and task.per_second[0]
        return Spread.of([amount * 1e3 / time for time in times[name]] if amount else times[name])

    unit, more = (task.per_second[1], True) if task.per_second else ("ms", False)
    return [
        Measure(f"{task.name}: {label}", unit, spread(OURS), spread(peer), target, more)
        for label, (peer, target) in peers.items()
    ]


def _peaks(task: Task, peaks: dict[str, float]) -> list[Measure]:
    if task.peak_limit is None:
        return []
    ours, limit = Spread.of([peaks[OURS]]), Spread.of([task.peak_limit])
    return [Measure(f"{task.name}: peak, allowed", "GB", ours, limit, target=1.0)]


def _row(
    task: Task, name: str, times: list[float], peak: float, standing: Standing, measured: Rates, promised: Rates | None
) -> dict[str, str | int | float]:
    """A line of the table. A side's share is the roofline's time by its own."""
    low, median, high = Spread.of(times)
    return {
        "task": task.name,
        "side": name,
        "ms": round(median, 4),
        "20 %": round(low, 4),
        "80 %": round(high, 4),
        "TFLOP/s": round(task.work.flops / median / 1e9, 1),
        "GB/s": round(task.work.bytes / median / 1e6),
        "GFLOP": round(task.work.flops / 1e9, 3),
        "MB": round(task.work.bytes / 1e6, 3),
        "roofline ms": round(measured.floor(task.work), 4),
        "share": round(measured.floor(task.work) / median, 3),
        "of datasheet": round(promised.floor(task.work) / median, 3) if promised else "",
        "peak GB": round(peak, 3),
        "error": "" if math.isnan(standing.errors[name]) else f"{standing.errors[name]:.1e}",
    }
