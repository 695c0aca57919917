"""A run as people look at it: what it was in a few words, how it went, and its curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phi2.pages.charts import Line, counted, line_chart, number
from phi2.pages.page import noted
from phi2.runs.log import STATE

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
MAIN_CHARTS = tuple(CHARTS)[:3]  # what a glance at a run is for

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


def title_of(config: Mapping[str, Any]) -> str:
    """What was done to which model; "" without settings."""
    if not config:
        return ""
    loss = config.get("loss")
    method = f"Preference optimisation ({loss})" if loss else "Supervised fine-tuning"
    return f"{method} of {config.get('model')}"


def summary(metrics: Metrics) -> str:
    """How long a run trained, and where it arrived."""
    train = [line for line in metrics if line.get("type") == "train"]
    if not train:
        return "No update was logged."
    told = [counted(train[-1].get("step", 0), "update")]
    if "epoch" in train[-1]:
        told.append(counted(train[-1]["epoch"], "epoch"))
    told += [f"{label} {number(train[-1][key])}" for key, label in (("loss", "last loss"),) if key in train[-1]]
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    return ", ".join(told + [f"held-out loss {number(loss)}" for loss in held_out[-1:]]) + "."


def curves(metrics: Metrics, titles: Iterable[str] | None = None) -> str:
    """Those of the charts for which the run has points; unless they are named, with those of what its loss keeps."""
    kept = sorted({name for line in metrics for name in line if name.startswith(STATE)})
    own = {f"Kept by the loss: {name.removeprefix(STATE)}": {name: "behind the update"} for name in kept}
    shown = {**CHARTS, **own} if titles is None else {title: CHARTS[title] for title in titles}
    charts = [line_chart(title, _lines(metrics, names)) for title, names in shown.items()]
    about = "Over optimizer steps. A pale line is what was logged, the bold one its running mean; numbers are the last."
    return f'<div class="charts">\n{"".join(charts)}\n</div>{noted(about)}' if any(charts) else ""


def _lines(metrics: Metrics, names: Mapping[str, str]) -> list[Line]:
    points = {key: [(line["step"], line[key]) for line in metrics if key in line and "step" in line] for key in names}
    return [Line(names[key], of_key) for key, of_key in points.items() if of_key]
