"""`phi2 replay`: several losses on what a run kept, as tables for the terminal and as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi2.files import write_whole
from phi2.lab.comparison import columns
from phi2.lab.ledger import readable, rows_of
from phi2.lab.replay import Replay, disagreement, replay_evaluation, replay_own
from phi2.lab.statistics import known
from phi2.lab.variants import entry_of, name_of, split_texts
from phi2.losses.bound import bind_loss
from phi2.pages.charts import number
from phi2.runs.ledger import SIDES, Evaluation, Ledger

HEAVIEST, TEXT = 3, 32  # pairs that are named of each loss, and characters of their answers
HEAD = ("loss", "mean", "accuracy", "mean d_w", "mean d_l", "top 1 %", "top 10 %", "effective")
ABOUT = (
    "accuracy: pairs whose chosen answer has the higher reward of that loss. d_w, d_l: derivatives with respect to\n"
    "the log-probs of the chosen and the rejected answer. A pair's weight is |d_w| + |d_l|; top: share of the whole\n"
    "weight on the heaviest pairs; effective: (sum of weights)^2 / sum of squares, the number of pairs that pull."
)
ABOUT_ANSWERS = (
    "d_w, d_l: derivatives with respect to the log-prob of a good answer, and of a bad one, whose size is its weight;\n"
    "top: share of the whole weight on the heaviest answers; effective: (sum of weights)^2 / sum of squares, the\n"
    "number of answers that pull."
)
ABOUT_SINGLE = "An answer with a label stands alone: it has no accuracy, no margin, and one of d_w and d_l."
ABOUT_LISTS = "Of a list, two answers of which one is better are a pair; mean and accuracy are means over the lists."

Losses = str | Sequence[str | Mapping[str, Any]]


def replay_run(
    run: str, losses: Losses | None = None, loss_file: str | None = None, evaluation: str = "last"
) -> list[list[Replay]]:
    """Of each evaluation, in their order, what each loss makes of it.

    Args:
        losses: as in `phi2 compare`; None is the run's own.
        evaluation: last, all, or the step of one.
    Raises:
        ValueError, FileNotFoundError: what `replay` raises.
    """
    ledger = Ledger(run)
    steps = ledger.steps if evaluation == "all" else [evaluation]
    entries = [entry_of(each) for each in (split_texts(losses) if isinstance(losses, str) else losses or ())]
    if losses is not None and not entries:
        raise ValueError("losses must name one loss at least, got none")
    if not entries and loss_file is not None:
        raise ValueError(f"loss_file {loss_file} needs losses, got none: name the loss in it")
    names = [name_of(entry) for entry in entries]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"loss {twice} is there twice")
    return [_replays(ledger.at(step), entries, loss_file) for step in steps]


def _replays(found: Evaluation, entries: Sequence[Mapping[str, Any]], loss_file: str | None) -> list[Replay]:
    if not entries:
        return [replay_own(found)]
    replays = []
    for entry in entries:
        knobs = {name: value for name, value in entry.items() if name not in ("loss", "nll_weight")}
        loss = bind_loss(entry["loss"], knobs, loss_file)
        replays.append(replay_evaluation(found, loss, name_of(entry), float(entry.get("nll_weight", 0.0))))
    return replays


def report_of(evaluations: Sequence[Sequence[Replay]]) -> str:
    """What the terminal shows: tables of all evaluations, and of the last one the heaviest pairs."""
    blocks = [table_of(replays) for replays in evaluations]
    heaviest = (f"heaviest {_rows(each)} of {each.loss}\n{heaviest_of(each)}" for each in evaluations[-1])
    return "\n\n".join([*blocks, about(evaluations[-1][0].evaluation), *heaviest])


def about(found: Evaluation | None) -> str:
    """What the columns of a table are, for rows of this kind."""
    if found is None or rows_of(found) == "pairs":
        has_lists = found is not None and any(len(each) > 2 for each in found.about.get("scores", ()))
        return f"{ABOUT}\n{ABOUT_LISTS}" if has_lists else ABOUT
    return ABOUT_ANSWERS if rows_of(found) == "answers" else f"{ABOUT}\n{ABOUT_SINGLE}"


def table_of(replays: Sequence[Replay]) -> str:
    """Losses on the same pairs, and how far the others differ from the first."""
    first, *others = replays
    parts = [f"{_title(first)}\n{columns([HEAD, *map(_row, replays)])}"]
    if others:
        head = (f"beside {first.loss}", "rank correlation of weights", f"{_rows(first)} pulled the other way")
        parts.append(columns([head, *(_against(first, other) for other in others)]))
    return "\n\n".join(parts)


def _title(replay: Replay) -> str:
    found, rows = replay.evaluation, f"{len(replay.values)} {_rows(replay)}"
    return rows if found is None else f"{found.path}: {rows} behind update {found.step}"


def _rows(replay: Replay) -> str:
    return "pairs" if replay.evaluation is None else rows_of(replay.evaluation)


def _row(replay: Replay) -> list[str]:
    accuracy = replay.metrics.get("rewards/accuracies", math.nan)
    numbers = (replay.metrics["loss"], accuracy, known(replay.d_w), known(replay.d_l))
    shares = (replay.share(0.01), replay.share(0.1))
    return [
        replay.loss,
        *(_or_dash(value, number) for value in numbers),
        *(_or_dash(share, "{:.1%}".format) for share in shares),
        _or_dash(replay.effective, "{:.1f}".format),
    ]


def _or_dash(value: float, shown: Callable[[float], str]) -> str:
    return "-" if math.isnan(value) else shown(value)


def _against(first: Replay, other: Replay) -> list[str]:
    found = disagreement(first, other)
    return [other.loss, _or_dash(found.ranks, "{:.3f}".format), f"{int(found.opposite.sum())} of {len(found.opposite)}"]


def heaviest_of(replay: Replay, count: int = HEAVIEST) -> str:
    """The pairs that pull most, a line each."""
    whole, found = float(replay.weight.sum()) or 1.0, replay.evaluation
    rows = []
    for i in replay.heaviest[:count]:
        values = {"margin": replay.margin, "d_w": replay.d_w, "d_l": replay.d_l}
        if np.isnan(replay.margin).all():
            del values["margin"]
        row = [f"{name} {_or_dash(float(of[i]), partial(number, digits=3))}" for name, of in values.items()]
        where = f"pair {i}" if found is None else f"{found.origins[i]}: {_answers(found, i)}"
        rows.append([f"  {replay.weight[i] / whole:.1%}", *row, where])
    return _lined(rows)


def _lined(rows: Sequence[Sequence[str]]) -> str:
    """In columns, the last one open to the right."""
    numbers = columns([row[:-1] for row in rows]).split("\n")
    return "\n".join(f"{left}  {row[-1]}" for left, row in zip(numbers, rows, strict=True))


def _answers(found: Evaluation, i: int) -> str:
    """How the answers of a pair begin."""
    chosen, rejected = (" ".join(readable(found[side][i] or "-").split()) for side in SIDES)
    return f"{shorten(chosen)} | {shorten(rejected)}"


def shorten(text: str, most: int = TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def write_lines(path: str, evaluations: Sequence[Sequence[Replay]]) -> None:
    """A line of JSON for each evaluation, loss and pair.

    Raises:
        ValueError: when there is such a file already.
    """
    if Path(path).exists():
        raise ValueError(f"{path} exists; give another output")
    replays = (replay for of_step in evaluations for replay in of_step)
    write_whole(Path(path), "".join(f"{json.dumps(line)}\n" for replay in replays for line in _lines(replay)))


def _lines(replay: Replay) -> Iterator[dict[str, Any]]:
    found = replay.evaluation
    assert found is not None
    numbers = {"value": replay.values, "d_w": replay.d_w, "d_l": replay.d_l, "margin": replay.margin}
    names = {name: found[name] for name in ("pair", "file", "row")}
    for i in range(len(replay.values)):
        of_pair = {name: None if np.isnan(values[i]) else values[i].item() for name, values in numbers.items()}
        which = {name: values[i] if isinstance(values[i], str) else int(values[i]) for name, values in names.items()}
        yield {"step": found.step, "loss": replay.loss, **which, **of_pair}
