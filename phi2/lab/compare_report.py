"""The page about a comparison: its table, differences with intervals, curves, and the command that makes it again."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from phi2.data.sources import names_of
from phi2.files import write_whole
from phi2.lab.compare_config import TOY_QUESTIONS
from phi2.lab.comparison import DIFFERENCE, REPORT, SETTINGS, Comparison, curve_of, difference_texts, label
from phi2.pages.charts import Line, counted, difference_chart, line_chart, scatter_chart
from phi2.pages.page import fragment, noted, page, settings, table

CURVES = {
    "accuracy": "Pairs ranked right",
    "toy": "Toy skills, share of right answers",
    "margin": "Margin, nats",
    "kl": "KL to the reference, nats per answer",
    "length": "Tokens of an answer",
    "entropy": "Entropy, nats per token",
    "chosen_drift": "Drift of chosen answers, nats",
    "rejected_drift": "Drift of rejected answers, nats",
}
HOW = (
    "Accuracy: share of held-out pairs whose chosen answer gained more log-probability, beside the reference, than the"
    " rejected one. Drift: the mean of what answers gained, s - r, in nats; margin: chosen minus rejected drift, not"
    " times beta.",
    "KL: of the policy to the reference, in nats per answer, on the policy's own answers to 32 held-out prompts (64"
    " tokens at most), token by token over all ids. Length: tokens of these answers. Entropy: of the policy at them.",
    "Loss: of the run on held-out pairs; losses of other variants are other functions, and not compared.",
)
TOY = "Toy skills: share of right answers, the mean over the skills of {questions} held-out questions each."
TASKS = "{tasks}: the first metric of each; all metrics are in results.jsonl, what was said in each run's evaluation."
DIFFERENCES = (
    "Seed by seed. The interval is Student's, of this one difference; the p-value is the paired t-test's, corrected by"
    " Holm for all variants of a metric."
)


def write_report(comparison: Comparison) -> None:
    """Writes report.html into the folder of a comparison."""
    config = comparison.config
    sections = {
        "Variants": variants_table(comparison) + "".join(map(noted, _how(comparison))),
        f"Differences to {comparison.baseline}": differences_table(comparison),
        "Distance and drift": scatters(comparison),
        "Curves": curves(comparison),
        "Runs": _runs(comparison),
        "Made by": f"<p><code>{escape(command(comparison))}</code></p>{settings(_given(config))}",
    }
    data = ", ".join(names_of(config["data"]))
    lead = f"{config['model']} on {data}; {counted(len(comparison.seeds), 'seed')} each, {comparison.place}."
    write_whole(comparison / REPORT, page(f"{counted(len(comparison.variants), 'variant')} compared", lead, sections))


def comparison_cell(comparison: Comparison) -> str:
    """What a notebook shows."""
    return fragment(variants_table(comparison) + differences_table(comparison) + scatters(comparison))


def command(comparison: Comparison) -> str:
    """The command that makes it again."""
    path = str(comparison.path)
    return f"phi2 compare --config {shlex.quote(f'{path}/{SETTINGS}')} --output {shlex.quote(f'{path}-again')}"


def variants_table(comparison: Comparison) -> str:
    rows = [[escape(variant), *map(_cell, cells)] for variant, *cells in comparison.cells]
    return table(comparison.header, rows)


def _cell(text: str) -> str:
    """The width of an interval below its middle."""
    mean, between, half = escape(text).partition(" ± ")
    return f"{mean}<br><small>± {half}</small>" if between else mean


def differences_table(comparison: Comparison) -> str:
    rows = [[one.variant, label(one.metric), *difference_texts(one)] for one in comparison.differences]
    if not rows:
        return ""
    cells = table(["variant", "metric", *DIFFERENCE], [[*map(escape, row)] for row in rows])
    charts = "".join(difference_figure(comparison, metric) for metric in comparison.main)
    if not charts:
        return cells + noted(DIFFERENCES)
    told = f"<details><summary>All of them, in numbers</summary>{cells}</details>"
    return f'<div class="charts wide">{charts}</div>{noted(DIFFERENCES)}{told}'


def difference_figure(comparison: Comparison, metric: str) -> str:
    """A row for each variant: how much more of a metric it has than the baseline, with the 95 % interval."""
    found = {
        one.variant: (one.estimate.low, one.estimate.mean, one.estimate.high)
        for one in comparison.differences
        if one.metric == metric
    }
    return difference_chart(f"{label(metric)}, minus that of {comparison.baseline}", found)


def scatters(comparison: Comparison) -> str:
    """A point for each run where it ended: quality over distance, and what became of both answers."""
    ends = {variant: [curve_of(run)[-1] for run in comparison.ended(variant)] for variant in _in_order(comparison)}
    quality = {name: label(name) for name in comparison.main if name != "margin"}
    axes = [("Quality and distance", "kl", "KL, nats", metric, name) for metric, name in quality.items()]
    axes.append(("Drift", "chosen_drift", "chosen drift, nats", "rejected_drift", "rejected drift"))
    charts = [
        scatter_chart(title, {name: [(end[x], end[y]) for end in found] for name, found in ends.items()}, across, up)
        for title, x, across, y, up in axes
    ]
    return f'<div class="charts">{"".join(charts)}</div>{noted("A point is a run, behind its last update.")}'


def _in_order(comparison: Comparison) -> list[str]:
    """Those that have runs to show, the baseline first: a chart of many shows it before the others."""
    shown = [variant for variant in comparison.variants if comparison.ended(variant)]
    return sorted(shown, key=lambda variant: variant != comparison.baseline)


def curves(comparison: Comparison) -> str:
    """Held-out metrics over steps: the mean over seeds in a band from the least to the greatest."""
    found = {variant: [curve_of(run) for run in comparison.ended(variant)] for variant in _in_order(comparison)}
    first = next(iter(found.values()))[0][0]
    titles = CURVES | {task: task for task in comparison.tasks}
    charts = [
        line_chart(title, [_line(variant, metric, runs) for variant, runs in found.items()])
        for metric, title in titles.items()
        if metric in first
    ]
    about = "Over optimizer steps, on held-out data: the mean over seeds, in a band from the least to the greatest."
    return f'<div class="charts">{"".join(charts)}</div>{noted(about)}'


def _line(variant: str, metric: str, runs: Sequence[Sequence[Mapping[str, float]]]) -> Line:
    values: defaultdict[float, list[float]] = defaultdict(list)
    for run in runs:
        for found in run:
            if metric in found:
                values[found["step"]].append(found[metric])
    steps = sorted(values)
    mean, lower, upper = (
        [(step, summary(values[step])) for step in steps] for summary in (lambda v: sum(v) / len(v), min, max)
    )
    return Line(variant, mean, lower, upper) if len(runs) > 1 else Line(variant, mean)


def _runs(comparison: Comparison) -> str:
    rows = [
        [escape(variant), ", ".join(_link(row) for row in comparison.rows if row["variant"] == variant)]
        for variant in comparison.variants
    ]
    return table(["variant", "seeds"], rows) + noted("Each is a run folder; its report stands in it.")


def _link(row: Mapping[str, object]) -> str:
    return f'<a href="{escape(str(row["run"]))}/report.html">{row["seed"]}</a>'


def _how(comparison: Comparison) -> list[str]:
    told = [comparison.about, *comparison.failures, *HOW]
    if "toy" in comparison.metrics:
        asked = comparison.config.get("evaluation") or {"questions": TOY_QUESTIONS}
        told.append(TOY.format(questions=asked["questions"]))
    if comparison.tasks:
        told.append(TASKS.format(tasks=", ".join(comparison.tasks)))
    return told


def _given(config: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if value is not None}
