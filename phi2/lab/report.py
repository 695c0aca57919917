"""Reports about runs, each one HTML file that can be mailed or put on a wall.

`write_report` tells one run folder: curves, data, samples, settings, machine. `write_comparison` sets several models
side by side: their grades, the runs that made them, the same questions answered by each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from phi2.data.audit import FLAGS
from phi2.evaluation.toy import Score
from phi2.files import read_json, read_json_lines, read_yaml, write_whole
from phi2.lab.ledger_page import ledger_sections
from phi2.pages.charts import interval_chart, number
from phi2.pages.page import chat, noted, page, said, settings, table
from phi2.runs.shown import curves, summary, title_of

SHOWN = 4  # questions of each skill

Scores = Mapping[str, Mapping[str, Score]]  # model -> skill -> score


def write_report(run_folder: str | PathLike[str]) -> Path:
    """Writes `report.html` into a run folder from what is there, and returns its path.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: naming the file, and the line, that cannot be read.
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    config, metrics = _yaml(run / "config.yaml"), _json_lines(run / "metrics.jsonl")
    sections = {
        "Curves": curves(metrics),
        **ledger_sections(run),
        **_audits(run),
        "Samples": _samples(_json_lines(run / "samples.jsonl")),
        "Settings": settings(config),
        "Machine": settings(_json(run / "environment.json")),
    }
    path = run / "report.html"
    write_whole(path, page(title_of(config) or f"Run {run.name}", summary(metrics), sections))
    return path


def write_comparison(
    path: str | Path,
    title: str,
    scores: Scores,
    runs: Mapping[str, str | PathLike[str]] | None = None,
    conversation: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Writes one page about several models, and returns its path.

    Args:
        path: the file to write, in a folder that exists.
        scores: grades of each model, in the order of the columns; the models answered the same questions.
        runs: run folders by the names under which their curves are shown.
        conversation: messages with the last model.

    Raises:
        ValueError: naming the file, and the line, of a run that cannot be read.
    """
    sections = {"Grades": _grades(scores), "A conversation": chat(conversation), "Side by side": _side_by_side(scores)}
    for name, run in (runs or {}).items():
        run = Path(run)
        metrics, config = _json_lines(run / "metrics.jsonl"), _yaml(run / "config.yaml")
        more = "".join(_folded(title, html) for title, html in {**_audits(run), "Settings": settings(config)}.items())
        sections[name] = noted(summary(metrics)) + curves(metrics) + more
    lead = f"{' against '.join(scores)}, on held-out questions that code grades."
    write_whole(Path(path), page(title, lead, sections))
    return Path(path)


def _audits(run: Path) -> dict[str, str]:
    files = {"Data": "data_audit.json", "Held-out data": "eval_audit.json"}
    return {title: _data(_json(run / name)) for title, name in files.items()}


def _data(audit: Mapping[str, Any]) -> str:
    """The audit as `Audit.table` prints it: what is zero is left out."""
    if not audit:
        return ""
    kept, total = audit["kept"], audit["rows"]
    rows = [("rows", total, None, ""), ("kept", kept, total, "")]
    for rule, dropped in audit["dropped"].items():
        rows.append((f"dropped: {rule}", dropped["rows"], total, f"first: {dropped['reason']}"))
    rows += [(flag.replace("_", " "), audit[flag], kept, note) for flag, note in FLAGS.items() if audit.get(flag)]
    rows += [("tokens", audit["tokens"], None, ""), ("target tokens", audit["target_tokens"], audit["tokens"], "")]
    rows += [(f"tokens of a row, {name}", tokens, None, "") for name, tokens in audit["length"].items()]
    for fate, names in audit.get("columns", {}).items():
        rows += [(f"column {fate}: {name}", rows_with, total, "") for name, rows_with in names.items()]
    return table(["", "count", "share", ""], [_data_row(*row) for row in rows])


def _data_row(name: str, count: int, whole: int | None, note: str) -> list[str]:
    share = f"{count / whole:.1%}" if whole else ""
    return [escape(name), f'<span class="count">{count:,}</span>', share, f'<span class="note">{escape(note)}</span>']


def _samples(lines: list[dict[str, Any]]) -> str:
    """Every prompt once, with its answers in the order of the steps."""
    by_prompt: dict[str, list[dict]] = {}
    for line in lines:
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)
    parts = []
    for prompt, answers in by_prompt.items():
        rows = [[f"step&nbsp;{number(a.get('step', 0))}", said(str(a.get("answer", "")))] for a in answers]
        parts.append(f"<h3>{said(prompt)}</h3>{table(['', 'answer'], rows)}")
    return "\n".join(parts)


def _grades(scores: Scores) -> str:
    skills = _skills(scores)
    if not skills:
        return ""
    rows = [[escape(skill), *(_grade(of_model.get(skill)) for of_model in scores.values())] for skill in skills]
    intervals = {
        skill: {
            model: (score.interval[0], score.rate, score.interval[1])
            for model, of_model in scores.items()
            if (score := of_model.get(skill))
        }
        for skill in skills
    }
    asked = sorted({score.n for of_model in scores.values() for score in of_model.values()})
    note = f"Share of right answers among {' or '.join(map(str, asked))}, and below it Wilson's 95 % interval."
    chart = interval_chart("Right answers, with 95 % intervals", intervals)
    return f'<div class="beside">{table(["skill", *scores], rows)}{chart}</div>{noted(note)}'


def _grade(score: Score | None) -> str:
    if score is None:
        return ""
    low, high = score.interval
    return f"{score.rate:.1%}<br><small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _side_by_side(scores: Scores) -> str:
    """The questions whose answers were kept, and what each model said."""
    parts = []
    for skill in _skills(scores):
        kept = [of_model[skill].transcripts[:SHOWN] for of_model in scores.values() if skill in of_model]
        rows = [
            [said(asked[0].prompt), *(said(t.answer, t.correct) for t in asked), said(asked[0].expected)]
            for asked in zip(*kept, strict=False)
        ]
        models = [model for model, of_model in scores.items() if skill in of_model]
        if rows:
            parts.append(f"<h3>{escape(skill)}</h3>{table(['question', *models, 'one right answer'], rows, 'samples')}")
    return "\n".join(parts)


def _skills(scores: Scores) -> list[str]:
    return list(dict.fromkeys(skill for of_model in scores.values() for skill in of_model))


def _folded(name: str, html: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{html}</details>" if html else ""


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.is_file() else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.is_file() else []
