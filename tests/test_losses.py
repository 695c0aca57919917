"""The proofs of every registered loss of pairs: numbers worked out by hand, its slopes, and that it holds at the edge.

`tests/mutate_losses.py` breaks each loss in many ways and runs these on it: one of them must fail every time.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES

BUILT_IN = {  # of pairs alone; test_answer_losses.py has the others
    name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own and loss.unit == "pair" and not loss.needs
}
OF_PAIRS = {name: loss for name, loss in BUILT_IN.items() if loss.scope == "pair"}  # test_window_losses.py: the others
WITH_REFERENCE = [name for name, loss in BUILT_IN.items() if not loss.reference_free]
REFERENCE_FREE = [name for name, loss in BUILT_IN.items() if loss.reference_free]


# ---- numbers worked out by hand ----

# Two pairs, small round numbers; the second is the first with its answers swapped.
#   chosen    policy -1 -2          s_w = -3   reference -2 -3          r_w = -5   l_w =  2   n_w = 2   s_w/n_w = -1.5
#   rejected  policy -2 -1 -2 -3    s_l = -8   reference -1 -1 -1 -1    r_l = -4   l_l = -4   n_l = 4   s_l/n_l = -2
#   first:    l_w - l_l =  6   l_w/n_w - l_l/n_l =  1 + 1 =  2   s_w - s_l =  5   s_w/n_w - s_l/n_l =  0.5
#   swapped:  l_w - l_l = -6   l_w/n_w - l_l/n_l = -1 - 1 = -2   s_w - s_l = -5   s_w/n_w - s_l/n_l = -0.5
#   score_chosen 5, score_rejected 2 in both: 3 apart
SHORT = ([-1.0, -2.0], [-2.0, -3.0])
LONG = ([-2.0, -1.0, -2.0, -3.0], [-1.0, -1.0, -1.0, -1.0])


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    """-log sigma(x)."""
    return log(1 + exp(-x))


def kl(p: float, q: float) -> float:
    """Of two coins that fall heads with probability p and q."""
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


def odds(logp: float) -> float:
    return exp(logp) / (1 - exp(logp))


BY_HAND: dict[str, list[tuple[dict, float, float]]] = {  # knobs, loss of the first pair, loss of the swapped one
    "sigmoid": [  # z = 0.5 * 6
        ({"beta": 0.5}, nls(3), nls(-3)),
        ({"beta": 0.5, "label_smoothing": 0.3}, 0.7 * nls(3) + 0.3 * nls(-3), 0.7 * nls(-3) + 0.3 * nls(3)),
    ],
    "cdpo": [({"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(3) + 0.1 * nls(-3), 0.9 * nls(-3) + 0.1 * nls(3))],
    "robust": [  # the flipped label counts against it
        (
            {"beta": 0.5, "label_smoothing": 0.1},
            (0.9 * nls(3) - 0.1 * nls(-3)) / 0.8,
            (0.9 * nls(-3) - 0.1 * nls(3)) / 0.8,
        )
    ],
    "sigmoid_norm": [({"beta": 1.5}, nls(3), nls(-3))],  # 1.5 * 2
    "rdpo": [({"beta": 0.5, "alpha": 0.25}, nls(3 + 0.25 * (2 - 4)), nls(-3 + 0.25 * (4 - 2)))],
    "dpop": [({"beta": 0.5, "dpop_lambda": 2.0}, nls(3), nls(0.5 * (-6 - 2 * 4)))],  # l_w is 2, then -4
    "dposhift": [({"beta": 0.5, "shift": 0.75}, nls(0.5 * (2 + 0.75 * 4)), nls(0.5 * (-4 - 0.75 * 2)))],
    "minor_dpo": [({"beta": 0.5}, nls(0.5 * 2), nls(0.5 * (-4 - 2)))],  # l_l = -4 is below 0
    "hdpo": [  # r_w - r_l = -5 + 4, then -4 + 5
        ({"beta": 0.5, "alpha": 0.5}, nls(0.5 * (0.5 * 5 - -1)), nls(0.5 * (0.5 * -5 - 1)))
    ],
    "bpo": [  # min(2, 0.25 * 4), then min(-4, 0.25 * -2)
        ({"beta": 0.5, "alpha": 0.25}, nls(0.5 * 1), nls(0.5 * -4))
    ],
    "c2dpo": [({"beta": 0.5, "c2_lambda": 0.25}, nls(3) + 0.25 * (2 - 4) ** 2, nls(-3) + 0.25 * (-4 + 2) ** 2)],
    "chipo": [
        ({"beta": 0.5, "r_max": 4.0}, nls(0.5 * (6 + exp(2) - exp(-4))), nls(0.5 * (-6 + exp(-4) - exp(2)))),
        ({"beta": 0.5, "r_max": 1.0}, nls(2), nls(-2)),  # clipped at 2 * r_max
    ],
    "ipo": [({"beta": 0.5}, (2 - 1) ** 2, (-2 - 1) ** 2)],  # 1 / (2 * 0.5) = 1
    "hinge": [({"beta": 0.1}, 1 - 0.6, 1 + 0.6), ({"beta": 0.5}, 0.0, 1 + 3)],
    "exo_pair": [({"beta": 0.5, "label_smoothing": 0.1}, kl(sigma(3), 0.9), kl(sigma(-3), 0.9))],
    "discopop": [  # z / tau = 1.5, then -1.5
        (
            {"beta": 0.5, "discopop_tau": 2.0},
            (1 - sigma(1.5)) * nls(3) + sigma(1.5) * exp(-3),
            (1 - sigma(-1.5)) * nls(-3) + sigma(-1.5) * exp(3),
        )
    ],
    "gpo": [
        ({"beta": 0.5, "link": "exponential"}, exp(-3), exp(3)),
        ({"beta": 0.5, "link": "truncated_quadratic"}, 0.0, (1 + 3) ** 2),
        ({"beta": 0.5, "link": "savage"}, sigma(-3) ** 2, sigma(3) ** 2),
        ({"beta": 0.5, "link": "squared"}, (3 - 1) ** 2, (-3 - 1) ** 2),
    ],
    "nca_pair": [  # beta l_w = 1, beta l_l = -2, then -2 and 1
        ({"beta": 0.5}, nls(1) + 0.5 * nls(-1) + 0.5 * nls(2), nls(-2) + 0.5 * nls(2) + 0.5 * nls(-1))
    ],
    "bco_pair": [({"beta": 0.5}, nls(1) + nls(2), nls(-2) + nls(-1))],
    "sppo_hard": [({"beta": 0.25}, (2 - 2) ** 2 + (-4 + 2) ** 2, (-4 - 2) ** 2 + (2 + 2) ** 2)],  # 1 / (2 * 0.25) = 2
    "apo_zero": [({"beta": 0.5}, 1 - sigma(1) + sigma(-2), 1 - sigma(-2) + sigma(1))],
    "apo_down": [({"beta": 0.5}, sigma(1) + 1 - sigma(3), sigma(-2) + 1 - sigma(-3))],
    "caldpo": [({"beta": 0.25}, nls(6) + 0.5 * (0 + 4), nls(-6) + 0.5 * (36 + 16))],  # the squares of sppo_hard
    "lsif": [({}, -exp(2) + exp(-8) / 2, -exp(-4) + exp(4) / 2)],
    "ukl": [({}, 3 + exp(-4), 8 + exp(2))],
    "ddro": [  # e^2 is above 2: from 2 - 1e-6 on the tangent, whose slope is 1e6
        (
            {},
            (log(2) - 2) + (log(2) - log(2 - exp(-4))),
            (log(2) + 4) + (log(2) - log(1e-6) + 1e6 * (exp(2) - 2 + 1e-6)),
        )
    ],
    "sft": [({}, 1.5, 2.0)],
    "simpo": [({"beta": 8.0, "gamma": 1.0}, nls(8 * 0.5 - 1), nls(8 * -0.5 - 1))],
    "alphapo": [  # R(-1.5) = 2 (1 - e^0.75), R(-2) = 2 (1 - e)
        (
            {"beta": 2.0, "gamma": 0.5, "alpha": 0.5},
            nls(2 * 2 * (exp(1) - exp(0.75)) - 0.5),
            nls(2 * 2 * (exp(0.75) - exp(1)) - 0.5),
        ),
        ({"beta": 2.0, "gamma": 0.5, "alpha": 0.0}, nls(2 * 0.5 - 0.5), nls(2 * -0.5 - 0.5)),
    ],
    "cpo": [
        (
            {"beta": 0.5, "label_smoothing": 0.1, "cpo_alpha": 2.0},
            0.9 * nls(2.5) + 0.1 * nls(-2.5) + 2 * 1.5,
            0.9 * nls(-2.5) + 0.1 * nls(2.5) + 2 * 2,
        )
    ],
    "slic": [({"delta": 1.0, "slic_lambda": 0.5}, 0 + 0.5 * 3, (1 + 8 - 3) + 0.5 * 8)],
    "repo": [({"gamma": 0.75}, 0.75 - 0.5, 0.75 + 0.5), ({"gamma": 0.25}, 0.0, 0.25 + 0.5)],
    "orpo": [
        (
            {"beta": 2.0},
            1.5 + 2 * nls(log(odds(-1.5) / odds(-2))),
            2.0 + 2 * nls(log(odds(-2) / odds(-1.5))),
        )
    ],
    "odpo": [({"beta": 0.5, "alpha": 2.0}, nls(3 - 2 * log(3)), nls(-3 - 2 * log(3)))],
    "rpo_bwd_kl": [({"beta": 0.5, "eta": 0.5}, kl(sigma(1.5), sigma(3)), kl(sigma(1.5), sigma(-3)))],
    "rpo_fwd_kl": [({"beta": 0.5, "eta": 0.5}, kl(sigma(3), sigma(1.5)), kl(sigma(-3), sigma(1.5)))],
    "rpo_sq": [({"beta": 0.5, "eta": 0.5}, (3 - 1.5) ** 2, (-3 - 1.5) ** 2)],
}

# Where policy and reference are one model, one token an answer of log-probability -1, scores 3 apart, at the default
# knobs: the loss, and its slopes dL/ds_w and dL/ds_l. sigma(0) = 1/2 and sigma'(0) = 1/4 make most of them.
A = sigma(3)
AT_REFERENCE: dict[str, tuple[float, float, float]] = {
    "sigmoid": (log(2), -0.1 / 2, 0.1 / 2),
    "cdpo": (log(2), 0.1 * (-0.9 + 0.1) / 2, 0.1 * (0.9 - 0.1) / 2),
    "robust": (log(2), 0.1 * -0.5 / 0.8, 0.1 * 0.5 / 0.8),
    "sigmoid_norm": (log(2), -5 / 2, 5 / 2),
    "rdpo": (log(2), -0.1 / 2, 0.1 / 2),
    "dpop": (log(2), -0.3 / 2, 0.3 / 2),
    "dposhift": (log(2), -0.1 / 2, 0.95 * 0.1 / 2),
    "minor_dpo": (log(2), -0.1 / 2, 0.0),
    "hdpo": (log(2), 0.95 * -0.1 / 2, 0.95 * 0.1 / 2),
    "bpo": (log(2), -0.1 / 2 / 2, 0.3 * 0.1 / 2 / 2),  # both are the smaller one: half of the slope each
    "c2dpo": (log(2), -0.1 / 2, 0.1 / 2),
    "chipo": (log(2), 2 * -0.1 / 2, 2 * 0.1 / 2),  # phi'(0) = 2
    "ipo": (5.0**2, -2 * 5.0, 2 * 5.0),  # 1 / (2 * 0.1) = 5
    "hinge": (1.0, -0.1, 0.1),
    "exo_pair": (kl(0.5, 0.999), 0.1 / 4 * log(0.001 / 0.999), 0.1 / 4 * log(0.999 / 0.001)),
    "discopop": (
        (log(2) + 1) / 2,
        0.05 * (-1 / 4 - 1 / 2 + (1 - log(2)) / 4 / 0.05),
        -0.05 * (-1 / 4 - 1 / 2 + (1 - log(2)) / 4 / 0.05),
    ),
    "gpo": (1.0, -0.1, 0.1),
    "nca_pair": (2 * log(2), 0.01 * (-1 / 2 + 1 / 4), 0.01 / 4),
    "bco_pair": (2 * log(2), -0.01 / 2, 0.01 / 2),
    "sppo_hard": (2 * 500.0**2, -2 * 500.0, 2 * 500.0),  # 1 / (2 * 0.001) = 500
    "apo_zero": (1.0, -0.1 / 4, 0.1 / 4),
    "apo_down": (1.0, 0.0, 0.1 / 4),  # it lowers both answers: sigma'(0) - sigma'(0) for the chosen one
    "caldpo": (log(2) + 500.0**2, -1 / 2 - 500.0, 1 / 2 + 500.0),
    "lsif": (-1 + 1 / 2, -1.0, 1.0),
    "ukl": (1.0 + 1.0, -1.0, 1.0),
    "ddro": (2 * log(2), -1.0, 1.0),
    "odpo": (log(1 + 3), -0.1 * 3 / 4, 0.1 * 3 / 4),  # sigma(log 3) = 3/4
    "rpo_bwd_kl": (kl(A, 0.5), 0.1 * (0.5 - A), 0.1 * (A - 0.5)),
    "rpo_fwd_kl": (kl(0.5, A), 0.1 / 4 * -3, 0.1 / 4 * 3),
    "rpo_sq": (3.0**2, 0.1 * -2 * 3, 0.1 * 2 * 3),
}


def scores(count: int) -> Columns:
    column = torch.ones(count, dtype=torch.float64)
    return Columns({"score_chosen": 5 * column, "score_rejected": 2 * column})


def pair_of(chosen: tuple[list[float], list[float]], rejected: tuple[list[float], list[float]]) -> PairBatch:
    """One pair from the log-probabilities of policy and reference of its answers."""
    tensors = [torch.tensor([logps], dtype=torch.float64) for logps in (*chosen, *rejected)]
    policy_chosen, ref_chosen, policy_rejected, ref_rejected = tensors
    masks = (torch.ones_like(policy_chosen, dtype=torch.bool), torch.ones_like(policy_rejected, dtype=torch.bool))
    return PairBatch(policy_chosen, policy_rejected, *masks, ref_chosen, ref_rejected, scores(1))


def test_every_registered_loss_has_its_numbers_worked_out_by_hand():
    assert BY_HAND.keys() == OF_PAIRS.keys() and AT_REFERENCE.keys() == OF_PAIRS.keys() & set(WITH_REFERENCE)


@pytest.mark.parametrize("name", BY_HAND)
def test_values_equal_those_worked_out_by_hand(name):
    for knobs, first, swapped in BY_HAND[name]:
        loss = bind_loss(name, knobs)
        assert loss(pair_of(SHORT, LONG)).item() == pytest.approx(first, rel=1e-9, abs=1e-12), knobs
        assert loss(pair_of(LONG, SHORT)).item() == pytest.approx(swapped, rel=1e-9, abs=1e-12), knobs


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_and_slopes_where_policy_and_reference_agree(name):
    pairs = pair_of(([-1.0], [-1.0]), ([-1.0], [-1.0]))
    value, chosen, rejected = value_and_slopes(name, pairs)
    assert (value.item(), chosen.item(), rejected.item()) == pytest.approx(AT_REFERENCE[name], rel=1e-9, abs=1e-12)


def test_the_sign_of_length_in_rdpo_follows_from_its_reward():
    """The best policy under the reward R - alpha n and the KL penalty is pi = ref exp((R - alpha n) / beta) / Z: with
    it, what the loss takes for log-odds of the preference must be R_w - R_l, of the reward without the penalty."""
    beta, alpha, lengths, rewards, log_z = 0.5, 0.25, (2, 4), (1.7, 0.3), 0.9
    ratios = [(reward - alpha * n) / beta - log_z for reward, n in zip(rewards, lengths, strict=True)]
    chosen, rejected = (([-1.0 + ratio / n] * n, [-1.0] * n) for ratio, n in zip(ratios, lengths, strict=True))
    loss = bind_loss("rdpo", {"beta": beta, "alpha": alpha})
    assert loss(pair_of(chosen, rejected)).item() == pytest.approx(nls(1.7 - 0.3))


# ---- slopes ----


def random_batch(seed: int = 0, reference: bool = True) -> PairBatch:
    """Three pairs of 1 to 5 tokens, float64; the policy is near the reference."""
    generator = torch.Generator().manual_seed(seed)
    masks, refs, policies = [], [], []
    for lengths in ([5, 2, 1], [1, 4, 3]):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        ref = -4 * torch.rand(3, 5, generator=generator, dtype=torch.float64) - 0.5
        policy = ref + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64).clamp(-1, 1)
        masks, refs, policies = [*masks, mask], [*refs, ref * mask], [*policies, policy * mask]
    return PairBatch(*policies, *masks, *(refs if reference else (None, None)), scores(3))


def with_policy(pairs: PairBatch, chosen: Tensor, rejected: Tensor) -> PairBatch:
    return replace(pairs, policy_chosen_logps=chosen, policy_rejected_logps=rejected)


def value_and_slopes(name: str, pairs: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) losses at the default knobs, (B, T_w) and (B, T_l) derivatives for the policy's log-probabilities."""
    policy = [x.clone().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    values = bind_loss(name)(with_policy(pairs, *policy))
    slopes = torch.autograd.grad(values.sum(), policy, allow_unused=True, materialize_grads=True)
    return values.detach(), *slopes


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradient_equals_finite_differences(name):
    pairs, loss = random_batch(), bind_loss(name)
    policy = [x.clone().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    assert torch.autograd.gradcheck(lambda *logps: loss(with_policy(pairs, *logps)), policy, atol=1e-7, rtol=1e-5)


# Targets pull back from both sides (ipo, rpo_*), or a search found a bend (discopop); apo_down lowers both answers.
# Flat: a hinge that is satisfied (slic, repo), an answer that is not the worse one (bpo) or is left alone, a pair that
# is dropped (beta_dpo).
NOT_FALLING_IN_CHOSEN = {"ipo", "apo_down", "discopop", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "bpo", "repo", "beta_dpo"}
NOT_RISING_IN_REJECTED = {*NOT_FALLING_IN_CHOSEN, "minor_dpo", "sft", "sft_tokens", "slic"} - {"apo_down"}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in NOT_FALLING_IN_CHOSEN])
def test_a_more_likely_chosen_answer_lowers_the_loss(name):
    pairs = random_batch()
    assert (value_and_slopes(name, pairs)[1][pairs.chosen_mask] < 0).all()


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in NOT_RISING_IN_REJECTED])
def test_a_more_likely_rejected_answer_raises_the_loss(name):
    pairs = random_batch()
    assert (value_and_slopes(name, pairs)[2][pairs.rejected_mask] > 0).all()


# ---- the reference ----


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_a_reference_free_loss_does_without_a_reference(name):
    loss = bind_loss(name)
    torch.testing.assert_close(loss(random_batch(reference=False)), loss(random_batch()), rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_loss_that_needs_a_reference_says_so_when_there_is_none(name):
    with pytest.raises(ValueError, match="this run has no reference"):
        bind_loss(name)(random_batch(reference=False))


# ---- far away, and at the edge ----

GROWS = {"gpo", "discopop"}  # e^-z has no cap: a margin of -1000 is infinite in float32


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in GROWS])
def test_answers_far_from_the_reference_have_a_finite_loss_and_gradient(name):
    """A log-ratio of 200 over a whole answer, whose e^200 no float32 holds."""
    for chosen, rejected in ((-201.0, -1.0), (-1.0, -201.0)):
        policy = [torch.full((1, 2), x / 2, requires_grad=True) for x in (chosen, rejected)]
        ref, mask = torch.full((1, 2), -100.5), torch.ones(1, 2, dtype=torch.bool)
        columns = scores(1).each(Tensor.float)
        loss = bind_loss(name)(PairBatch(*policy, mask, mask, ref, ref, columns))
        slopes = torch.autograd.grad(loss.sum(), policy, allow_unused=True, materialize_grads=True)
        assert loss.isfinite().all() and all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("name", ["lsif", "ukl", "ddro"])
def test_beyond_the_largest_exponent_the_slope_goes_on(name):
    """The rejected answer is pushed as hard at a log-ratio of 35 as at one of 30, and harder than at 5."""

    def slope(ratio: float) -> float:
        pairs = pair_of(([-1.0], [-1.0]), ([ratio - 40.0], [-40.0]))
        return value_and_slopes(name, pairs)[2].item()

    assert slope(35.0) == pytest.approx(slope(30.0)) and slope(30.0) > 100 * slope(5.0)


@pytest.mark.parametrize("name", ["orpo"])
def test_the_odds_of_an_answer_that_is_nearly_certain(name):
    pairs = pair_of(([-0.01], [-1.0]), ([-0.02], [-1.0]))
    expected = 0.01 + 0.1 * nls(log(odds(-0.01) / odds(-0.02)))
    assert bind_loss(name)(pairs).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["odpo"])
def test_a_pair_whose_chosen_answer_has_no_higher_score_is_refused(name):
    """A tie has an offset of minus infinity, a wrong order none: the first would teach nothing, without a word."""

    def of_gap(*gaps: float) -> Tensor:
        chosen = torch.tensor(gaps, dtype=torch.float64)
        columns = Columns({"score_chosen": chosen, "score_rejected": torch.zeros_like(chosen)})
        return bind_loss(name)(replace(random_batch(), columns=columns))

    assert of_gap(0.5, 0.1, 2.0).isfinite().all()
    for gap in (0.0, -1.0):
        with pytest.raises(ValueError, match="^loss 'odpo' needs score_chosen above score_rejected in every pair$"):
            of_gap(0.5, gap, 2.0)


def test_ipo_pulls_a_margin_above_its_target_back():
    pairs = pair_of(([-1.0], [-10.0]), ([-1.0], [-1.0]))  # a margin of 9, a target of 1 / (2 * 0.1) = 5
    assert value_and_slopes("ipo", pairs)[1].item() == pytest.approx(2 * (9 - 5))


def test_orpo_stays_finite_where_an_answer_is_certain():
    chosen = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = bind_loss("orpo")(PairBatch(chosen, torch.full((1, 2), -200.0), mask, mask))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_answer_without_tokens_gives_a_finite_loss(name):
    pairs, none = random_batch(), torch.zeros(3, 0, dtype=torch.float64)
    empty = replace(
        pairs, policy_rejected_logps=none, ref_rejected_logps=none, rejected_mask=torch.zeros(3, 0, dtype=torch.bool)
    )
    assert bind_loss(name)(empty).isfinite().all()
