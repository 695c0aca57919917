"""No loss waits for its device: on the meta device, which has no numbers, whoever asks for one fails."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.presets import PRESETS
from phi2.losses.properties import made_up_answers
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.training.metrics import means, metrics_of

from .test_modifiers import GIVEN

LOSSES = [name for name, loss in PREFERENCE_LOSSES.items() if loss.is_own] + [*PRESETS]
NAMES = ("score_chosen", "score_rejected", "weight")
ONE_EACH = [(3,), (5,)]
PAIRS = [(3, 2), (1, 4), (2, 2)]


def on_meta(value: Any) -> Any:
    if isinstance(value, AnswerBatch):
        return replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Columns):
        return value.each(on_meta)
    if isinstance(value, dict):
        return {name: on_meta(each) for name, each in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def answers_for(loss: BoundLoss) -> AnswerBatch:
    lengths, scores = (ONE_EACH, [(1.0,), (0.0,)]) if loss.unit == "answer" else (PAIRS, [(1.0, 0.0)] * 3)
    columns = Columns({name: torch.linspace(1, 0, len(lengths)) for name in NAMES})
    answers = on_meta(made_up_answers(lengths, scores, columns, loss.reference_free, loss.needs))
    return replace(answers, policy_logps=answers.policy_logps.requires_grad_())


def update(loss: BoundLoss) -> None:
    """Two in a row, of which the second is given the state that the first has left; and what is reported of it."""
    state = loss.state
    for _ in range(2):
        answers = answers_for(loss)
        losses, state = loss.step(answers, state)
        losses.sum().backward()
    means([metrics_of(answers, losses, loss)])


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_its_device(name):
    update(bind_loss(name))


@pytest.mark.parametrize("name", GIVEN)
def test_no_modifier_waits_for_its_device(name):
    update(bind_loss("sigmoid", GIVEN[name]))
