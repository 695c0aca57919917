"""The half of the tuner that needs no GPU: candidates are compiled ahead of time, and those over a budget are dropped.

The others are ranked by the static model, which knows how busy each unit is but nothing of latency: by the efficiency
that the busiest unit allows, and where that is the same by how busy all units are together.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from benchmarks.harness.aot import Row, compile_only, distinct, printed_by, row_of, violations
from benchmarks.harness.spec import OPS, Launch, launched_as


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
    """The launches of an op from the best to the worst by the model, dropped ones last.

    Args:
        launches: default: those of `OPS`.
    """
    launches = launches or OPS[name].launches(arch)
    values = [list(launch.values()) if isinstance(launch, dict) else launch for launch in launches]
    found = json.loads(printed_by("benchmarks.harness.sieve", json.dumps([name, arch, values])))
    candidates = [Candidate(launch, [Row(**row) for row in rows]) for launch, rows in zip(launches, found, strict=True)]
    return sorted(candidates, key=_rank)


def compiled(name: str, arch: int, launch: Launch) -> list[Row]:
    """Of the process that has no interpreter."""
    op = OPS[name]
    with compile_only(arch, op.kernel) as launched, launched_as(op, arch, launch):
        op.compiles()
    rows = (row_of(*code, "candidate", arch) for code in distinct(launched))
    return [row for row in rows if op.has_made(row.launch)]


if __name__ == "__main__":
    name, arch, values = json.loads(sys.argv[1])
    launches = (OPS[name].launch(arch, each) for each in values)
    print(json.dumps([[asdict(row) for row in compiled(name, arch, launch)] for launch in launches]))
