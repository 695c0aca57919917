"""`phi2.score_rows`: one pass whose gradient is that of the numbers, against what reference is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import phi2
from phi2.lab.layouts import alone

LORA = phi2.LoraConfig(r=4, target_modules=("q_proj", "fc1", "lm_head"))


@pytest.fixture
def policy(tiny_phi):
    model, tokenizer = phi2.load(tiny_phi, "cpu", "float32")
    phi2.attach(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


@pytest.fixture
def rows(policy, pair_data):
    return phi2.load_data(policy[1], pair_data)[0]


def gradient_of(model, loss) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_the_gradient_is_that_of_a_row_for_each_answer(policy, rows):
    model, _ = policy
    single = torch.stack([logps.sum() for logps in alone(model, rows)])
    one_by_one = gradient_of(model, -F.logsigmoid(single[::2] - single[1::2]).mean())
    pairs = phi2.score_rows(model, rows).pairs
    at_once = gradient_of(model, -F.logsigmoid(pairs.policy_chosen - pairs.policy_rejected).mean())
    assert (at_once - one_by_one).norm() < 1e-5 * one_by_one.norm()


def test_a_loss_of_the_registry_takes_what_it_returns(policy, rows):
    losses = phi2.bind_loss("ipo", {"beta": 0.2})(phi2.score_rows(policy[0], rows, "adapters_off"))
    assert losses.shape == (11,) and losses.requires_grad


def test_the_adapter_switched_off_is_the_base_as_a_model(policy, rows, tiny_phi):
    model, base = policy[0], phi2.load(tiny_phi, "cpu", "float32")[0]
    off, other = (phi2.score_rows(model, rows, reference) for reference in ("adapters_off", base))
    assert torch.equal(off.ref_logps, other.ref_logps) and not off.ref_logps.requires_grad
    assert (off.logratio.abs() > 1e-3).all()


def test_without_a_reference_there_is_none(policy, rows):
    assert phi2.score_rows(policy[0], rows).ref_logps is None


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda rows: ([], None), "rows must be preference rows of load_data, one at least, got none"),
        (lambda rows: ([rows[0], "text"], None), "rows must be preference rows of load_data, one at least, got str"),
        (lambda rows: (rows, "base"), "reference must be a model, 'adapters_off' or None, got 'base'"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(policy, rows, change, told):
    given, reference = change(rows)
    with pytest.raises(ValueError, match=f"^{told}$"):
        phi2.score_rows(policy[0], given, reference)


def test_one_row_stands_in_a_list_too(policy, rows):
    with pytest.raises(ValueError, match="one at least, got a row that is in no list$"):
        phi2.score_rows(policy[0], rows[0])


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        (["entropi"], "needs must be a list of gold, mismatched, .*, got .'entropi'."),
        ("kl", "needs must be a list of .*, got 'kl'"),
        (["gold"], "needs: .* row 1 has no answer to imitate"),
    ],
)
def test_needs_that_are_none_or_not_there_are_refused(policy, rows, needs, told):
    with pytest.raises(ValueError, match=told):
        phi2.score_rows(policy[0], rows, needs=needs)


def test_a_policy_without_adapter_has_none_to_switch_off(tiny_phi, rows):
    with pytest.raises(ValueError, match="^the model has no adapter$"):
        phi2.score_rows(phi2.load(tiny_phi, "cpu")[0], rows, "adapters_off")


def test_rows_that_the_reference_cannot_read_are_refused(policy, make_phi, rows):
    reference = phi2.load(make_phi(max_position_embeddings=16), "cpu")[0]
    with pytest.raises(ValueError, match="^the reference has a context of 16, but .* row 3 has 20 tokens"):
        phi2.score_rows(policy[0], rows, reference)


def test_a_loss_that_needs_a_reference_says_how_to_give_one(policy, rows):
    with pytest.raises(ValueError, match="give score_rows one"):
        phi2.bind_loss("sigmoid")(phi2.score_rows(policy[0], rows))
