"""What the report of a run shows of its ledger: what became of both answers, where, and pairs to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from phi2.lab.ledger import (
    CONFIDENT,
    OF_PAIRS,
    QUERIES,
    TIE,
    gains,
    groups,
    has_pairs,
    has_reference,
    has_single_answers,
    learnt,
    length_margin,
    lost,
    preference,
    readable,
    rows_of,
)
from phi2.lab.statistics import known
from phi2.pages.charts import Line, Point, line_chart, number
from phi2.pages.page import noted, said, table
from phi2.runs.ledger import FIRST_TOKENS, SIDES, Evaluation, ledger_files, read_evaluation

SHOWN, TEXT = 3, 300  # pairs of each kind, and characters of a text
DASH = "-"  # in place of what is not there
ABOUT = (
    "Means over the held-out pairs; a band holds the middle 80 %. Margin: what the chosen answer gained beside the"
    f" reference more than the rejected one. Its parts, which overlap, are the first {FIRST_TOKENS} tokens of both"
    " answers, their last one, and length: what it would be if every token had gained alike. d_w, d_l: derivatives of"
    " the loss with respect to both answers' log-probabilities."
)
ABOUT_ANSWERS = (
    "Means over the held-out answers, those with a good label and those with a bad one; a band holds the middle 80 %. A"
    " good answer is right if the policy gives it more than the reference does, a bad one if it gives it less. d_w,"
    " d_l: derivatives of the loss with respect to the log-probability of a good answer, and of a bad one."
)
BELOW = (
    "Below a pair stand its margin, nats, and by how much policy and reference like the chosen answer better, nats a"
    " token."
)
OTHER_LABEL = "stands elsewhere with the other label"  # of an answer alone, for what is told of pairs
KINDS = {
    "lost": "right at the evaluation before",
    "learnt": "wrong at the evaluation before",
    "suspected label noise": f"policy or reference likes the rejected answer better by {CONFIDENT} nats a token",
    "contradicted": "stands elsewhere the other way round",
    "near-ties": f"the policy prefers neither answer by {TIE} nats a token",
    "repeated": "stands there more than once",
}

Measure = Callable[[Evaluation], np.ndarray]


def ledger_sections(run: Path) -> dict[str, str]:
    """By heading what a report says of the ledger of a run; empty without one.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    files = list(ledger_files(run).values())
    if not files:
        return {}
    evaluations = [read_evaluation(path, with_tokens=False) for path in files]
    last = evaluations[-1]
    rows = rows_of(last)
    return {
        f"Held-out {rows}": charts(evaluations) + about(last),
        f"Held-out {rows} by group, behind update {last.step}": group_table(last),
        f"{rows.capitalize()} to look at, behind update {last.step}": pairs_to_look_at(last),
    }


def about(found: Evaluation) -> str:
    """What the charts show."""
    told = [ABOUT] if has_pairs(found) else []
    return "".join(map(noted, told + [ABOUT_ANSWERS] if has_single_answers(found) else told))


def below(found: Evaluation) -> str:
    """What the numbers below a row are."""
    moved = "what it gained beside the reference" if has_reference(found) else "its log-probability"
    told = [BELOW] if has_pairs(found) else []
    single = [f"Below an answer with a label stands {moved}, nats."] if has_single_answers(found) else []
    return noted(" ".join(told + single))


def kinds(found: Evaluation) -> dict[str, str]:
    """What each kind of row is."""
    if not has_single_answers(found):
        return KINDS
    contradicted = f"{KINDS['contradicted']}, or with the other label" if has_pairs(found) else OTHER_LABEL
    return {**KINDS, "contradicted": contradicted}


def sides_of(found: Evaluation) -> tuple[str, str]:
    """What the answers on both sides are called."""
    return SIDES if has_pairs(found) else ("good answers", "bad answers")


def charts(evaluations: list[Evaluation]) -> str:
    """Over the evaluations."""
    last = evaluations[-1]
    drawn = [
        line_chart("Drift from the reference, nats", _lines(evaluations, drifts(last), band=True))
        if has_reference(last)
        else "",
        line_chart("Where the margin sits, nats", _lines(evaluations, MARGINS)),
        line_chart("Pull of the loss", _lines(evaluations, pulls(last))),
        line_chart(f"{rows_of(last).capitalize()} flipped, share", _lines(evaluations[1:], FLIPS)),
    ]
    return f'<div class="charts">\n{"".join(drawn)}\n</div>'


def drifts(found: Evaluation) -> dict[str, Measure]:
    chosen, rejected = sides_of(found)
    return {chosen: lambda found: gains(found)[0], rejected: lambda found: gains(found)[1]}


def pulls(found: Evaluation) -> dict[str, Measure]:
    chosen, rejected = sides_of(found)
    return {
        f"{chosen}, mean |d_w|": lambda found: np.abs(found["d_w"]),
        f"{rejected}, mean |d_l|": lambda found: np.abs(found["d_l"]),
    }


MARGINS: dict[str, Measure] = {
    "all": lambda found: found["margin"],
    f"first {FIRST_TOKENS} tokens": lambda found: found["margin_first"],
    "last token": lambda found: found["margin_last"],
    "length": length_margin,
}
FLIPS: dict[str, Measure] = {"learnt": learnt, "lost": lost}


def _lines(evaluations: list[Evaluation], measures: dict[str, Measure], band: bool = False) -> list[Line]:
    """Means over the pairs, if asked for in the band of the middle 80 %."""
    summaries: list[Callable[..., Any]] = [np.mean]
    summaries += [partial(np.quantile, q=q) for q in (0.1, 0.9)] if band else []
    return [
        Line(name, *(_points(evaluations, measure, summary) for summary in summaries))
        for name, measure in measures.items()
    ]


def _points(evaluations: list[Evaluation], measure: Measure, summary: Callable[..., Any]) -> list[Point]:
    return [(found.step, known(measure(found), summary)) for found in evaluations]


def group_table(found: Evaluation) -> str:
    """A row for all pairs and for each group of them."""
    compared, margins = has_pairs(found), measured_margins(found)
    head = ["", rows_of(found), "ranked right" if compared else "right", *sides_of(found), *margins, "d_w", "d_l"]
    rows = [_group_row("all", found, np.ones(len(found), dtype=bool))]
    rows += [_group_row(name, found, mask) for name, mask in groups(found).items()]
    moved = "s \N{MINUS SIGN} r" if has_reference(found) else "s"
    told = f"tokens: of both. {shares(found)}" if compared else "tokens: of the answer."
    return table(head, rows) + noted(f"Means, in nats; {' and '.join(sides_of(found))}: {moved}; {told}")


def measured_margins(found: Evaluation) -> dict[str, Measure]:
    """The margin and its parts, by the heads of a table; none where nothing is compared."""
    return {"margin" if name == "all" else name: of for name, of in MARGINS.items()} if has_pairs(found) else {}


def _group_row(name: str, found: Evaluation, mask: np.ndarray) -> list[str]:
    right = found["correct"].astype(float)
    measures = measured_margins(found).values()
    values = [*gains(found), *(measure(found) for measure in measures), found["d_w"], found["d_l"]]
    shown = [_shown(right[mask], "{:.1%}".format), *(_shown(each[mask], partial(number, digits=3)) for each in values)]
    return [escape(name), f"{int(mask.sum()):,}", *shown]


def _shown(values: np.ndarray, told: Callable[[float], str]) -> str:
    """Their mean."""
    mean = known(values)
    return DASH if math.isnan(mean) else told(mean)


def shares(found: Evaluation) -> str:
    """What part of the mean margin lies where, in words."""
    whole, *parts = (known(measure(found)) for measure in MARGINS.values())
    if not whole:
        return "The mean margin is 0."
    told = [f"{round(100 * part / whole)} % in {name}" for part, name in zip(parts, list(MARGINS)[1:], strict=True)]
    return f"Of the mean margin of {number(whole, 3)} nats, {', '.join(told)}.".replace("-", "\N{MINUS SIGN}")


def pairs_to_look_at(found: Evaluation) -> str:
    """Of each kind how many there are, and the first few with their texts."""
    asked = {kind: both for kind, both in QUERIES.items() if has_pairs(found) or kind not in OF_PAIRS}
    chosen, told = {kind: (query(found), order(found)) for kind, (query, order) in asked.items()}, kinds(found)
    counts = [
        [escape(kind), f"{int(mask.sum()):,}", f"{mask.mean():.1%}", f'<span class="note">{escape(told[kind])}</span>']
        for kind, (mask, _) in chosen.items()
    ]
    head = [rows_of(found).removesuffix("s"), "prompt", *(side.removesuffix("s") for side in sides_of(found))]
    parts = [table(["", rows_of(found), "share", ""], counts), below(found)]
    for kind, (mask, order) in chosen.items():
        first = np.flatnonzero(mask)[np.argsort(-order[mask], kind="stable")][:SHOWN]
        if len(first):
            rows = [_pair_row(found, int(i)) for i in first]
            parts.append(f"<h3>{escape(kind)}</h3>{table(head, rows, 'samples')}")
    return "\n".join(parts)


def _pair_row(found: Evaluation, i: int) -> list[str]:
    models = ("policy", "reference") if has_reference(found) else ("policy",)
    values = {"margin": found["margin"]} | {model: preference(found, model) for model in models}
    if np.isnan(found["margin"][i]):
        (gain,) = (of for of in gains(found) if not np.isnan(of[i]))
        values = {"gained" if has_reference(found) else "log-probability": gain}
    told = [f"{name} {number(float(of[i]), 3)}" for name, of in values.items() if not np.isnan(of[i])]
    where = f"{escape(found.origins[i])}<br><small>{'<br>'.join(told)}</small>"
    answers = (found[side][i] for side in SIDES)
    shown = (DASH if answer is None else said(_start(readable(answer))) for answer in answers)
    return [where, said(_end(readable(found["prompt"][i]))), *shown]


def _start(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} ..."


def _end(text: str) -> str:
    """Of a prompt the end, where the question is."""
    return text if len(text) <= TEXT else f"... {text[-TEXT:]}"
