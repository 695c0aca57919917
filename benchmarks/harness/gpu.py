"""The clock and the limits of a GPU.

What passed the gate is timed in turns, one call each, so that a clock that drops slows all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import stream
from benchmarks.harness.comparison import OURS, Comparison, Implementation, Inputs, Work, gate, random
from benchmarks.registry import Cells, Measure, Report, Spread, case, versions

WARM_UP = 5  # turns that are not timed
FLUSH_BYTES = 2 * 2**30  # written before each call: empties the caches, and lets the host run ahead of the GPU
IN_A_GRAPH = 8  # inputs that a graph of short calls goes around, for nothing empties the caches between them
PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


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


def gpu_case(
    name: str, turns: int, summary: str, tiny: Mapping[str, Any]
) -> Callable[[Callable[..., list[Comparison]]], Any]:
    """Registers what makes the comparisons of a case, given the GPU.

    Args:
        tiny: sizes in place of those that it has by default, for `benchmarks.run --tiny`: the gate alone, of the same
            comparisons, where kernels are interpreted if there is no GPU.
    """

    def register(make: Callable[..., list[Comparison]]):
        case(name, turns, summary, lambda: report_of_gate(make(any_device(), **tiny)))(
            lambda turns: report(make(device()), turns)
        )
        return make

    return register


def any_device() -> torch.device:
    """The GPU, or the CPU where there is none: what runs there means something, but not how fast."""
    return device() if torch.cuda.is_available() else torch.device("cpu")


class Rates(NamedTuple):
    """How fast a device is: half-precision matmuls in TFLOP/s, memory in GB/s."""

    tflops: float
    gbytes: float

    def floor(self, work: Work) -> float:
        """The roofline: the milliseconds that work takes at least."""
        return max(work.flops / self.tflops / 1e9, work.bytes / self.gbytes / 1e6)


def measured_rates() -> Rates:
    """Of a large copy, bytes read plus bytes written, and of a large bfloat16 matmul of random numbers."""
    side, count = 8192, 2**29
    normal = random(0, torch.device("cuda"))
    a, b = (normal(side, side) for _ in range(2))
    c, source = torch.empty_like(a), normal(count)
    target = torch.empty_like(source)
    times = timed({"matmul": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}, turns=20)
    matmul, copy = (Spread.of(times[name]).median for name in ("matmul", "copy"))
    return Rates(2 * side**3 / matmul / 1e9, 4 * count / copy / 1e6)


def timed(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each timed call by name; names take turns."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(WARM_UP + turns):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs[WARM_UP:]] for name, pairs in events.items()}


def bench(comparison: Comparison, implementations: dict[str, Implementation], turns: int) -> dict[str, list[float]]:
    """Milliseconds of `turns` calls of each implementation."""
    sets = IN_A_GRAPH if comparison.in_graph else 1
    inputs = [comparison.inputs(seed) for seed in range(1, sets + 1)]
    calls: dict[str, Callable[[], Any]] = {}
    for name, implementation in implementations.items():
        own = [partial(implementation.run, *implementation.prepare(*each)) for each in inputs]
        for call in own:  # compiles, and lets libraries make their plans
            call()
        calls[name] = _captured(own) if comparison.in_graph else own[0]
    return {name: [time / sets for time in times] for name, times in timed(calls, turns).items()}


def _captured(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """All calls as one CUDA graph. It knows their inputs by address only, so the calls live as long as it does."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda _kept=tuple(calls): graph.replay()


def peak_memory(implementation: Implementation, inputs: Inputs) -> float:
    """GB that one call allocates at most beside its inputs; what it returns is part of it."""
    own = implementation.prepare(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    implementation.run(*own)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def report(comparisons: list[Comparison], turns: int, facts: Cells | None = None) -> Report:
    """Gate, clock and roofline of each comparison.

    Raises:
        GateError: when ours is wrong in one; then none has a number.
    """
    gated = [gate(comparison) for comparison in comparisons]
    rates = measured_rates()
    facts = {**(facts or {}), "limits": f"measured {rates.tflops:.0f} TFLOP/s and {rates.gbytes:.0f} GB/s"}
    measures, table = [], []
    for each, passed in zip(comparisons, gated, strict=True):
        facts |= {f"{each.name}, without {name}": reason for name, reason in passed.absent.items()}
        peaks = {name: peak_memory(one, each.inputs(0)) for name, one in passed.implementations.items()}
        times = bench(each, passed.implementations, turns)
        torch.cuda.empty_cache()
        measures += _speeds(each, times)
        if limit := each.peak_limit:
            measures.append(Measure.of(f"{each.name}: peak, allowed", "GB", [peaks[OURS]], [limit], target=1.0))
        rows = [_row(each, name, times[name], peaks[name], passed.errors[name], rates) for name in times]
        stream.task_measured(rows, passed.absent)
        table += rows
    error = max(passed.errors[OURS] for passed in gated)
    return Report(
        versions(*PACKAGES), f"all outputs within {error:.1e} of their size of the reference", measures, facts, table
    )


def report_of_gate(comparisons: list[Comparison]) -> Report:
    """Gate of each comparison, and who passed it.

    Raises:
        GateError: when ours is wrong in one.
    """
    error, facts = 0.0, {}
    for each in comparisons:
        passed = gate(each)
        error = max(error, passed.errors[OURS])
        facts[each.name] = ", ".join(passed.implementations)
        facts |= {f"{each.name}, without {name}": reason for name, reason in passed.absent.items()}
    return Report(versions(*PACKAGES), f"all outputs within {error:.1e} of their size of the reference", [], facts)


def _speeds(comparison: Comparison, times: dict[str, list[float]]) -> list[Measure]:
    """Ours beside each peer, and beside the fastest of those that a target names together."""
    targets = comparison.targets
    peers = {name: (name, targets.get(name)) for name in times if name != OURS}
    for pattern in (pattern for pattern in targets if pattern.endswith("*")):
        matching = [name for name in times if name != OURS and name.startswith(pattern[:-1])]
        if matching:
            fastest = min(matching, key=lambda name: Spread.of(times[name]).median)
            peers[f"best {pattern}"] = fastest, targets[pattern]
    speeds = {name: [1e3 / x for x in xs] for name, xs in times.items()}
    return [
        Measure.of(
            f"{comparison.name}: {label}", "calls/s", speeds[OURS], speeds[peer], target=target, more_is_better=True
        )
        for label, (peer, target) in peers.items()
    ]


def _row(comparison: Comparison, name: str, times: list[float], peak: float, error: float, rates: Rates) -> Cells:
    """A line of the table. The share of an implementation is the roofline's time by its own."""
    low, median, high = Spread.of(times)
    row = {
        "task": comparison.name,
        "side": name,
        "ms": round(median, 4),
        "20 %": round(low, 4),
        "80 %": round(high, 4),
        "peak GB": round(peak, 3),
        "error": "" if math.isnan(error) else f"{error:.1e}",
    }
    if work := comparison.work:
        row |= {
            "TFLOP/s": round(work.flops / median / 1e9, 1),
            "GB/s": round(work.bytes / median / 1e6),
            "roofline ms": round(rates.floor(work), 4),
            "share": round(rates.floor(work) / median, 3),
        }
    return row
