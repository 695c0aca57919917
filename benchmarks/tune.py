"""Which launch of each kernel is fastest. It says which line of a launch table to change, and changes none.

    python -m benchmarks.tune --list
    python -m benchmarks.tune --op attention_forward,attention_dq

Candidates are compiled ahead of time, and those over a budget are dropped: that needs no GPU. On one the others must
compute what the shipped launch computes; then they are timed in turns, and the JSON line of each op is added to
benchmarks/results/<device>.jsonl. The library itself runs what stands in its tables, and nothing of this.

Without a GPU the static model ranks them. It knows how busy each unit is but nothing of latency: they go by the
efficiency that the busiest unit allows, and where that is the same by how busy all units are together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import product
from typing import NamedTuple

import torch
from triton.errors import TritonError

from benchmarks.harness import aot, gpu
from benchmarks.harness.aot import Row, violations
from benchmarks.harness.comparison import ROUNDING, Implementation, Outputs, poisoned_memory, relative_error
from benchmarks.harness.sass import CHIPS
from benchmarks.harness.spec import Entry, Launch, entries, label
from benchmarks.registry import GateError, Measure, Report, Spread
from benchmarks.run import columns, publish
from phi2_kernels._dispatch import architecture

OPS = entries()
ALLOWED = ROUNDING[torch.bfloat16]  # ||output - that of the shipped launch|| / ||that||
SETS = 4  # of inputs that the calls go around
ONE_BLOCK_M = ("attention_forward", "attention_dq")  # they read one table of key ranges, each for block_m queries
STILL = Spread(0, 0, 0)
Line = dict[str, str | int | float]


@dataclass(frozen=True)
class Candidate:
    """A launch, and what it compiles to in each form of the kernel (causal and packed, one row and eight, ...).

    The first form is the one that is timed, and ranks; budgets hold for all.
    """

    launch: Launch
    rows: list[Row]

    @property
    def faults(self) -> str:
        """Why it is dropped; empty for one that may be shipped."""
        return ", ".join(dict.fromkeys(text for row in self.rows for text in violations(row)))


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    row = candidate.rows[0]
    useful = row.efficiency * row.clocks[row.bound]
    return candidate.faults != "", -row.efficiency, sum(row.clocks.values()) / useful


def sieve(name: str, arch: int, launches: list[Launch] | None = None) -> list[Candidate]:
    """The launches of an entry from the best to the worst by the model, dropped ones last.

    Args:
        launches: default: those of its spec.
    """
    launches = launches or OPS[name].launches(arch)
    jobs = [(name, list(launch.values() if isinstance(launch, dict) else launch)) for launch in launches]
    return sorted(map(Candidate, launches, aot.rows_of(arch, jobs)), key=_rank)


class Timed(NamedTuple):
    """A launch and its microseconds."""

    launch: Launch
    time: Spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when a shipped launch is wrong or the compiler fails; 2 for an unknown op."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", default=",".join(OPS), help="what to tune, separated by commas; default: everything")
    parser.add_argument("--turns", type=int, default=30, help="how often each launch is timed")
    parser.add_argument("--list", action="store_true", help="say what there is to tune")
    options = parser.parse_args(arguments)
    names = options.op.split(",")
    if unknown := [name for name in names if name not in OPS]:
        print(f"--op must be some of {', '.join(OPS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if options.list:
        for (name, op), arch in product(OPS.items(), CHIPS):
            print(f"{name}, sm_{arch}:", "; ".join(label(launch) for launch in op.launches(arch)))
        return 0
    try:
        tune(names, options.turns)
    except (GateError, ChildProcessError) as error:
        print(f"no number: {error}", file=sys.stderr)
        return 1
    return 0


def tune(names: list[str], turns: int) -> None:
    """Prints a table for each op and architecture; on a GPU for its own, with times, and last what should change."""
    has_gpu = torch.cuda.is_available()
    arches = [architecture(gpu.device())] if has_gpu else list(CHIPS)
    timed: dict[str, list[Timed]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = list(product(names, arches))
        sieved = pool.map(lambda job: sieve(*job), jobs)
        for (name, arch), candidates in zip(jobs, list(sieved) if has_gpu else sieved, strict=True):
            if has_gpu:
                timed[name] = clock(name, arch, candidates, turns)
            else:
                show(name, arch, [line(name, arch, each, each.faults) for each in candidates])
    if has_gpu:
        print("\n".join(advice(proposals(timed, arches[0]), arches[0])))
    else:
        print("in the order of the static model; times need a GPU")


def clock(name: str, arch: int, candidates: list[Candidate], turns: int) -> list[Timed]:
    """Gates and times the shipped launch, which is the first of the result, and what the sieve let through.

    It prints and publishes the table too.

    Raises:
        GateError: when the shipped launch does not repeat its own numbers.
    """
    op, load = OPS[name], os.getloadavg()[0]
    faults = {label(each.launch): each.faults for each in candidates}
    launches = [op.shipped(arch), *(each.launch for each in candidates if each.launch != op.shipped(arch))]
    launches = [launch for launch in launches if launch == launches[0] or not faults[label(launch)]]
    faults |= differences(op, arch, launches)
    if faults[label(launches[0])]:
        raise GateError(f"{name}: the shipped launch, {label(launches[0])}: {faults[label(launches[0])]}")
    times = bench(op, arch, [launch for launch in launches if not faults[label(launch)]], turns)
    found = {label(timed.launch): timed.time for timed in times}
    table = [line(name, arch, each, faults[label(each.launch)], found) for each in candidates]
    show(name, arch, table)
    publish(f"tune_{name}", report(arch, times, table), load)
    return times


def differences(op: Entry, arch: int, launches: list[Launch]) -> dict[str, str]:
    """By launch, what it computes otherwise than the shipped one or why it cannot run; empty where all is well."""
    device = gpu.device()
    with poisoned_memory():
        expected = op.run(*op.inputs(device, 0))
        return {label(launch): _difference(op, arch, launch, device, expected) for launch in launches}


def _difference(op: Entry, arch: int, launch: Launch, device: torch.device, expected: Outputs) -> str:
    try:
        outputs = run(op, arch, launch, *op.inputs(device, 0))
    except TritonError as error:
        return str(error).strip().splitlines()[0]
    errors = {name: relative_error(outputs[name], expected[name]) for name in expected}
    return ", ".join(f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= ALLOWED)


def run(op: Entry, arch: int, launch: Launch, *inputs) -> Outputs:
    with op.launched_as(arch, launch):
        return op.run(*inputs)


def bench(op: Entry, arch: int, launches: list[Launch], turns: int) -> list[Timed]:
    ways = {label(launch): Implementation(partial(run, op, arch, launch)) for launch in launches}
    times = gpu.bench(partial(op.inputs, gpu.device()), ways, turns, SETS, op.in_graph)
    torch.cuda.empty_cache()
    return [Timed(launch, Spread.of([1e3 * time for time in times[label(launch)]])) for launch in launches]


def line(name: str, arch: int, candidate: Candidate, fault: str, times: dict[str, Spread] | None = None) -> Line:
    """Of the table; with columns of microseconds where there are times."""
    rows, first = candidate.rows, candidate.rows[0]
    verdict = "shipped" if candidate.launch == OPS[name].shipped(arch) else "dropped" if fault else ""
    time = (times or {}).get(label(candidate.launch))
    clocked = {"us": "", "20 %": "", "80 %": ""} if times else {}
    if time:
        clocked = {"us": round(time.median, 2), "20 %": round(time.low, 2), "80 %": round(time.high, 2)}
    return {
        "launch": label(candidate.launch),
        "regs": max(row.registers for row in rows),
        "stack B": max(row.stack for row in rows),
        "shared KiB": round(max(row.shared for row in rows) / 1024, 1),
        "warps an SM": first.programs * first.warps,
        "efficiency": first.efficiency,
        "bound by": first.bound,
        **clocked,
        "": f"{verdict}: {fault}" if fault else verdict,
    }


def show(name: str, arch: int, table: list[Line]) -> None:
    print(f"{name}, sm_{arch}", *columns(table), "", sep="\n")


def report(arch: int, times: list[Timed], table: list[Line]) -> Report:
    shipped, best = times[0], min(times, key=lambda timed: timed.time.median)
    return Report(
        peer={package: metadata.version(package) for package in ("triton", "torch")},
        gate=f"{len(times)} launches compute what the shipped one does, within {ALLOWED:g} of its size",
        measures=[Measure(f"{label(best.launch)}, shipped {label(shipped.launch)}", "us", best.time, shipped.time)],
        facts={"sm": arch},
        table=table,
    )


def proposals(timed: dict[str, list[Timed]], arch: int) -> dict[str, Launch]:
    """By op the launch that should replace the shipped one, because it saves more than both spread.

    Args:
        timed: by op, the shipped launch first.
    """
    groups = [ONE_BLOCK_M] if any(name in timed for name in ONE_BLOCK_M) else []
    groups += [(name,) for name in timed if name not in ONE_BLOCK_M]
    found: dict[str, Launch] = {}
    for group in groups:
        found |= _better(group, [timed.get(name) or [Timed(OPS[name].shipped(arch), STILL)] for name in group])
    return found


def _better(group: tuple[str, ...], choices: list[list[Timed]]) -> dict[str, Launch]:
    """The fastest launches of ops that are chosen together, with one block_m where they are two."""
    together = [c for c in product(*choices) if len(c) == 1 or len({timed.launch.block_m for timed in c}) == 1]
    best = min(together, key=lambda choice: sum(timed.time.median for timed in choice))
    pairs = {name: (choice[0], new) for name, choice, new in zip(group, choices, best, strict=True) if new != choice[0]}
    saved = sum(old.time.median - new.time.median for old, new in pairs.values())
    spread = sum(max(timed.time.high - timed.time.low for timed in pair) for pair in pairs.values())
    return {name: new.launch for name, (_, new) in pairs.items()} if saved > spread else {}


def advice(changes: dict[str, Launch], arch: int) -> list[str]:
    """What to write where."""
    if not changes:
        return ["no launch is faster than the shipped one by more than the spread"]
    return [f'{OPS[name].file}.py, LAUNCH[{arch}]: "{OPS[name].key}": {new},' for name, new in changes.items()]


if __name__ == "__main__":
    sys.exit(main())
