"""Which launch of each kernel is fastest. It says so, and changes no launch table.

    python -m benchmarks.tune                               every entry of every table
    python -m benchmarks.tune attention_forward attention_dq

Candidates are compiled ahead of time, and those over a budget are dropped: without a GPU that is all. On one the others
must compute what the shipped launch computes; then they are timed beside it, a case of benchmarks.run for each entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks import run
from benchmarks.harness import aot, gpu
from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Inputs, Outputs
from benchmarks.harness.spec import ARCHITECTURES, ENTRIES, Launch, label
from benchmarks.registry import CASES, Case, Report, versions
from phi2_kernels._dispatch import architecture


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of benchmarks.run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("entries", nargs="*", help=f"some of {', '.join(ENTRIES)}; default: all")
    names = parser.parse_args(arguments).entries or list(ENTRIES)
    if unknown := set(names) - set(ENTRIES):
        parser.error(f"entries must be some of {', '.join(ENTRIES)}, got {', '.join(sorted(unknown))}")
    for name in names:
        CASES[f"tune_{name}"] = Case(partial(tune, name), 30, f"launches of {name}")
    return run.main([f"--case=tune_{name}" for name in names])


def tune(name: str, turns: int) -> Report:
    """Times the launches of an entry; where there is no GPU, says what they occupy on those that are known."""
    has_gpu = torch.cuda.is_available()
    arches = [architecture(gpu.device())] if has_gpu else ARCHITECTURES
    jobs = [(arch, name, launch) for arch in arches for launch in ENTRIES[name].launches(arch)]
    compiled = list(zip(jobs, aot.compiled(jobs), strict=True))
    if not has_gpu:
        table = [{"candidate": label(job[2]), **row.cells} for job, rows in compiled for row in rows]
        return Report(versions("triton"), "compiled only: times need a GPU", [], {}, table)
    faults = {label(job[2]): sum((row.violations for row in rows), []) for job, rows in compiled}
    kept = [launch for _, _, launch in jobs if not faults[label(launch)]]
    dropped = {f"dropped {text}": ", ".join(dict.fromkeys(found)) for text, found in faults.items() if found}
    return gpu.report([compare_launches(name, arches[0], kept)], turns, {"shipped": label(kept[0]), **dropped})


def compare_launches(name: str, arch: int, launches: list[Launch]) -> Comparison:
    """The shipped launch, which is the first one, beside the others."""
    entry = ENTRIES[name]

    def launched_as(launch: Launch, *inputs: dict) -> Outputs:
        with entry.launched_as(arch, launch):
            return entry.run(*inputs)

    shipped, *others = (Implementation(partial(launched_as, launch), prepare=_copies) for launch in launches)
    return Comparison(
        name=name,
        inputs=partial(entry.inputs, gpu.device()),
        reference=lambda *inputs: entry.run(*_copies(*inputs)),
        ours=shipped,
        plain=shipped,
        peers={label(launch): lambda other=other: other for launch, other in zip(launches[1:], others, strict=True)},
        peers_are_ours=True,
        rounding=ROUNDING[torch.bfloat16],
        targets={"*": 1.0},
        in_graph=entry.in_graph,
    )


def _copies(*inputs: dict) -> Inputs:
    """Some kernels write over what they are given."""
    return tree_map_only(Tensor, torch.clone, inputs)


if __name__ == "__main__":
    sys.exit(main())
