"""No loss waits for its device: on the meta device, which has no numbers, whoever asks for one fails."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.presets import PRESETS
from phi2.losses.properties import made_up_answers
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.training.metrics import means, metrics_of
from phi2.training.objective import Objective
from phi2.training.optim import Optimizer
from phi2.training.passes import Passes
from phi2.training.reference import make_reference
from phi2.training.session import start

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


aten = torch.ops.aten
ASKING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal}


class Asked(TorchDispatchMode):
    """What is asked of tensors that are computed: their numbers, or how many of them there are."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        places = args[1] if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        if op.overloadpacket in ASKING or any(place is not None and place.dtype == torch.bool for place in places):
            self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sigmoid", "bco", "beta_dpo", "sigmoid:0.5,bco:0.5"])
def test_no_update_asks_for_a_number_before_it_is_told(dpo_config, name):
    config, loss = dpo_config(loss=name, nll_weight=0.1), bind_loss(name)
    session = start(config)
    rows, model = session.rows.train, session.load_policy(config).train()
    reference, passes = make_reference(session, config, model, None, rows), Passes(10**6)
    objective = Objective(config, model, reference, loss, dict(loss.state), passes.cut)
    optimizer = Optimizer(model, config, total_steps=2, scale_loss=False)
    with Asked() as asked:
        metrics = [objective.update(optimizer, rows) for _ in range(2)]
    assert asked.ops == [] and all(each.wait()["loss"] > 0 for each in metrics)
