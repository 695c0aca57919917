"""The benchmark cases by name, and what a case reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Cells = dict[str, str | int | float]  # values by name: facts, or a line of a table


class Spread(NamedTuple):
    """What repeated measurements gave: their median, and the quantiles 0.2 and 0.8 around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.quantile(values, (0.2, 0.5, 0.8)).tolist())


@dataclass(frozen=True)
class Measure:
    """One quantity on both sides.

    Attributes:
        unit: of `ours` and `theirs`; "relative" means in units of the peer's median, which is all that a time on a
            shared CPU can say.
        target: the ratio of the medians that this project wants to stay below (above, where `more_is_better`).
    """

    name: str
    unit: str
    ours: Spread
    theirs: Spread
    target: float | None = None
    more_is_better: bool = False

    @classmethod
    def of(cls, name: str, unit: str, ours: Sequence[float], theirs: Sequence[float], **target: Any) -> Measure:
        """Of all that was measured on both sides."""
        return cls(name, unit, Spread.of(ours), Spread.of(theirs), **target)

    @property
    def ratio(self) -> float:
        """Ours by theirs, of the medians."""
        return self.ours.median / self.theirs.median

    @property
    def is_met(self) -> bool:
        return self.target is None or (self.ratio >= self.target if self.more_is_better else self.ratio <= self.target)


@dataclass(frozen=True)
class Report:
    """What one run of a case found out.

    Attributes:
        peer: package -> version of what ours is compared with; the first is the one that is named.
        gate: what was equal on both sides, in words, before anything was measured.
        facts: settings and sizes that say what was measured.
        table: of what has no other side, its lines by column name.
    """

    peer: dict[str, str]
    gate: str
    measures: list[Measure]
    facts: Cells = field(default_factory=dict)
    table: list[Cells] = field(default_factory=list)


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    installed = {package.name.lower().replace("_", "-"): package.version for package in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


class GateError(Exception):
    """Both do not compute the same, so their speeds say nothing."""


class Case(NamedTuple):
    """A case: `run(turns)` measures that many repetitions.

    Attributes:
        tiny: what wants a GPU or a large model, on tiny shapes wherever it is: its gate counts, and its times do not.
    """

    run: Callable[[int], Report]
    turns: int
    summary: str
    tiny: Callable[[], Report] | None = None


CASES: dict[str, Case] = {}


def load() -> None:
    """Imports every file of benchmarks/cases: they register cases here, and ops in `harness/spec.py`."""
    for file in sorted(Path(__file__).parent.glob("cases/*.py")):
        import_module(f"benchmarks.cases.{file.stem}")


def case(
    name: str, turns: int, summary: str, tiny: Callable[[], Report] | None = None
) -> Callable[[Callable[[int], Report]], Callable[[int], Report]]:
    """Registers a case under a name, with its number of repetitions and one line of what is measured.

    Args:
        tiny: what `benchmarks.run --tiny` runs; see `Case`.
    """

    def register(run: Callable[[int], Report]) -> Callable[[int], Report]:
        assert name not in CASES, name
        CASES[name] = Case(run, turns, summary, tiny)
        return run

    return register
