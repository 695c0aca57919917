"""A loss drawn in plain text: its value, and the weight of its gradient, against a log-ratio or a margin of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.bound import BoundLoss
from phi2.losses.properties import made_up_answers, uses_batch
from phi2.losses.registry import EXTRAS

WIDTH, HEIGHT = 61, 11  # characters of a plot; odd, so that 0 has a place in the middle
REACH = 4.0  # to both sides of 0, in units of 1 / reward_scale
UNDRAWN = "Not drawn: a value depends on the others of its window."


class Sketch(NamedTuple):
    """What is drawn of a loss.

    Attributes:
        scores: of the answers to each prompt; of two, half of the margin is the first one's and half the other's.
        value, weight: titles of both curves.
        x: what they are drawn against.
    """

    scores: tuple[float, ...]
    value: str
    weight: str
    x: str


def sketches_of(loss: BoundLoss) -> list[Sketch]:
    ratio = "s" if loss.reference_free else "l"
    if loss.unit == "answer":
        kinds = {"good": (1.0, "weight, -dL/ds"), "bad": (0.0, "weight, dL/ds")}
        return [Sketch((label,), f"loss of a {kind} answer", weight, ratio) for kind, (label, weight) in kinds.items()]
    best, other, of = ("w", "l", "") if loss.unit == "pair" else ("1", "2", " of two answers")
    return [Sketch((1.0, 0.0), "loss", f"weight, -dL/ds_{best}", f"margin {ratio}_{best} - {ratio}_{other}{of}")]


def plots(loss: BoundLoss, columns: Columns) -> str:
    """All curves, one below the other; of a loss whose values depend on each other, that there are none.

    Every answer is one token, of no entropy and no KL. Answers behind other prompts are as likely as to the reference.

    Args:
        columns: (WIDTH,) each, what the loss reads besides.
    """
    lines = []
    for sketch in sketches_of(loss):
        if loss.scope == "window" and _depends_on_others(loss, sketch, columns):
            return UNDRAWN
        lines += _panel(loss, sketch, answers_of(loss, sketch, columns))
    return "\n".join(lines)


def _depends_on_others(loss: BoundLoss, sketch: Sketch, columns: Columns) -> bool:
    """Whether a value would have another place beside other values."""
    lengths, scores = [(1,) * len(sketch.scores)] * WIDTH, [sketch.scores] * WIDTH
    answers = made_up_answers(lengths, scores, columns, loss.reference_free, loss.needs)
    others = None if answers.mismatched is None else answers.mismatched.at_reference()
    return uses_batch(loss, replace(answers, mismatched=others))


def answers_of(loss: BoundLoss, sketch: Sketch, columns: Columns) -> AnswerBatch:
    """WIDTH prompts with their answers, from one end of the axis to the other."""
    reach, count = REACH / loss.reward_scale, len(sketch.scores)
    ref = torch.full((WIDTH, count), -reach - 0.1, dtype=torch.float64)  # no probability is above 1
    sides = torch.tensor([1.0] if count == 1 else [0.5, -0.5], dtype=torch.float64)
    policy = ref + torch.linspace(-reach, reach, WIDTH, dtype=torch.float64)[:, None] * sides
    prompts = tuple(prompt for prompt in range(WIDTH) for _ in sketch.scores)
    answers = AnswerBatch(
        policy.view(-1, 1),
        (1,) * len(prompts),
        prompts,
        sketch.scores * WIDTH,
        None if loss.reference_free else ref.view(-1, 1),
        columns,
    )
    if "mismatched" in loss.needs:
        answers = replace(answers, mismatched=answers.at_reference())
    extras: dict[str, torch.Tensor] = {name: torch.zeros_like(ref.view(-1, 1)) for name in loss.needs if name in EXTRAS}
    answers = replace(answers, extras=extras)
    if "gold" in loss.needs:
        gold = AnswerBatch(ref[:, :1], (1,) * WIDTH, tuple(range(WIDTH)), (1.0,) * WIDTH)
        answers = replace(answers, gold=gold)
    return answers


def _panel(loss: BoundLoss, sketch: Sketch, answers: AnswerBatch) -> list[str]:
    policy = answers.policy_logps.requires_grad_()
    values = loss(answers)
    (slope,) = torch.autograd.grad(values.sum(), policy)
    weights = slope.view(WIDTH, -1)[:, 0] * (-1 if sketch.scores[0] else 1)
    reach = REACH / loss.reward_scale
    return [
        *_drawn(sketch.value, values.tolist()),
        *_drawn(sketch.weight, weights.tolist()),
        f"{'':11}{-reach:<{WIDTH // 2}g}0{reach:>{WIDTH // 2}g}",
        f"{'':11}{sketch.x}, in nats",
    ]


def _drawn(title: str, values: Sequence[float]) -> list[str]:
    if not all(map(math.isfinite, values)):
        return [f"{'':11}{title}", f"{'':11}Not drawn: it is not everywhere a finite number."]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    rows = [[" "] * len(values) for _ in range(HEIGHT)]
    for column, value in enumerate(values):
        rows[round((high - value) / span * (HEIGHT - 1))][column] = "*"
    labels = {0: f"{high:.3g}", HEIGHT - 1: f"{low:.3g}"}
    drawn = [f"{labels.get(index, ''):>9} |{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    return [f"{'':11}{title}", *drawn, f"{'':10}+{'-' * len(values)}"]
