"""Losses with a KL at each token: values and slopes by hand, in log-probs and in the KLs."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch

from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES


def test_every_loss_with_a_kl_is_worked_out_here():
    assert BY_HAND.keys() == {name for name, loss in PREFERENCE_LOSSES.items() if loss.is_own and "kl" in loss.needs}


def pair(*values: torch.Tensor) -> PairBatch:
    """Of s_w, s_l, K_w and K_l, (1, 2) each; r = -2 in both answers."""
    mask, ref = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), -1.0, dtype=torch.float64)
    return PairBatch(values[0], values[1], mask, mask, ref, ref, extras={"kl": (values[2], values[3])})


def tdpo(name: str, **knobs) -> tuple[float, list[float]]:
    """Of a pair with l_w = 1, l_l = -2, K_w = 0.5, K_l = 2: the loss, and its slopes in s_w, s_l, K_w, K_l."""
    tokens = ([-0.25, -0.75], [-3.0, -1.0], [0.5, 0.0], [1.5, 0.5])
    values = [torch.tensor([each], dtype=torch.float64, requires_grad=True) for each in tokens]
    loss = bind_loss(name, knobs)(pair(*values))
    slopes = torch.autograd.grad(loss.sum(), values, allow_unused=True, materialize_grads=True)
    assert all(slope[0, 0] == slope[0, 1] for slope in slopes)  # of the sums
    return loss.item(), [slope[0, 0].item() for slope in slopes]


BY_HAND = {"tdpo1": ({}, 1.5, [-1, 1, -1, 1]), "tdpo2": ({"alpha": 0.4}, 0.4 * 1.5, [-1, 1, 0, 0.4])}


@pytest.mark.parametrize("name", BY_HAND)
def test_tdpo_by_hand(name):
    """Of z = beta (3 - gap) the loss -log sigma(z), and beta sigma(-z) times each slope; in tdpo2 K_w is a number."""
    knobs, gap, expected = BY_HAND[name]
    for beta in (0.1, 0.7):
        value, slopes = tdpo(name, beta=beta, **knobs)
        assert value == pytest.approx(log(1 + exp(-beta * (3 - gap))))
        assert slopes == pytest.approx([beta / (1 + exp(beta * (3 - gap))) * slope for slope in expected])


@pytest.mark.parametrize(("name", "beta"), [("tdpo1", 0.1), ("tdpo2", 0.1)])
def test_what_tdpo_takes_unless_told_otherwise(name, beta):
    assert tdpo(name) == tdpo(name, beta=beta, **({"alpha": 0.5} if name == "tdpo2" else {}))


@pytest.mark.parametrize("name", BY_HAND)
def test_where_both_kls_are_equal_tdpo_is_dpo(name):
    values = [
        torch.tensor([each], dtype=torch.float64) for each in ([-0.25, -0.75], [-3.0, -1.0], [0.5, 1.0], [1.0, 0.5])
    ]
    found, plain = (bind_loss(each)(pair(*values)) for each in (name, "sigmoid"))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", BY_HAND)
def test_tdpo_asks_for_a_reference(name):
    values = [torch.zeros(1, 2) for _ in range(4)]
    with pytest.raises(ValueError, match="no reference"):
        bind_loss(name)(replace(pair(*values), ref_chosen_logps=None, ref_rejected_logps=None))
