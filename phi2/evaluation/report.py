"""The page about an evaluation: scores beside the published ones, differences, and samples to read."""

from __future__ import annotations

from html import escape
from itertools import groupby
from pathlib import Path

from phi2.evaluation.published import CARD
from phi2.evaluation.results import Evaluation, Score
from phi2.evaluation.samples import INTERVAL, Sample
from phi2.files import write_whole
from phi2.pages.charts import Interval, interval_chart
from phi2.pages.page import fragment, page, said, settings, table

SHOWN = 20  # samples of a task; all of them are in samples/
LONGEST = 700  # characters of a prompt that are shown: its end, where the question is


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Writes the page, in a folder that exists."""
    lead = f"{' against '.join(evaluation.models)} on {_listed([task for task, _ in evaluation.rows])}."
    sections = {
        "Scores": scores_table(evaluation),
        "Intervals": _chart(evaluation),
        "Samples": _samples(evaluation),
        "Data": settings(evaluation.files),
    }
    write_whole(path, page("Evaluation", lead, sections))


def _listed(names: list[str]) -> str:
    distinct = [*dict.fromkeys(names)]
    return " and ".join(filter(None, [", ".join(distinct[:-1]), distinct[-1]]))


def scores_table(evaluation: Evaluation) -> str:
    """The table of an evaluation, and below it what a reader must know."""
    rows = [[escape(task), escape(metric), *map(_cell, rest)] for task, metric, *rest in evaluation.cells]
    compared = " A difference stands with its paired 95 % interval." if evaluation.later else ""
    notes = [f"In percent where a metric is a share, ± one standard error.{compared}", *evaluation.notes]
    return table(evaluation.header, rows) + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def scores_cell(evaluation: Evaluation) -> str:
    """What a notebook shows: the table, and its intervals as a chart."""
    return fragment(f'<div class="beside"><div>{scores_table(evaluation)}</div>{_chart(evaluation)}</div>')


def _cell(text: str) -> str:
    """A number, and below it what is said of its precision."""
    text = text.replace("-", "\N{MINUS SIGN}")
    value, separator, spread = text.partition(" ± ") if " ± " in text else text.partition(" [")
    return f"{escape(value)}<br><small>{escape((separator + spread).strip())}</small>" if spread else escape(text)


def _chart(evaluation: Evaluation) -> str:
    """The first metric of each task, with 95 % intervals."""
    groups: dict[str, dict[str, Interval]] = {}
    for task, lines in groupby(evaluation.rows, key=lambda row: row[0]):
        metric = next(lines)[1]
        scores = {name: model.score(task, metric) for name, model in evaluation.models.items()}
        marks = {name: _interval(score) for name, score in scores.items() if score is not None and score.is_share}
        published = CARD[task].published if task in CARD else {}
        marks |= {f"{name}, published": (v / 100, v / 100, v / 100) for name, v in published.items()}
        groups |= {task: marks} if marks else {}
    return interval_chart("Scores, with 95 % intervals", groups) if groups else ""


def _interval(score: Score) -> Interval:
    half = INTERVAL * (score.stderr or 0.0)
    return max(0.0, score.value - half), score.value, min(1.0, score.value + half)


def _samples(evaluation: Evaluation) -> str:
    """The first of each task, as every model answered them."""
    names, parts = [*evaluation.models], []
    answers = [{(s.task, s.number): s for s in model.samples} for model in evaluation.models.values()]
    for task, numbers in groupby(answers[0], key=lambda key: key[0]):
        keys = list(numbers)
        rows = [_row([of_model[key] for of_model in answers if key in of_model]) for key in keys[:SHOWN]]
        told = f"the first {SHOWN} of {len(keys)}" if len(keys) > SHOWN else f"all {len(keys)}"
        html = table(["prompt", *names, "expected"], rows, "samples")
        parts.append(f"<details><summary>{escape(task)}, {told}</summary>{html}</details>")
    return "\n".join(parts)


def _row(samples: list[Sample]) -> list[str]:
    prompt = samples[0].prompt
    shown = prompt if len(prompt) <= LONGEST else f"... {prompt[-LONGEST:]}"
    return [said(shown), *map(_answer, samples), said(samples[0].expected)]


def _answer(sample: Sample) -> str:
    """What was said, and each metric of it."""
    scores = {name.removesuffix(",none"): value for name, value in sample.scores.items()}
    single = [value for value in scores.values() if value in (0.0, 1.0)]
    correct = bool(single[0]) if len(set(single)) == 1 and len(single) == len(scores) else None
    told = "; ".join(f"{name} {_value(value)}" for name, value in scores.items())
    return f'{said(sample.answer.strip(), correct)}<br><span class="note">{escape(told)}</span>'


def _value(value: float | list[float]) -> str:
    return f"{sum(value):g} of {len(value)}" if isinstance(value, list) else f"{value:.3g}"
