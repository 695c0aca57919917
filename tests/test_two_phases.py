"""A loss of windows has one gradient, one value and one state, however its window is cut into passes."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import phi2
from phi2.data.encode import EncodedPreference
from phi2.lora import lora_modules
from phi2.lora_config import LoraConfig
from phi2.losses.batch import AnswerBatch, PairBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES, as_numbers
from phi2.model import Phi2ForCausalLM
from phi2.training import dpo, reference, scoring
from phi2.training.config import DPOConfig
from phi2.training.objective import Objective
from phi2.training.optim import Optimizer
from phi2.training.passes import Cut, Passes
from phi2.training.precision import autocast
from phi2.training.reference import make_reference
from phi2.training.scoring import score_answers
from phi2.training.session import start

OF_WINDOWS = [name for name, loss in PREFERENCE_LOSSES.items() if loss.is_own and loss.scope == "window"]
SPLITS = [[6], [3, 3], [2, 2, 2], [1] * 6]  # six pairs, one pass to six


def in_parts(*sizes: int) -> Cut:
    """Cuts a window into passes of so many samples, whatever their tokens."""
    ends = np.cumsum(sizes).tolist()
    return lambda tokens: [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


WHOLE = Passes(10**9).cut
AT = {"mean": 0.3, "deviation": 0.7, "updates": 3, "answers": 20}  # a state in the middle of a run


class Recorder(Optimizer):
    """Keeps the gradients of an update and leaves the weights alone."""

    def step(self) -> Tensor:
        self.gradients = {name: p.grad.clone() for p, name in self.names.items()}
        self.adamw.zero_grad()
        return torch.zeros(())


@dataclasses.dataclass
class Start:
    """A policy that has learned something, its reference, and six rows."""

    config: DPOConfig
    model: Phi2ForCausalLM
    reference: reference.Reference
    pairs: list[EncodedPreference]

    def update(self, loss: BoundLoss, sizes: list[int]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
        """The gradient of a window cut so, its metrics, and the state behind it."""
        recorder = Recorder(self.model, self.config, 1, scale_loss=False)
        state = state_of(loss)
        ref = None if loss.reference_free else self.reference
        objective = Objective(self.config, self.model, ref, loss, state, in_parts(*sizes))
        metrics = objective.update(recorder, self.pairs).wait()
        return recorder.gradients, metrics, as_numbers(state)

    def in_one_graph(self, loss: BoundLoss) -> dict[str, Tensor]:
        """The gradient by definition: all six rows in one pass, one loss, one backward pass."""
        scored = self.scored(loss, self.pairs)
        value = loss.step(scored, state_of(loss))[0].mean()
        if self.config.nll_weight:
            tokens = sum(len(pair.chosen) for pair in self.pairs)
            value = value - self.config.nll_weight * scored.pairs.policy_chosen.sum() / tokens
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(zip(trained, torch.autograd.grad(value, list(trained.values())), strict=True))

    def scored(self, loss: BoundLoss, rows: list[EncodedPreference]) -> AnswerBatch:
        """All that the loss is given of a window, in one pass of each model."""
        ref = None if loss.reference_free else self.reference
        answers = score_answers(self.model, rows, WHOLE, ref, partial(autocast, self.config))
        others = Objective(self.config, self.model, ref, loss, {}, WHOLE).others(rows)
        return dataclasses.replace(answers, mismatched=others)


def state_of(loss: BoundLoss) -> dict[str, float]:
    return {name: AT[name.rpartition(".")[2]] for name in loss.state}


@pytest.fixture
def started(dpo_config, write_rows):
    """started(**changes of the config) -> Start; of data, `labels` or `gold` in the place of pairs."""

    def make(data: str | None = None, **changes) -> Start:
        config = dpo_config(**changes, **({"data": write_rows(ROWS[data])} if data else {}))
        session = start(config)
        model = session.load_policy(config)
        live = make_reference(session, config, model, None, [])
        with torch.no_grad():
            for module in lora_modules(model).values():
                module.lora_B.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
            if config.lora is None:
                model.lm_head.bias.add_(torch.linspace(-1, 1, model.config.vocab_size))
        model.train(not config.disable_dropout)
        return Start(config, model, live, session.rows.train[:6])

    return make


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


QUESTIONS, ANSWERS = [f"Q{'?' * (i % 5)}" for i in range(11)], [f" the {i}" * (1 + i % 3) for i in range(11)]
ROWS = {
    "labels": [
        {"prompt": prompt, "completion": answer, "label": i % 3 > 0}
        for i, (prompt, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ],
    "gold": [
        {"prompt": prompt, "chosen": answer, "rejected": f" then {i}", "reference": " sea" * (1 + i % 4)}
        for i, (prompt, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ],
}
OF_ROWS = {"bco_unpaired": {"data": "labels"}, "tpo": {"data": "gold"}}
MIXED = "sigmoid:0.5,aot:0.3,bco:0.2,sft_tokens:0.1"
CASES = {  # of the loss its name and knobs, and what differs in the config
    **{name: (name, {"beta": 0.5} if name != "sft_tokens" else {}, OF_ROWS.get(name, {})) for name in OF_WINDOWS},
    "a mixture": (MIXED, {"beta": 0.5}, {}),
    "answers behind other prompts": ("kto", {"beta": 0.5}, {"data": "labels"}),  # of all the window in every pass
    "labels of pairs": ("kto", {"beta": 0.5}, {}),
    "a mixture of units": ("sigmoid:0.5,kto:0.3,plackett_luce:0.2,bco_unpaired:1", {"beta": 0.5}, {}),
    "a modifier": ("aot", {"beta": 0.5, "ld_alpha": 0.3}, {}),
    "a likelihood term": ("bco", {"beta": 0.5}, {"nll_weight": 0.7}),
    "activation checkpointing": ("aot", {"beta": 0.5}, {"gradient_checkpointing": True}),
    "all weights": ("aot", {"beta": 0.5}, {"lora": None}),
    "fused blocks": ("aot", {"beta": 0.5}, {"fuse": True}),
}


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_split_has_the_gradient_of_one_graph(started, case, sizes):
    name, knobs, changes = CASES[case]
    begun, loss = started(**changes), bind_loss(name, knobs)
    assert_close(begun.update(loss, sizes)[0], begun.in_one_graph(loss))


@pytest.mark.parametrize("case", CASES)
def test_every_split_has_the_same_metrics_and_the_same_state(started, case):
    name, knobs, changes = CASES[case]
    begun, loss = started(**changes), bind_loss(name, knobs)
    _, expected, expected_state = begun.update(loss, SPLITS[0])
    for sizes in SPLITS[1:]:
        _, metrics, state = begun.update(loss, sizes)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert state == pytest.approx(expected_state, rel=1e-5) and state.keys() == loss.state.keys()
    assert not loss.state or expected_state != state_of(loss)


@pytest.mark.parametrize("data", ["labels", None])
def test_z_of_kto_is_above_0_here(started, data):
    """At 0, where it is clamped, every split would have it."""
    begun = started(data=data)
    others = begun.scored(bind_loss("kto"), begun.pairs).mismatched
    assert others is not None and others.logratio.mean() > 0.1


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_micro_batches_by_themselves_would_have_another_gradient(started, name):
    """What these losses are where each micro-batch is taken for a window: the tests above would notice."""
    begun = started(**OF_ROWS.get(name, {}))
    loss = dataclasses.replace(bind_loss(name, {} if name == "sft_tokens" else {"beta": 0.5}), scope="pair")
    whole, cut = begun.in_one_graph(loss), begun.update(loss, [2, 2, 2])[0]
    largest = max((whole[key] - cut[key]).abs().max() / whole[key].abs().max() for key in whole)
    assert largest > 2e-4


# ---- dropout ----


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_times_a_pass_sees_the_same_dropout(started, checkpointing, fuse):
    """The gradient is that of one graph over the passes, which draws each one's dropout once."""
    lora = LoraConfig(r=4, target_modules=("q_proj", "fc1", "lm_head"), lora_dropout=0.3)
    begun = started(lora=lora, disable_dropout=False, gradient_checkpointing=checkpointing, fuse=fuse)
    loss, cut = bind_loss("aot", {"beta": 0.5}), in_parts(2, 3, 1)
    torch.manual_seed(5)
    scored = score_answers(begun.model, begun.pairs, cut, begun.reference, partial(autocast, begun.config))
    trained = {name: p for name, p in begun.model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss(scored).mean(), list(trained.values())), strict=True))
    drawn_after = torch.rand(3)
    torch.manual_seed(5)
    assert_close(begun.update(loss, [2, 3, 1])[0], expected)
    assert torch.equal(torch.rand(3), drawn_after)


# ---- what it costs ----


def test_a_window_of_n_is_passed_through_n_minus_1_times_more_and_its_reference_once(started, monkeypatch):
    begun, passes = started(), []
    hidden_states = scoring.hidden_states

    def counted(model: Phi2ForCausalLM, row) -> Tensor:
        passes.append(next(iter(lora_modules(model).values())).adapter is None)  # the reference: the adapter is off
        return hidden_states(model, row)

    monkeypatch.setattr(scoring, "hidden_states", counted)
    for loss, policy in (("sigmoid", 3), ("aot", 3 + 2)):
        passes.clear()
        begun.update(bind_loss(loss), [2, 2, 2])
        assert (passes.count(True), passes.count(False)) == (3, policy)


def test_a_window_of_one_pass_is_passed_through_once(started, monkeypatch):
    monkeypatch.setattr("phi2.training.objective.backward_of_window", None)
    begun, loss = started(), bind_loss("aot")
    assert_close(begun.update(loss, [6])[0], begun.in_one_graph(loss))


# ---- evaluation ----


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_evaluation_takes_all_rows_as_one_window_and_moves_no_state(started, name):
    found = []
    for max_tokens in (1, 40, 10**6):
        begun, loss = started(**OF_ROWS.get(name, {})), bind_loss(name)
        state, held_out, cut = state_of(loss), start(begun.config).rows.train, Passes(max_tokens).cut
        objective = Objective(begun.config, begun.model, begun.reference, loss, state, cut)
        found.append(objective.evaluate(held_out))
        assert state == state_of(loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    assert found[2] == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    with torch.no_grad():
        begun.model.eval()
        expected = loss.step(begun.scored(loss, held_out), state)[0].mean().item()
    assert found[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ---- a loss of one's own ----


def test_a_loss_of_windows_of_ones_own_in_six_lines(started, registry):
    @phi2.preference_loss("centred", scope="window", state={"mean": 0.0})
    def centred(pairs: phi2.PairBatch, state: dict, *, beta: float = 0.5):
        """-log sigma(beta (l_w - l_l - m)), m = running mean of the margins."""
        mean = 0.9 * state["mean"] + 0.1 * pairs.margin.mean().detach()
        return -torch.nn.functional.logsigmoid(beta * (pairs.margin - mean)), {"mean": mean}

    begun, loss = started(), bind_loss("centred")
    for sizes in SPLITS:
        gradient, metrics, state = begun.update(loss, sizes)
        assert_close(gradient, begun.in_one_graph(loss))
        expected = 0.9 * AT["mean"] + 0.1 * (metrics["rewards/margins"] / 0.5)
        assert state["mean"] == metrics["state/mean"] == pytest.approx(expected, rel=1e-5)


def test_a_run_of_several_micro_batches_an_update_trains_on_a_loss_of_windows(dpo_config, registry, metrics_of):
    @phi2.preference_loss("spread", scope="window")
    def spread(pairs: PairBatch) -> Tensor:
        weight = pairs.columns["weight"]
        return (weight - weight.mean()) ** 2 + 0 * pairs.margin

    config = dpo_config(loss="spread", max_steps=1, shuffle=False)  # two micro-batches of two
    assert metrics_of(dpo.train(config))[0]["loss"] == pytest.approx(1.25)  # the variance of 1 2 3 4
