"""Reports about runs, each one HTML file that can be mailed or put on a wall.

`write_report` tells one run folder: curves, data, samples, settings, machine. `write_comparison` sets several models
side by side: their grades, the runs that made them, the same questions answered by each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from phi2.data.audit import FLAGS
from phi2.evaluation.toy import Score
from phi2.files import one_line, read_json, write_whole
from phi2.pages.charts import Line, interval_chart, line_chart, number
from phi2.pages.page import chat, page, said, settings, table

CHARTS = {  # title -> metric -> its name in the legend; a run has some of them
    "Loss": {"loss": "training", "eval_loss": "held out"},
    "Pairs ranked right (reward accuracy)": {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
    "Reward margin, chosen minus rejected": {"rewards/margins": "training", "eval_rewards/margins": "held out"},
    "Rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "Log-probability of an answer, nats": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Learning rate": {"learning_rate": "of the update"},
    "Speed, tokens per second": {"tokens_per_second": "training"},
}

Metrics = list[dict[str, Any]]
Scores = Mapping[str, Mapping[str, Score]]  # model -> skill -> score


def write_report(run_folder: str | Path) -> Path:
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
        "Curves": _curves(metrics),
        **_audits(run),
        "Samples": _samples(_json_lines(run / "samples.jsonl")),
        "Settings": settings(config),
        "Machine": settings(_json(run / "environment.json")),
    }
    path = run / "report.html"
    write_whole(path, page(_title(run, config), _summary(metrics), sections))
    return path


def write_comparison(
    path: str | Path,
    title: str,
    scores: Scores,
    runs: Mapping[str, str | Path] | None = None,
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
        sections[name] = _note(_summary(metrics)) + _curves(metrics) + more
    lead = f"{' against '.join(scores)}, on held-out questions that code grades."
    write_whole(Path(path), page(title, lead, sections))
    return Path(path)


def _title(run: Path, config: Mapping[str, Any]) -> str:
    if not config:
        return f"Run {run.name}"
    loss = config.get("loss")
    method = f"Preference optimisation ({loss})" if loss else "Supervised fine-tuning"
    return f"{method} of {config.get('model')}"


def _summary(metrics: Metrics) -> str:
    train = [line for line in metrics if line.get("type") == "train"]
    if not train:
        return "No update was logged."
    told = [_counted(train[-1].get("step", 0), "update")]
    if "epoch" in train[-1]:
        told.append(_counted(train[-1]["epoch"], "epoch"))
    told += [f"{label} {number(train[-1][key])}" for key, label in (("loss", "last loss"),) if key in train[-1]]
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    return ", ".join(told + [f"held-out loss {number(loss)}" for loss in held_out[-1:]]) + "."


def _counted(count: float, what: str) -> str:
    return f"{number(count)} {what}{'' if count == 1 else 's'}"


def _curves(metrics: Metrics) -> str:
    charts = [line_chart(title, _lines(metrics, names)) for title, names in CHARTS.items()]
    note = "Over optimizer steps. A pale line is what was logged, the bold one its running mean; numbers are the last."
    return f'<div class="charts">\n{"".join(charts)}\n</div>{_note(note)}' if any(charts) else ""


def _lines(metrics: Metrics, names: Mapping[str, str]) -> list[Line]:
    points = {key: [(line["step"], line[key]) for line in metrics if key in line and "step" in line] for key in names}
    return [Line(names[key], of_key) for key, of_key in points.items() if of_key]


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


def _samples(lines: Metrics) -> str:
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
    return f'<div class="beside">{table(["skill", *scores], rows)}{chart}</div>{_note(note)}'


def _grade(score: Score | None) -> str:
    if score is None:
        return ""
    low, high = score.interval
    return f"{score.rate:.1%}<br><small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _side_by_side(scores: Scores) -> str:
    """The questions whose answers were kept, and what each model said."""
    parts = []
    for skill in _skills(scores):
        kept = [of_model[skill].transcripts for of_model in scores.values() if skill in of_model]
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


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _folded(name: str, html: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{html}</details>" if html else ""


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({one_line(error)})") from error


def _json_lines(path: Path) -> Metrics:
    if not path.is_file():
        return []
    lines = []
    for row, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path} line {row}: not valid JSON ({one_line(error)})") from error
    return lines
