"""Reference-free losses against the functions of trl's trainers, on fixed log-probabilities: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss

pytest.importorskip("trl")
CPOTrainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
ORPOTrainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer

CPU = SimpleNamespace(device="cpu")
LENGTHS = ([7, 2, 1, 5], [3, 6, 1, 9])


def policy() -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of tokens and masks, of chosen and of rejected answers."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.arange(9) < torch.tensor(lengths)[:, None] for lengths in LENGTHS]
    logps = [-3 * torch.rand(4, 9, generator=generator, dtype=torch.float64) * mask for mask in masks]
    return [x.requires_grad_() for x in logps], masks


def assert_same(ours, theirs) -> None:
    """`ours(pairs)` and `theirs(sums, lengths)`, (B,) each."""
    logps, masks = policy()
    mine = ours(PairBatch(*logps, *masks))
    reference = theirs([x.sum(-1) for x in logps], [mask.sum(-1) for mask in masks])
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)  # ORPO's works in float32
    for x, y in zip(*(torch.autograd.grad(losses.sum(), logps) for losses in (mine, reference)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def cpo_trainer(**settings) -> SimpleNamespace:
    return SimpleNamespace(**{"alpha": 0.0, "label_smoothing": 0.0, "accelerator": CPU, **settings})


def means(sums: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
    return [s / n for s, n in zip(sums, lengths, strict=True)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo(label_smoothing):
    trainer = cpo_trainer(loss_type="sigmoid", beta=0.3, label_smoothing=label_smoothing)
    loss = bind_loss("cpo", {"beta": 0.3, "label_smoothing": label_smoothing, "cpo_alpha": 0.0})
    assert_same(loss, lambda sums, lengths: CPOTrainer.cpo_loss(trainer, *sums)[0])


def test_simpo():
    trainer = cpo_trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.8)
    loss = bind_loss("simpo", {"beta": 2.0, "gamma": 0.8})
    assert_same(loss, lambda *of: CPOTrainer.cpo_loss(trainer, *means(*of))[0])


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo(alpha):
    trainer = cpo_trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.8, alpha=alpha)
    loss = bind_loss("alphapo", {"beta": 2.0, "gamma": 0.8, "alpha": alpha})
    assert_same(loss, lambda *of: CPOTrainer.cpo_loss(trainer, *means(*of))[0])


def test_hinge_of_cpo_is_slic_without_its_likelihood():
    trainer = cpo_trainer(loss_type="hinge", beta=1.0)
    loss = bind_loss("slic", {"delta": 1.0, "slic_lambda": 0.0})
    assert_same(loss, lambda sums, lengths: CPOTrainer.cpo_loss(trainer, *sums)[0])


def test_the_odds_of_orpo():
    """trl returns the weighted log sigma; its likelihood term counts the prompt too, and is left out on both sides."""
    trainer = SimpleNamespace(beta=0.7, accelerator=CPU)
    loss = bind_loss("orpo", {"beta": 0.7})

    def odds_alone(pairs: PairBatch) -> Tensor:
        return loss(pairs) + pairs.policy_chosen_per_token

    assert_same(odds_alone, lambda *of: -ORPOTrainer.odds_ratio_loss(trainer, *means(*of))[0].double())
