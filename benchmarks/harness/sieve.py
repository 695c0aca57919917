"""The half of the tuner that needs no GPU: candidates are compiled ahead of time, and those over a budget are dropped.

The others are ranked by the static model, which knows how busy each unit is but nothing of latency: by the efficiency
that the busiest unit allows, and where that is the same by how busy all units are together.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import aot
from benchmarks.harness.aot import Row, violations
from benchmarks.harness.spec import Launch, entries


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
    launches = launches or entries()[name].launches(arch)
    jobs = [(name, list(launch.values() if isinstance(launch, dict) else launch)) for launch in launches]
    return sorted(map(Candidate, launches, aot.rows_of(arch, jobs)), key=_rank)
