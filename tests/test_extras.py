"""What a loss may ask of the whole distribution at each token: its numbers, where they arrive, and at what cost."""

from __future__ import annotations

from contextlib import nullcontext
from math import log

import pytest
import torch
from torch import Tensor

import phi2
from phi2.lora_config import LoraConfig
from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss
from phi2.training import dpo, extras
from phi2.training.extras import token_statistics
from phi2.training.packing import row_of_answers
from phi2.training.passes import Passes
from phi2.training.reference import make_reference
from phi2.training.scoring import hidden_states, score_answers, scored
from phi2.training.session import start

LORA = LoraConfig(r=4, target_modules=("q_proj", "fc1", "lm_head"))


@pytest.fixture
def moved(dpo_config):
    """A policy whose adapter, on the head too, has moved; its rows."""
    config = dpo_config()
    session = start(config)
    with session.policy(config) as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        yield model.eval(), session.rows.train


@pytest.mark.parametrize("numbers", [1, 700, 2**26])
def test_statistics_are_those_of_the_whole_distribution(moved, monkeypatch, numbers):
    monkeypatch.setattr(extras, "LOGITS", numbers)  # that are held at a time
    model, rows = moved
    row = row_of_answers(rows[:3])
    hidden = hidden_states(model, row)
    found = token_statistics(model, hidden, row, ("entropy", "log_sum_square"))
    logps = model.lm_head(hidden)[0, row.logits_indices].double().log_softmax(dim=-1)
    torch.testing.assert_close(found["entropy"].double(), -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["log_sum_square"].double(), (logps.exp() ** 2).sum(-1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_they_stand_beside_the_log_probs_of_each_answer(moved, max_tokens):
    model, rows = moved
    answers = score_answers(model, rows, Passes(max_tokens).cut, None, torch.no_grad, ("entropy",))
    assert answers.extras.keys() == {"entropy"} and answers.extras["entropy"].shape == answers.mask.shape
    assert (answers.extras["entropy"][answers.mask] > 0).all() and not answers.extras["entropy"][~answers.mask].any()
    chosen, rejected = answers.pairs.extras["entropy"]
    assert chosen.shape == answers.pairs.chosen_mask.shape and rejected.shape == answers.pairs.rejected_mask.shape


@pytest.mark.parametrize("numbers", [700, 2**26])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_kl_and_its_gradient_are_those_of_the_whole_distributions(dpo_config, monkeypatch, lora, numbers):
    """Through the body, the head and the adapter on it; some rows of logits at a time, or all."""
    monkeypatch.setattr(extras, "LOGITS", numbers)
    config = dpo_config(lora=lora)
    session = start(config)
    with session.policy(config) as model:
        reference, rows = make_reference(session, config, model, None, []), session.rows.train[:3]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.add_(0.02 * drawn)
        model.eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        row = row_of_answers(rows)
        found = scored(model, rows, range(len(rows)), reference, nullcontext(), ("kl",)).extras["kl"]
        with torch.no_grad(), reference.asked() as other:
            ref = other.lm_head(hidden_states(other, row))[0, row.logits_indices].log_softmax(dim=-1)
        policy = model.lm_head(hidden_states(model, row))[0, row.logits_indices].log_softmax(dim=-1)
        expected = (ref.exp() * (ref - policy)).sum(dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.mean() > 1e-4
        weights = torch.linspace(-1, 1, len(found))
        for mine, theirs in zip(*(torch.autograd.grad(x @ weights, trained) for x in (found, expected)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_trains_with_the_same_losses_in_any_passes_and_with_a_moving_reference(
    dpo_config, metrics_of, tmp_path, name
):
    settings = dict(loss=name, max_steps=3, test_fraction=0.3, learning_rate=1e-2)
    runs = {}
    for passes in (100, 10**6):
        config = dpo_config(**settings, max_tokens_per_pass=passes, output=str(tmp_path / str(passes)))
        runs[passes] = metrics_of(dpo.train(config))
    for mine, other in zip(*runs.values(), strict=True):
        assert {k: v for k, v in mine.items() if "loss" in k} == pytest.approx(
            {k: v for k, v in other.items() if "loss" in k}, rel=1e-4
        )
    assert runs[100][0]["loss"] == pytest.approx(log(2), rel=1e-4)
    moving = dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    moved = metrics_of(dpo.train(dpo_config(**settings, **moving, output=str(tmp_path / "moving"))))
    assert moved[0]["loss"] == pytest.approx(log(2), rel=1e-4) and moved[2]["loss"] != runs[100][2]["loss"]


def test_known_log_probs_are_not_enough_for_a_kl(dpo_config):
    with pytest.raises(ValueError, match="loss tdpo1 needs all of what the reference says: leave precompute_ref_log"):
        dpo.train(dpo_config(loss="tdpo1", precompute_ref_log_probs=True))


@pytest.mark.parametrize("how", [{"scope": "window"}, {"reference_free": True}])
def test_a_kl_goes_with_a_reference_and_the_scope_of_a_pair(registry, how):
    with pytest.raises(ValueError, match="loss 'mine': a KL needs a reference, and its gradient needs scope=\"pair\""):
        phi2.preference_loss("mine", needs=("kl",), **how)(lambda pairs, *, beta=0.1: pairs.margin)


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
    with pytest.raises(ValueError, match="needs must be one of gold, mism.*, kl, got 'lse'"):
        phi2.preference_loss("mine", needs=("lse",))(lambda pairs, *, beta=0.1: pairs.margin)


def test_a_modifier_brings_what_it_needs():
    assert bind_loss("sigmoid", {"use_weighting": True}).needs == ("log_sum_square",)
    assert bind_loss("sigmoid").needs == ()


WAY = r"; phi2.score_rows\(..., needs=loss.needs\) makes it"
WAYS = {"log_sum_square": WAY, "kl": WAY, "mismatched": ""}


@pytest.mark.parametrize(
    ("name", "knobs", "need"),
    [("sigmoid", {"use_weighting": True}, "log_sum_square"), ("tdpo1", {}, "kl"), ("kto", {}, "mismatched")],
)
def test_a_batch_without_what_a_loss_needs_is_refused_in_one_line(moved, name, knobs, need):
    model, rows = moved
    answers = score_answers(model, rows, Passes(10**6).cut, None, torch.no_grad)
    with pytest.raises(ValueError, match=f"^loss '{name}' needs {need} of its batch, which has none{WAYS[need]}$"):
        bind_loss(name, knobs)(answers)


def test_score_rows_gives_what_a_loss_names(moved):
    model, rows = moved
    loss = bind_loss("tdpo2")
    answers = phi2.score_rows(model, rows[:3], "adapters_off", needs=loss.needs)
    loss(answers).sum().backward()
    assert answers.extras["kl"].requires_grad and loss(answers).isfinite().all()


@pytest.mark.parametrize("needs", [("mismatched",), ("kl",)])
def test_score_rows_says_what_it_cannot_give(moved, needs):
    model, rows = moved
    with pytest.raises(ValueError, match="^needs: mismatched answers are not made here, and a kl needs a reference"):
        phi2.score_rows(model, rows[:3], needs=needs)
