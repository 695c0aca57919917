"""Scores of one model or several over the same samples, their differences, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phi2.evaluation.published import CARD
from phi2.evaluation.samples import INTERVAL, RIGHT, Sample, shares, standard_error
from phi2.evaluation.toy import Score as ToyScore

MEAN = "mean of its metrics"


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: in [0, 1] where the metric is a share.
        stderr: standard error, None where there is none.
        n: samples.
        values: (n,) what each sample contributes, see `shares`; None where the metric is no mean over them.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    values: np.ndarray | None = field(default=None, repr=False)

    @property
    def successes(self) -> int:
        """Samples that are right, where each is right or wrong."""
        return round(self.value * self.n)

    @property
    def is_share(self) -> bool:
        return self.values is not None and -1e-9 <= self.value <= 1 + 1e-9

    def __str__(self) -> str:
        if not self.is_share:
            return f"{self.value:.4g}" + ("" if self.stderr is None else f" ± {self.stderr:.2g}")
        return f"{100 * self.value:.2f}" + ("" if self.stderr is None else f" ± {100 * self.stderr:.2f}")


@dataclass(frozen=True)
class Difference:
    """What a model has more than the first one, over the same samples; with the ends of its 95 % interval."""

    task: str
    metric: str
    model: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


@dataclass(frozen=True)
class ModelResult:
    """Of one model: its scores in the order of the tasks, and every sample."""

    scores: list[Score]
    samples: list[Sample]

    def score(self, task: str, metric: str) -> Score | None:
        return next((score for score in self.scores if (score.task, score.metric) == (task, metric)), None)


@dataclass(frozen=True, repr=False)  # it would show every sample
class Evaluation:
    """What `phi2.evaluate` returns; printed, or shown in a notebook, it is the table.

    Attributes:
        models: by name; the first is what the others are compared with.
        notes: what a reader must know: versions, how prompts were shown.
        files: local ones that the tasks were read from, by task and split.
        output: the folder with results.json, samples/ and report.html; None when nothing was written.
    """

    models: dict[str, ModelResult]
    notes: list[str]
    files: dict[str, str] = field(default_factory=dict)
    output: Path | None = None

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(task, metric) of every line of the table."""
        lines = [(score.task, score.metric) for model in self.models.values() for score in model.scores]
        return list(dict.fromkeys(lines))

    @property
    def differences(self) -> list[Difference]:
        """Every later model against the first."""
        first, *later = self.models
        pairs = [(name, task, metric) for name in later for task, metric in self.rows]
        found = [_difference(self.models[first], self.models[name], name, task, metric) for name, task, metric in pairs]
        return [one for one in found if one is not None]

    def __str__(self) -> str:
        (first, *others) = self.models.values()
        if others or any(score.metric != RIGHT for score in first.scores):
            return "\n".join([_columns([self.header, *self.cells]), *self.notes])
        return "\n".join(f"{score.task:<12} {ToyScore(score.successes, score.n)}" for score in first.scores)

    @property
    def header(self) -> list[str]:
        first, *later = self.models
        compared = [f"{name} - {first}" for name in later]
        published = [f"{name}, published" for name in next(iter(CARD.values())).published] if self.has_card else []
        return ["task", "metric", "n", *self.models, *compared, *published]

    @property
    def later(self) -> list[str]:
        return [*self.models][1:]

    @property
    def has_card(self) -> bool:
        return any(task in CARD for task, _ in self.rows)

    @property
    def cells(self) -> list[list[str]]:
        """The table below its header."""
        differences = {(one.task, one.metric, one.model): str(one) for one in self.differences}
        lines, before = [], None
        for task, metric in self.rows:
            scores = {name: model.score(task, metric) for name, model in self.models.items()}
            counts = sorted({score.n for score in scores.values() if score})
            line = [task if task != before else "", _shown(metric), "/".join(map(str, counts))]
            line += [str(score or "") for score in scores.values()]
            line += [differences.get((task, metric, name), "") for name in self.later]
            if self.has_card:
                values = CARD[task].published.values() if task in CARD and task != before else []
                line += [f"{value:.2f}" for value in values] or [""] * 2
            lines.append(line)
            before = task
        return lines

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from phi2.evaluation.report import scores_cell

        return scores_cell(self)

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "notes": self.notes,
            "files": self.files,
            "models": {name: [_plain(score) for score in model.scores] for name, model in self.models.items()},
            "differences": [asdict(one) for one in self.differences],
            "published": {task: CARD[task].published for task, _ in self.rows if task in CARD},
        }


def _plain(score: Score) -> dict[str, Any]:
    return {"task": score.task, "metric": score.metric, "value": score.value, "stderr": score.stderr, "n": score.n}


def _shown(metric: str) -> str:
    """The harness writes metric,filter; its filter `none` says nothing."""
    return metric.removesuffix(",none").replace(",", ", ")


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def _difference(first: ModelResult, other: ModelResult, name: str, task: str, metric: str) -> Difference | None:
    """Paired: the spread is that of the differences of each sample, in which what both find hard cancels."""
    a, b = first.score(task, metric), other.score(task, metric)
    if a is None or b is None or a.values is None or b.values is None or len(a.values) != len(b.values):
        return None
    apart = b.values - a.values
    half = INTERVAL * (standard_error(apart) or 0.0)
    mean = float(apart.mean())
    return Difference(task, metric, name, mean, mean - half, mean + half)


def scores_of(task: str, samples: Sequence[Sample], reported: Mapping[str, Any] | None = None) -> list[Score]:
    """The scores of a task, or of a group of tasks, from its samples.

    Args:
        reported: what the harness reports of it: values and standard errors by metric,filter.
    """
    metrics = [*dict.fromkeys(metric for sample in samples for metric in sample.scores)]
    if reported is not None:
        metrics = [key for key in reported if "," in key and "_stderr," not in key]
    scores = [_score(task, metric, samples, reported or {}) for metric in metrics]
    values = [score.values for score in scores if score.values is not None]
    if task in CARD and len(values) > 1:  # as the card does
        mean = np.mean(values, axis=0)
        scores.insert(0, Score(task, MEAN, float(mean.mean()), standard_error(mean), len(mean), mean))
    return scores


def _score(task: str, metric: str, samples: Sequence[Sample], reported: Mapping[str, Any]) -> Score:
    values = shares(samples, metric)
    own = None if values is None else float(values.mean())
    value = float(reported.get(metric, own))
    if own is not None and values is not None and abs(own - value) > 1e-9:
        values = None  # the metric is another function of its samples than their mean
    name, _, filter_name = metric.rpartition(",")
    stderr = reported.get(f"{name}_stderr,{filter_name}")
    if not isinstance(stderr, float) and values is not None:
        stderr = standard_error(values)
    return Score(task, metric, value, float(stderr) if isinstance(stderr, float) else None, len(samples), values)
