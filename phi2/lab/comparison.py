"""A comparison as an object: what its folder holds, as arrays to compute with and tables to look at.

comparison = phi2.Comparison("runs/compare")  # as `phi2.compare(...)` returns it
comparison.metrics["accuracy"]  # (variants, seeds)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi2.files import read_json_lines, read_yaml
from phi2.lab.measure import measures
from phi2.lab.statistics import Estimate, holm, mean_interval, paired_interval, paired_p
from phi2.lab.variants import entry_of, name_of
from phi2.losses.knobs import nearest
from phi2.pages.charts import counted, number
from phi2.pages.page import picture
from phi2.runs.run import Run

SETTINGS, RESULTS, REPORT = "compare.yaml", "results.jsonl", "report.html"
LABELS = {  # metric -> head of its column; tasks stand behind the first three by their names
    "accuracy": "accuracy",
    "margin": "margin",
    "toy": "toy skills",
    "chosen_drift": "chosen drift",
    "rejected_drift": "rejected drift",
    "kl": "KL",
    "length": "length",
    "entropy": "entropy",
    "loss": "loss",
}
MAIN = tuple(LABELS)[:3]  # with the tasks, differences that the terminal shows
NOT_COMPARED = {"loss"}  # it says nothing beside another one
SIDES = ("chosen", "rejected")
DIFFERENCE = ("difference", "95 % interval", "p (Holm)")  # heads of what `difference_texts` gives


class Difference(NamedTuple):
    """What a variant has more than the baseline, over the same seeds: mean, 95 % interval, Holm's corrected p."""

    variant: str
    metric: str
    estimate: Estimate
    p: float


class Comparison:
    """What a comparison has left behind.

    Args:
        path: its folder.

    Attributes:
        path: the same.
        config: its settings, as compare.yaml holds them.
        rows: lines of results.jsonl, one for each variant and seed.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no finished comparison.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")
        if not (self.path / RESULTS).is_file():
            raise ValueError(f"{self.path} holds no finished comparison: it has no {RESULTS}")
        self.config: dict[str, Any] = read_yaml(self.path / SETTINGS)
        self.rows = read_json_lines(self.path / RESULTS)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def variants(self) -> list[str]:
        return [*dict.fromkeys(row["variant"] for row in self.rows)]

    @property
    def seeds(self) -> list[int]:
        return [*dict.fromkeys(row["seed"] for row in self.rows)]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        given = self.config["baseline"]
        return self.variants[0] if given is None else name_of(entry_of(given))

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """(variants, seeds) of each metric; NaN where there is none."""
        names = dict.fromkeys(name for row in self.rows for name in row["metrics"])
        values = {name: [row["metrics"].get(name) for row in self.rows] for name in names}
        shape = len(self.variants), len(self.seeds)
        return {name: np.array(of_one, dtype=float).reshape(shape) for name, of_one in values.items()}

    def runs(self, variant: str) -> list[Run]:
        """Its runs, one for each seed.

        Raises:
            ValueError: for a variant that is none.
        """
        if variant not in self.variants:
            known = ", ".join(self.variants)
            raise ValueError(f"variant must be one of {known}, got {variant!r}{nearest(variant, self.variants)}")
        return [Run(self / row["run"]) for row in self.rows if row["variant"] == variant]

    def ended(self, variant: str) -> list[Run]:
        """Those of its runs that came to their end."""
        there = ["failure" not in row for row in self.rows if row["variant"] == variant]
        return [run for run, is_there in zip(self.runs(variant), there, strict=True) if is_there]

    @property
    def failures(self) -> list[str]:
        """Of each run that did not end, which it is and why."""
        return [
            f"{row['variant']}, seed {row['seed']} failed: {row['failure']}" for row in self.rows if "failure" in row
        ]

    @cached_property
    def differences(self) -> list[Difference]:
        """Every other variant against the baseline, in every metric."""
        others = [variant for variant in self.variants if variant != self.baseline]
        found = []
        matched = {"kl"} if self.config["match"] == "kl" else set()
        for metric in (name for name in self.compared if name not in matched):
            of = dict(zip(self.variants, self.metrics[metric], strict=True))
            p_values = holm([paired_p(of[variant], of[self.baseline]) for variant in others])
            for variant, p in zip(others, p_values, strict=True):
                found.append(Difference(variant, metric, paired_interval(of[variant], of[self.baseline]), p))
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """Those that the runs were asked, beside the toy skills; a metric of each."""
        return [name for name in self.metrics if name not in LABELS and name != "step" and "/" not in name]

    @property
    def main(self) -> list[str]:
        """Metrics of quality, in the order of the table."""
        return [*(name for name in MAIN if name in self.metrics), *self.tasks]

    @property
    def shown(self) -> list[str]:
        """Metrics of the table, in its order."""
        return self.main + [name for name in LABELS if name in self.metrics and name not in MAIN]

    @property
    def compared(self) -> list[str]:
        """Metrics with differences to the baseline."""
        return [name for name in self.shown if name not in NOT_COMPARED]

    @property
    def header(self) -> list[str]:
        return ["variant", *map(label, self.shown)]

    @property
    def cells(self) -> list[list[str]]:
        """The table below its header: means over the seeds, with half the width of their 95 % intervals."""
        return [
            [variant, *(estimate_text(mean_interval(self.metrics[name][i])) for name in self.shown)]
            for i, variant in enumerate(self.variants)
        ]

    @property
    def about(self) -> str:
        """How the numbers were made, for below the table."""
        seeds = counted(len(self.seeds), "seed")
        return f"Held-out pairs, {self.place}; mean ± half of Student's 95 % interval over {seeds}."

    @property
    def place(self) -> str:
        """Where on their way the runs are compared."""
        if self.config["match"] == "steps":
            return "behind the last update"
        there = [row["metrics"]["kl"] for row in self.rows if "kl" in row["metrics"]]
        missing = sum(not row["metrics"] and "failure" not in row for row in self.rows)
        told = f", where {missing} of {len(self.rows)} runs have no value, nor has their mean" if missing else ""
        return f"at a KL of {number(there[0])} nats from the reference{told}"

    @property
    def main_differences(self) -> list[list[str]]:
        """A table with its header: of each variant the differences in the metrics of `main`."""
        shown = [one for one in self.differences if one.metric in self.main]
        rows = {one.variant: [one.variant] for one in shown}
        for one in shown:
            rows[one.variant] += difference_texts(one)
        metrics = dict.fromkeys(label(one.metric) for one in shown)
        head = [f"minus {self.baseline}", *(name for metric in metrics for name in (metric, *DIFFERENCE[1:]))]
        return [head, *rows.values()]

    def figure(self, metric: str) -> str:
        """Differences to the baseline in a metric, with their 95 % intervals: an SVG document.

        Raises:
            ValueError: for a metric that is not compared, or of which a single seed tells no interval.
        """
        from phi2.lab.compare_report import difference_figure

        if metric not in self.compared:
            known = self.compared
            raise ValueError(f"metric must be one of {', '.join(known)}, got {metric!r}{nearest(metric, known)}")
        drawn = difference_figure(self, metric)
        if not drawn:
            raise ValueError(f"no variant has a difference in {metric} with an interval: it takes two seeds or more")
        return picture(drawn)

    def __str__(self) -> str:
        parts = [columns([self.header, *self.cells]), self.about, *self.failures]
        if self.differences:
            parts += ["", columns(self.main_differences)]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from phi2.lab.compare_report import comparison_cell

        return comparison_cell(self)


def curve_of(run: Run) -> list[dict[str, float]]:
    """What each evaluation of a run found: its step, and metrics by the names of `LABELS`."""
    found = run.evaluations
    lines = [{name: float(values[i]) for name, values in found.items()} for i in range(len(found.get("step", ())))]
    measured = {line["step"]: line for line in measures(run.path)}
    return [_evaluation(line) | _with_margin(measured[line["step"]]) for line in lines]


def _evaluation(line: Mapping[str, float]) -> dict[str, float]:
    found = {"step": line["step"], "loss": line["eval_loss"]}
    if "eval_ref_logps/chosen" not in line:
        return found
    drifts = {f"{side}_drift": line[f"eval_logps/{side}"] - line[f"eval_ref_logps/{side}"] for side in SIDES}
    return found | _with_margin({"accuracy": line["eval_rewards/accuracies"], **drifts})


def _with_margin(found: Mapping[str, float]) -> dict[str, float]:
    """In nats, whatever the loss multiplies it by."""
    margin = {"margin": found["chosen_drift"] - found["rejected_drift"]} if "chosen_drift" in found else {}
    return {**found, **margin}


def at_kl(curve: Sequence[Mapping[str, float]], kl: float) -> dict[str, float]:
    """The metrics of a run where it first is this far from the reference, on a straight line between two evaluations.

    The line is one over the square root of the KL: for small steps the KL is quadratic in what log-probabilities have
    moved. Empty where the first evaluation is beyond it already, and where none is.
    """
    behind = next((i for i, found in enumerate(curve) if found["kl"] >= kl), None)
    if behind is None or (behind == 0 and curve[0]["kl"] > kl):
        return {}
    before, after = curve[max(0, behind - 1)], curve[behind]
    apart = sqrt(after["kl"]) - sqrt(before["kl"])
    share = (sqrt(kl) - sqrt(before["kl"])) / apart if apart else 1.0
    names = [name for name in before if name in after]
    return {name: before[name] + share * (after[name] - before[name]) for name in names} | {"kl": kl}


def farthest_common_kl(curves: Sequence[Sequence[Mapping[str, float]]]) -> float:
    """The largest KL that every run reaches."""
    return min(max(found["kl"] for found in curve) for curve in curves)


def label(metric: str) -> str:
    """The head of a metric's column."""
    return LABELS.get(metric, metric)


def estimate_text(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return "-"
    return number(estimate.mean, 3) + ("" if np.isnan(estimate.half) else f" ± {number(estimate.half, 2)}")


def difference_texts(one: Difference) -> list[str]:
    """Difference, interval, p-value."""
    mean, low, high = one.estimate
    if np.isnan(mean):
        return ["-", "-", "-"]
    interval = "-" if np.isnan(low) else f"{_signed(low)} to {_signed(high)}"
    return [_signed(mean), interval, "-" if np.isnan(one.p) else f"{one.p:.3f}" if one.p >= 0.001 else "< 0.001"]


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value, 3)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Texts in columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
