"""Every registered loss: one number worked out by hand, and properties that hold whatever the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import PREFERENCE_LOSSES, bind_loss

BUILT_IN = {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.function.__module__.startswith("phi2.")}
WITH_REFERENCE = sorted(name for name, loss in BUILT_IN.items() if not loss.reference_free)
REFERENCE_FREE = sorted(name for name, loss in BUILT_IN.items() if loss.reference_free)

# One pair, small round numbers:
#   chosen    policy -1 -2          s_w = -3   reference -2 -3          r_w = -5   l_w =  2   n_w = 2
#   rejected  policy -2 -1 -2 -3    s_l = -8   reference -1 -1 -1 -1    r_l = -4   l_l = -4   n_l = 4
#   l_w - l_l = 6     l_w/n_w - l_l/n_l = 1 - (-1) = 2     s_w/n_w = -1.5     s_l/n_l = -2
HAND_PAIR = {
    "policy_chosen_logps": [-1.0, -2.0],
    "ref_chosen_logps": [-2.0, -3.0],
    "policy_rejected_logps": [-2.0, -1.0, -2.0, -3.0],
    "ref_rejected_logps": [-1.0, -1.0, -1.0, -1.0],
}
# log(1 + e^-3) = 0.0485874     log(1 + e^3) = 3.0485874     sigma(1) = 0.7310586     sigma(3) = 0.9525741
BY_HAND = {
    # z = 0.5 * 6 = 3; -log sigma(3) = log(1 + e^-3)
    "sigmoid": ({"beta": 0.5}, 0.0485874),
    # 0.9 * 0.0485874 + 0.1 * 3.0485874 = 0.0437287 + 0.3048587
    "cdpo": ({"beta": 0.5, "label_smoothing": 0.1}, 0.3485874),
    # (0.9 * 0.0485874 - 0.1 * 3.0485874) / (1 - 0.2) = -0.2611301 / 0.8
    "robust": ({"beta": 0.5, "label_smoothing": 0.1}, -0.3264126),
    # (2 - 1 / (2 * 0.5))^2
    "ipo": ({"beta": 0.5}, 1.0),
    # 1 - 0.1 * 6
    "hinge": ({"beta": 0.1}, 0.4),
    # -log sigma(1.5 * 2) = log(1 + e^-3)
    "sigmoid_norm": ({"beta": 1.5}, 0.0485874),
    # 1 - sigma(0.5 * 2) + sigma(0.5 * -4) = 1 - 0.7310586 + 0.1192029
    "apo_zero": ({"beta": 0.5}, 0.3881443),
    # sigma(0.5 * 2) + 1 - sigma(0.5 * 6) = 0.7310586 + 1 - 0.9525741
    "apo_down": ({"beta": 0.5}, 0.7784845),
    # -log sigma(8 * (-1.5 + 2) - 1) = -log sigma(3)
    "simpo": ({"beta": 8.0, "gamma": 1.0}, 0.0485874),
    # p_w = e^-1.5 = 0.2231302, odds 0.2872169; p_l = e^-2 = 0.1353353, odds 0.1565176; odds ratio 1.8350452
    # 1.5 + 2 * log(1 + 1 / 1.8350452) = 1.5 + 2 * 0.4349888
    "orpo": ({"beta": 2.0}, 2.3699776),
}
# Where policy and reference are one model, l_w = l_l = 0. Values at the default knobs.
AT_REFERENCE = {
    "sigmoid": math.log(2),
    "cdpo": math.log(2),
    "robust": math.log(2),
    "ipo": 25.0,  # (1 / (2 * 0.1))^2
    "hinge": 1.0,
    "sigmoid_norm": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
}
# ipo pulls the margin to a target from both sides; apo_down lowers the chosen answer too.
NOT_MONOTONE_IN_CHOSEN, NOT_MONOTONE_IN_REJECTED = {"ipo", "apo_down"}, {"ipo"}


def pair_batch(**rows: list[float]) -> PairBatch:
    """A batch of one pair."""
    tensors = {name: torch.tensor([values], dtype=torch.float64) for name, values in rows.items()}
    chosen, rejected = tensors["policy_chosen_logps"], tensors["policy_rejected_logps"]
    return PairBatch(**tensors, chosen_mask=chosen < 1, rejected_mask=rejected < 1)


def random_batch(seed: int = 0, reference: bool = True) -> PairBatch:
    """Three pairs of 1 to 5 tokens, float64; the policy is near the reference."""
    generator = torch.Generator().manual_seed(seed)
    masks, refs, policies = [], [], []
    for lengths in ([5, 2, 1], [1, 4, 3]):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        ref = -4 * torch.rand(3, 5, generator=generator, dtype=torch.float64) - 0.5
        policy = ref + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64).clamp(-1, 1)
        masks, refs, policies = [*masks, mask], [*refs, ref * mask], [*policies, policy * mask]
    return PairBatch(*policies, *masks, *(refs if reference else (None, None)))


def with_policy(pairs: PairBatch, chosen: Tensor, rejected: Tensor) -> PairBatch:
    refs = (pairs.ref_chosen_logps, pairs.ref_rejected_logps)
    return PairBatch(chosen, rejected, pairs.chosen_mask, pairs.rejected_mask, *refs)


# ---- every built-in loss ----


def test_every_registered_loss_has_its_number_worked_out_by_hand():
    assert BY_HAND.keys() == BUILT_IN.keys()


def test_every_loss_with_a_reference_has_its_value_at_the_reference():
    assert AT_REFERENCE.keys() == set(WITH_REFERENCE)


@pytest.mark.parametrize("name", BY_HAND)
def test_value_equals_the_one_worked_out_by_hand(name):
    knobs, expected = BY_HAND[name]
    assert bind_loss(name, knobs)(pair_batch(**HAND_PAIR)).item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_where_policy_and_reference_agree(name):
    pairs = random_batch()
    losses = bind_loss(name, {})(with_policy(pairs, pairs.ref_chosen_logps, pairs.ref_rejected_logps))
    torch.testing.assert_close(losses, torch.full_like(losses, AT_REFERENCE[name]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_gradient_equals_finite_differences(name):
    pairs, loss = random_batch(), bind_loss(name, {})
    policy = [x.clone().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    assert torch.autograd.gradcheck(lambda *logps: loss(with_policy(pairs, *logps)), policy, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_a_reference_free_loss_does_without_a_reference(name):
    loss = bind_loss(name, {})
    torch.testing.assert_close(loss(random_batch(reference=False)), loss(random_batch()), rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_loss_that_needs_a_reference_says_so_when_there_is_none(name):
    with pytest.raises(ValueError, match="this run has no reference"):
        bind_loss(name, {})(random_batch(reference=False))


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_only_the_ratio_of_policy_to_reference_counts(name):
    pairs, loss = random_batch(), bind_loss(name, {})
    shift = [torch.randn(mask.shape, dtype=torch.float64) * mask for mask in (pairs.chosen_mask, pairs.rejected_mask)]
    moved = PairBatch(
        pairs.policy_chosen_logps + shift[0],
        pairs.policy_rejected_logps + shift[1],
        pairs.chosen_mask,
        pairs.rejected_mask,
        pairs.ref_chosen_logps + shift[0],
        pairs.ref_rejected_logps + shift[1],
    )
    torch.testing.assert_close(loss(moved), loss(pairs))


@pytest.mark.parametrize("name", BUILT_IN)
def test_padding_changes_nothing(name):
    pairs, loss = random_batch(), bind_loss(name, {})
    tensors = [getattr(pairs, field) for field in list(PairBatch.__dataclass_fields__)[:6]]
    padded = PairBatch(*(torch.nn.functional.pad(x, (0, 3)) for x in tensors))
    torch.testing.assert_close(loss(padded), loss(pairs), rtol=0, atol=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_pair_does_not_depend_on_its_neighbours_in_the_batch(name):
    pairs, loss = random_batch(), bind_loss(name, {})
    tensors = [getattr(pairs, field) for field in list(PairBatch.__dataclass_fields__)[:6]]
    alone = [loss(PairBatch(*(x[i : i + 1] for x in tensors))) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), loss(pairs))


def slopes(name: str) -> tuple[Tensor, Tensor]:
    """Derivatives of every pair's loss for its chosen and rejected log-probabilities, at tokens of the answers."""
    pairs = random_batch()
    policy = [x.clone().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    grads = torch.autograd.grad(bind_loss(name, {})(with_policy(pairs, *policy)).sum(), policy)
    return grads[0][pairs.chosen_mask], grads[1][pairs.rejected_mask]


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - NOT_MONOTONE_IN_CHOSEN))
def test_a_more_likely_chosen_answer_lowers_the_loss(name):
    assert (slopes(name)[0] < 0).all()


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - NOT_MONOTONE_IN_REJECTED))
def test_a_more_likely_rejected_answer_raises_the_loss(name):
    assert (slopes(name)[1] > 0).all()


def test_ipo_pulls_a_margin_above_its_target_back():
    chosen = torch.tensor([[9.0]], requires_grad=True)  # target 1 / (2 * 0.1) = 5
    mask, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    bind_loss("ipo", {})(PairBatch(chosen, zero, mask, mask, zero, zero)).sum().backward()
    assert chosen.grad.item() == pytest.approx(2 * (9 - 5))


def test_apo_down_lowers_both_answers_where_policy_and_reference_agree():
    pairs = random_batch()
    policy = [x.clone().requires_grad_() for x in (pairs.ref_chosen_logps, pairs.ref_rejected_logps)]
    bind_loss("apo_down", {})(with_policy(pairs, *policy)).sum().backward()
    # beta sigma'(0) - beta sigma'(0) = 0 for the chosen answer, beta sigma'(0) for the rejected one
    assert policy[0].grad.abs().max() < 1e-12
    torch.testing.assert_close(policy[1].grad, torch.full_like(policy[1], 0.1 / 4))


def test_label_smoothing_smooths_the_labels_of_sigmoid():
    # 0.7 * 0.0485874 + 0.3 * 3.0485874 = 0.0340112 + 0.9145762
    smoothed = bind_loss("sigmoid", {"beta": 0.5, "label_smoothing": 0.3})(pair_batch(**HAND_PAIR))
    assert smoothed.item() == pytest.approx(0.9485874, abs=2e-7)


def test_orpo_stays_finite_where_an_answer_is_certain():
    chosen = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = bind_loss("orpo", {})(PairBatch(chosen, torch.full((1, 2), -200.0), mask, mask))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_answer_without_tokens_gives_a_finite_loss(name):
    pairs, none = random_batch(), torch.zeros(3, 0, dtype=torch.float64)
    no_tokens = torch.zeros(3, 0, dtype=torch.bool)
    empty = PairBatch(pairs.policy_chosen_logps, none, pairs.chosen_mask, no_tokens, pairs.ref_chosen_logps, none)
    assert bind_loss(name, {})(empty).isfinite().all()
