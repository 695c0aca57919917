"""What the report of a run shows of its ledger: what became of both answers, where, and pairs to read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from phi2.lab.ledger import (
    CONFIDENT,
    QUERIES,
    TIE,
    gains,
    groups,
    has_reference,
    learnt,
    length_margin,
    lost,
    preference,
    readable,
)
from phi2.pages.charts import Line, Point, line_chart, number
from phi2.pages.page import noted, said, table
from phi2.runs.ledger import FIRST_TOKENS, SIDES, Evaluation, ledger_files, read_evaluation

SHOWN, TEXT = 3, 300  # pairs of each kind, and characters of a text
ABOUT = (
    "Means over the held-out pairs; a band holds the middle 80 %. Margin: what the chosen answer gained beside the"
    f" reference more than the rejected one. Its parts, which overlap, are the first {FIRST_TOKENS} tokens of both"
    " answers, their last one, and length: what it would be if every token had gained alike. d_w, d_l: derivatives of"
    " the loss with respect to both answers' log-probabilities."
)
BELOW = (
    "Below a pair stand its margin, nats, and by how much policy and reference like the chosen answer better, nats a"
    " token."
)
KINDS = {
    "lost": "ranked right at the evaluation before",
    "learnt": "ranked wrong at the evaluation before",
    "suspected label noise": f"policy or reference likes the rejected answer better by {CONFIDENT} nats a token",
    "contradicted": "the same answers stand elsewhere the other way round",
    "near-ties": f"the policy prefers neither answer by {TIE} nats a token",
    "repeated": "the same pair stands there more than once",
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
    return {
        "Held-out pairs": charts(evaluations) + noted(ABOUT),
        f"Held-out pairs by group, behind update {last.step}": group_table(last),
        f"Pairs to look at, behind update {last.step}": pairs_to_look_at(last),
    }


def charts(evaluations: list[Evaluation]) -> str:
    """Over the evaluations."""
    drawn = [
        line_chart("Drift from the reference, nats", _lines(evaluations, GAINS, band=True))
        if has_reference(evaluations[-1])
        else "",
        line_chart("Where the margin sits, nats", _lines(evaluations, MARGINS)),
        line_chart("Pull of the loss", _lines(evaluations, PULLS)),
        line_chart("Pairs flipped, share", _lines(evaluations[1:], FLIPS)),
    ]
    return f'<div class="charts">\n{"".join(drawn)}\n</div>'


GAINS: dict[str, Measure] = {
    "chosen": lambda found: gains(found)[0],
    "rejected": lambda found: gains(found)[1],
}
MARGINS: dict[str, Measure] = {
    "all": lambda found: found["margin"],
    f"first {FIRST_TOKENS} tokens": lambda found: found["margin_first"],
    "last token": lambda found: found["margin_last"],
    "length": length_margin,
}
PULLS: dict[str, Measure] = {
    "chosen, mean |d_w|": lambda found: np.abs(found["d_w"]),
    "rejected, mean |d_l|": lambda found: np.abs(found["d_l"]),
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
    return [(found.step, float(summary(measure(found)))) for found in evaluations]


def group_table(found: Evaluation) -> str:
    """A row for all pairs and for each group of them."""
    head = ["", "pairs", "ranked right", "chosen", "rejected", *MARGINS, "d_w", "d_l"]
    head[head.index("all")] = "margin"
    rows = [_group_row("all", found, np.ones(len(found), dtype=bool))]
    rows += [_group_row(name, found, mask) for name, mask in groups(found).items()]
    moved = "s \N{MINUS SIGN} r" if has_reference(found) else "s"
    return table(head, rows) + noted(f"Means, in nats; chosen and rejected: {moved}; tokens: of both. {shares(found)}")


def _group_row(name: str, found: Evaluation, mask: np.ndarray) -> list[str]:
    right = f"{found['correct'][mask].mean():.1%}"
    values = [*gains(found), *(measure(found) for measure in MARGINS.values()), found["d_w"], found["d_l"]]
    return [escape(name), f"{int(mask.sum()):,}", right, *(number(float(each[mask].mean()), 3) for each in values)]


def shares(found: Evaluation) -> str:
    """What part of the mean margin lies where, in words."""
    whole, *parts = (float(measure(found).mean()) for measure in MARGINS.values())
    if not whole:
        return "The mean margin is 0."
    told = [f"{round(100 * part / whole)} % in {name}" for part, name in zip(parts, list(MARGINS)[1:], strict=True)]
    return f"Of the mean margin of {number(whole, 3)} nats, {', '.join(told)}.".replace("-", "\N{MINUS SIGN}")


def pairs_to_look_at(found: Evaluation) -> str:
    """Of each kind how many there are, and the first few with their texts."""
    chosen = {kind: (query(found), order(found)) for kind, (query, order) in QUERIES.items()}
    counts = [
        [escape(kind), f"{int(mask.sum()):,}", f"{mask.mean():.1%}", f'<span class="note">{escape(KINDS[kind])}</span>']
        for kind, (mask, _) in chosen.items()
    ]
    parts = [table(["", "pairs", "share", ""], counts), noted(BELOW)]
    for kind, (mask, order) in chosen.items():
        first = np.flatnonzero(mask)[np.argsort(-order[mask], kind="stable")][:SHOWN]
        if len(first):
            rows = [_pair_row(found, int(i)) for i in first]
            parts.append(f"<h3>{escape(kind)}</h3>{table(['pair', 'prompt', 'chosen', 'rejected'], rows, 'samples')}")
    return "\n".join(parts)


def _pair_row(found: Evaluation, i: int) -> list[str]:
    told = [f"margin {number(float(found['margin'][i]), 3)}"]
    models = ("policy", "reference") if has_reference(found) else ("policy",)
    told += [f"{model} {number(float(preference(found, model)[i]), 3)}" for model in models]
    where = f"{escape(found.origins[i])}<br><small>{'<br>'.join(told)}</small>"
    prompt, *answers = (readable(found[part][i]) for part in ("prompt", *SIDES))
    return [where, said(_end(prompt)), *(said(_start(answer)) for answer in answers)]


def _start(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} ..."


def _end(text: str) -> str:
    """Of a prompt the end, where the question is."""
    return text if len(text) <= TEXT else f"... {text[-TEXT:]}"
