"""What a loss may ask of the whole distribution at each token: its numbers, where they arrive, and at what cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import phi2
from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import EXTRAS
from phi2.training import dpo, extras
from phi2.training.extras import token_statistics
from phi2.training.packing import row_of_answers
from phi2.training.passes import Passes
from phi2.training.scoring import hidden_states, score_answers
from phi2.training.session import start


@pytest.fixture
def scored(dpo_config):
    """A policy whose adapter, on the head too, has moved; its rows."""
    config = dpo_config()
    session = start(config)
    with session.policy(config) as model, torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        yield model.eval(), session.rows.train


@pytest.mark.parametrize("numbers", [1, 700, 2**26])
def test_statistics_are_those_of_the_whole_distribution(scored, monkeypatch, numbers):
    monkeypatch.setattr(extras, "LOGITS", numbers)  # that are held at a time
    model, rows = scored
    row = row_of_answers(rows[:3])
    hidden = hidden_states(model, row)
    found = token_statistics(model, hidden, row, EXTRAS)
    logps = model.lm_head(hidden)[0, row.logits_indices].double().log_softmax(dim=-1)
    torch.testing.assert_close(found["entropy"].double(), -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["log_sum_square"].double(), (logps.exp() ** 2).sum(-1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_they_stand_beside_the_log_probs_of_each_answer(scored, max_tokens):
    model, rows = scored
    answers = score_answers(model, rows, Passes(max_tokens).cut, None, torch.no_grad, ("entropy",))
    assert answers.extras.keys() == {"entropy"} and answers.extras["entropy"].shape == answers.mask.shape
    assert (answers.extras["entropy"][answers.mask] > 0).all() and not answers.extras["entropy"][~answers.mask].any()
    chosen, rejected = answers.pairs.extras["entropy"]
    assert chosen.shape == answers.pairs.chosen_mask.shape and rejected.shape == answers.pairs.rejected_mask.shape


def test_nothing_is_computed_that_no_loss_asks_for(dpo_config, monkeypatch):
    monkeypatch.setattr(extras, "logits_of", None)
    dpo.train(dpo_config(max_steps=1))


@pytest.mark.parametrize("scope", ["pair", "window"])
@pytest.mark.parametrize("max_tokens", [100, 10**6])
def test_a_loss_of_ones_own_is_given_what_it_names(dpo_config, registry, metrics_of, tmp_path, scope, max_tokens):
    """In one pass and in several, in training and in evaluation."""

    @phi2.preference_loss("sure", needs=("entropy",), scope=scope)
    def sure(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
        chosen, rejected = (values.sum(dim=-1) for values in pairs.extras["entropy"])
        assert not chosen.requires_grad
        return -torch.nn.functional.logsigmoid(beta * pairs.margin) + chosen - rejected

    settings = dict(loss="sure", max_steps=2, test_fraction=0.3)
    found = metrics_of(dpo.train(dpo_config(**settings, max_tokens_per_pass=max_tokens, output=str(tmp_path / "one"))))
    whole = metrics_of(dpo.train(dpo_config(**settings, output=str(tmp_path / "whole"))))
    for line, expected in zip(found, whole, strict=True):
        key = "loss" if "loss" in line else "eval_loss"
        assert line[key] == pytest.approx(expected[key], rel=1e-4)


def test_a_need_that_is_none_is_refused(registry):
    with pytest.raises(ValueError, match="needs must be one of gold, mismatched, entropy, log_sum_square, got 'kl'"):
        phi2.preference_loss("mine", needs=("kl",))(lambda pairs, *, beta=0.1: pairs.margin)


def test_a_modifier_brings_what_it_needs():
    assert bind_loss("sigmoid", {"use_weighting": True}).needs == ("log_sum_square",)
    assert bind_loss("sigmoid").needs == ()
