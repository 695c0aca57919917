"""The losses of windows, on numbers worked out by hand: values, slopes and what they keep of two pairs or three.

`tests/mutate_losses.py` breaks each in many ways and runs these on it too; `test_losses.py` and
`test_loss_invariances.py` have what holds for every loss.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.losses.window import deviation_of, drawn

BUILT_IN = [  # of pairs alone; test_answer_losses.py has the others
    name
    for name, loss in PREFERENCE_LOSSES.items()
    if loss.is_own and loss.scope == "window" and loss.unit == "pair" and not loss.needs
]

# Two pairs; lengths, sums of the policy s and of the reference r:
#   first    n_w = 1  s_w = -2  r_w = -3  l_w =  1    n_l = 4  s_l = -8  r_l = -6   l_l = -2
#            s_w - s_l =  6   r_w - r_l = 3   l_w - l_l = 3   s/n:  -2 + 2 = 0     l/n:  1 + 0.5 = 1.5
#   second   n_w = 3  s_w = -3  r_w = -6  l_w =  3    n_l = 2  s_l = -4  r_l = -11  l_l =  7
#            s_w - s_l =  1   r_w - r_l = 5   l_w - l_l = -4  s/n:  -1 + 2 = 1     l/n:  1 - 3.5 = -2.5
#   window   s_w - s_l sorted 1 6,  r_w - r_l sorted 3 5,  l_w sorted 1 3,  l_l sorted -2 7
CHOSEN = (([-2.0], [-3.0]), ([-1.0] * 3, [-2.0] * 3))
REJECTED = (([-2.0] * 4, [-1.5] * 4), ([-2.0] * 2, [-5.5] * 2))
TWO_APART = sqrt(2) / 2  # the unbiased deviation of two numbers, over their distance


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    """-log sigma(x), whose slope is -sigma(-x)."""
    return log(1 + exp(-x))


def window() -> PairBatch:
    sides = []
    for answers in (CHOSEN, REJECTED):
        longest = max(len(policy) for policy, _ in answers)
        rows = [[logps + [0.0] * (longest - len(logps)) for logps in answer] for answer in answers]
        policy, ref = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
        mask = torch.tensor([[i < len(policy) for i in range(longest)] for policy, _ in answers])
        sides.append((policy, mask, ref))
    (chosen, chosen_mask, ref_chosen), (rejected, rejected_mask, ref_rejected) = sides
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, ref_chosen, ref_rejected)


# Of each loss: knobs, the state before, both values, the state behind, and the slopes of their mean for s_w of both
# pairs, then for s_l of both.
Case = tuple[dict, dict, list[float], dict, list[float]]


def sorted_case() -> Case:
    """Ranks: 1 with 3 (the second pair), 6 with 5 (the first): z = 0.5 (-2), 0.5 (1)."""
    low, high = -0.5 * sigma(1) / 2, -0.5 * sigma(-0.5) / 2
    return {"beta": 0.5}, {}, [nls(-1), nls(0.5)], {}, [high, low, -high, -low]


def smoothed_case() -> Case:
    """The same z, labels wrong with probability 0.2: slope -(0.8 sigma(-z) - 0.2 sigma(z))."""
    low, high = (-0.5 * (0.8 * sigma(-z) - 0.2 * sigma(z)) / 2 for z in (-1, 0.5))
    values = [0.8 * nls(-1) + 0.2 * nls(1), 0.8 * nls(0.5) + 0.2 * nls(-0.5)]
    return {"beta": 0.5, "label_smoothing": 0.2}, {}, values, {}, [high, low, -high, -low]


def unpaired_case() -> Case:
    """Ranks: l_w 1 with l_l -2, both of the first pair; 3 with 7, both of the second: z = 0.5 (3), 0.5 (-4)."""
    first, second = -0.5 * sigma(-1.5) / 2, -0.5 * sigma(2) / 2
    return {"beta": 0.5}, {}, [nls(1.5), nls(-2)], {}, [first, second, -first, -second]


def unpaired_smoothed_case() -> Case:
    first, second = (-0.5 * (0.8 * sigma(-z) - 0.2 * sigma(z)) / 2 for z in (1.5, -2))
    values = [0.8 * nls(1.5) + 0.2 * nls(-1.5), 0.8 * nls(-2) + 0.2 * nls(2)]
    return {"beta": 0.5, "label_smoothing": 0.2}, {}, values, {}, [first, second, -first, -second]


def dr_dpo_case() -> Case:
    """e^(-L/2) = sigma(z)^(1/2), z = 0.5 (3), 0.5 (-4). A pair's share of the gradient is its part of their sum."""
    powers = [sqrt(sigma(1.5)), sqrt(sigma(-2))]
    value = -2 * log(sum(powers) / 2)
    first, second = (power / sum(powers) * -0.5 * sigma(-z) for power, z in zip(powers, (1.5, -2), strict=True))
    return {"beta": 0.5, "beta_prime": 2.0}, {}, [value, value], {}, [first, second, -first, -second]


def beta_dpo_case() -> Case:
    """Margins 3, -4, mean -0.5; M = 0.9 (-2) + 0.1 (-0.5) = -1.85; b = 0.5 (1 + 0.5 (-0.5 + 1.85)) = 0.8375."""
    state = {"mean": -2.0, "deviation": 4.0, "updates": 7}
    after = {"mean": -1.85, "deviation": 0.9 * 4 + 0.1 * 7 * TWO_APART, "updates": 8}
    b = 0.8375
    first, second = -b * sigma(-3 * b) / 2, -b * sigma(4 * b) / 2
    knobs = {"beta": 0.5, "a": 0.5, "drop": 0.0}
    return knobs, state, [nls(3 * b), nls(-4 * b)], after, [first, second, -first, -second]


def beta_dpo_drop_case() -> Case:
    """M = 0.9 (2.5) - 0.05 = 2.2, S = 0.9 (0.1) + 0.07... : the margin -4 is 6.2 away, far out, and 3 is kept. Alone it
    has the whole weight, 2 of 2 pairs: b = 0.5 (1 + 0.5 (3 - 2.2)) = 0.7."""
    state = {"mean": 2.5, "deviation": 0.1, "updates": 0}
    after = {"mean": 2.2, "deviation": 0.09 + 0.1 * 7 * TWO_APART, "updates": 1}
    first = -0.7 * sigma(-2.1)
    knobs = {"beta": 0.5, "a": 0.5, "drop": 0.5}
    return knobs, state, [2 * nls(2.1), 0.0], after, [first, 0.0, -first, 0.0]


def beta_dpo_lowest_case() -> Case:
    """M = 0.9 (10) - 0.05 = 8.95, b = 0.5 (1 + 0.5 (-0.5 - 8.95)) is below 0: 1e-3."""
    state = {"mean": 10.0, "deviation": 1.0, "updates": 0}
    after = {"mean": 8.95, "deviation": 0.9 + 0.1 * 7 * TWO_APART, "updates": 1}
    first, second = -1e-3 * sigma(-3e-3) / 2, -1e-3 * sigma(4e-3) / 2
    knobs = {"beta": 0.5, "a": 0.5, "drop": 0.0}
    return knobs, state, [nls(3e-3), nls(-4e-3)], after, [first, second, -first, -second]


def alphadpo_case() -> Case:
    """l/n differences 1.5, -2.5, mean -0.5, 4 apart; M = 0.9 (1) - 0.05 = 0.85; s/n differences 0, 1."""
    deviation = 0.9 * 2 + 0.1 * 4 * TWO_APART
    z = [(1.5 - 0.85) / deviation, (-2.5 - 0.85) / deviation]
    logits = [2 * (0 - 0.25 * z[0]) - 0.5, 2 * (1 - 0.25 * z[1]) - 0.5]
    first, second = (-2 * sigma(-logit) / 2 for logit in logits)
    slopes = [first / 1, second / 3, -first / 4, -second / 2]
    knobs = {"beta": 2.0, "gamma": 0.5, "alpha": 0.25}
    after = {"mean": 0.85, "deviation": deviation}
    return knobs, {"mean": 1.0, "deviation": 2.0}, [nls(logit) for logit in logits], after, slopes


def amapo_case() -> Case:
    """s/n differences 0, 1: mean 0.5, the first is below it by 0.5, the deviation is sqrt(1/2)."""
    extra = exp(0.5 * 0.5 / TWO_APART)
    first, second = -3 * sigma(3 * extra) / 2, -3 * sigma(-3) / 2
    return {"beta": 3.0}, {}, [nls(-3 * extra), nls(3)], {}, [first / 1, second / 3, -first / 4, -second / 2]


def bco_case() -> Case:
    """0.5 l: 0.5 1.5, -1 3.5, their sum 4.5. 6 answers before of mean 2: d = (12 + 4.5) / 10 = 1.65."""
    chosen, rejected = [0.5 - 1.65, 1.5 - 1.65], [-1 - 1.65, 3.5 - 1.65]
    values = [nls(w) + nls(-other) for w, other in zip(chosen, rejected, strict=True)]
    slopes = [*(-0.5 * sigma(-w) / 2 for w in chosen), *(0.5 * sigma(other) / 2 for other in rejected)]
    return {"beta": 0.5}, {"mean": 2.0, "answers": 6}, values, {"mean": 1.65, "answers": 10}, slopes


def sft_tokens_case() -> Case:
    """2 and 3 nats, 2 tokens an answer in the mean."""
    return {}, {}, [2 / 2, 3 / 2], {}, [-1 / 4, -1 / 4, 0.0, 0.0]


BY_HAND = {
    "aot": [sorted_case(), smoothed_case()],
    "aot_unpaired": [unpaired_case(), unpaired_smoothed_case()],
    "dr_dpo": [dr_dpo_case()],
    "beta_dpo": [beta_dpo_case(), beta_dpo_drop_case(), beta_dpo_lowest_case()],
    "alphadpo": [alphadpo_case()],
    "amapo": [amapo_case()],
    "bco": [bco_case()],
    "sft_tokens": [sft_tokens_case()],
}


def test_every_loss_of_windows_has_its_numbers_worked_out_by_hand():
    assert list(BY_HAND) == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_values_and_state_equal_those_worked_out_by_hand(name):
    for knobs, state, values, after, _ in BY_HAND[name]:
        found, moved = bind_loss(name, knobs).step(window(), state)
        assert found.tolist() == pytest.approx(values, rel=1e-9), knobs
        assert moved == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize("name", BUILT_IN)
def test_slopes_equal_those_worked_out_by_hand(name):
    """With statistics of the window, and what comes of them, held fast."""
    for knobs, state, _, _, slopes in BY_HAND[name]:
        pairs = window()
        policy = [x.clone().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
        moved = replace(pairs, policy_chosen_logps=policy[0], policy_rejected_logps=policy[1])
        mean = bind_loss(name, knobs).step(moved, state)[0].mean()
        grads = torch.autograd.grad(mean, policy, allow_unused=True, materialize_grads=True)
        of_sums: list[Tensor] = [grad[:, 0] for grad in grads]  # every answer's first token: the slope of its sum
        assert torch.cat(of_sums).tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-15), knobs


def with_margins(*margins: float) -> PairBatch:
    """Pairs of one token an answer with these l_w - l_l; s_w - s_l is the same."""
    chosen = torch.tensor(margins, dtype=torch.float64)[:, None] - 50
    other, mask = torch.full_like(chosen, -50), torch.ones_like(chosen, dtype=torch.bool)
    return PairBatch(chosen, other, mask, mask, other, other)


@pytest.mark.parametrize("name", ["alphadpo"])
def test_a_spread_that_is_rounding_moves_no_margin(name):
    """Differences of 1e-6 nats, whose quotient with their deviation is 10, count as 1e-3 of one."""
    even, uneven = bind_loss(name)(with_margins(0.0, 0.0, 0.0)), bind_loss(name)(with_margins(-1e-6, 0.0, 1e-6))
    assert uneven.tolist() == pytest.approx(even.tolist(), abs=1e-3) and uneven[0] != even[0]


@pytest.mark.parametrize("name", ["amapo"])
def test_a_pair_that_is_below_the_mean_by_rounding_has_the_margin_of_one_at_the_mean(name):
    """m = e^(1 * 1e-6 / 1e-3), which is 1 but for 1e-3, and d = 1: beta (d - m) = 0. At and above the mean m is 0."""
    values = bind_loss(name)(with_margins(1 - 1e-6, 1.0, 1 + 1e-6))
    assert values[[0, 2]].tolist() == pytest.approx([nls(0), nls(2)], abs=2e-3)


@pytest.mark.parametrize("name", ["alphadpo", "beta_dpo", "amapo"])
def test_a_single_pair_has_no_spread(name):
    state = {"mean": 0.0, "deviation": 2.0, "updates": 0}
    loss = bind_loss(name)
    values, after = loss.step(with_margins(3.0), {key: state[key] for key in loss.state})
    assert values.isfinite().all() and after.get("deviation", 1.8) == pytest.approx(0.9 * 2)


@pytest.mark.parametrize("name", ["alphadpo", "beta_dpo"])
def test_the_deviation_that_is_kept_is_the_unbiased_one(name):
    """0, 1 and 5 are 2, 1 and 3 away from their mean: (4 + 1 + 9) / 2 = 7."""
    state = {"mean": 0.0, "deviation": 2.0, "updates": 0}
    loss = bind_loss(name)
    _, after = loss.step(with_margins(0.0, 1.0, 5.0), {key: state[key] for key in loss.state})
    assert after["deviation"] == pytest.approx(0.9 * 2 + 0.1 * sqrt(7))


@pytest.mark.parametrize("name", ["amapo"])
def test_every_pair_below_the_mean_has_a_margin_by_its_distance(name):
    values = bind_loss(name)(with_margins(0.0, 1.0, 5.0))
    extra = [exp(2 * 2 / sqrt(7)), exp(2 * 1 / sqrt(7)), 0]
    assert values.tolist() == pytest.approx([nls(2 * (d - m)) for d, m in zip((0, 1, 5), extra, strict=True)])


DRAWS = {  # margins whose mean is 0.5, and the state before, so that the running mean stays 0.5
    "apart": ((-1.0, 0.2, 2.3), {"mean": 0.5, "deviation": 0.5}),
    "equal but for rounding": ((0.5 - 1e-7, 0.5, 0.5 + 1e-7), {"mean": 0.5, "deviation": 0.0}),
}


@pytest.mark.parametrize("name", ["beta_dpo"])
def test_the_pair_that_is_kept_has_the_lowest_lot_over_its_weight(name):
    for margins, state in DRAWS.values():
        spread = max(0.9 * state["deviation"] + 0.1 * torch.tensor(margins, dtype=torch.float64).std().item(), 1e-3)
        weights = [exp(-(((margin - 0.5) / spread) ** 2) / 2) for margin in margins]
        for seed in range(30):
            lots = torch.empty(3, dtype=torch.float64)
            lots.exponential_(generator=torch.Generator().manual_seed(seed))
            expected = min(range(3), key=lambda i: lots[i].item() / weights[i])
            values = bind_loss(name, {"drop": 0.5, "drop_seed": seed}).step(
                with_margins(*margins), {**state, "updates": 0}
            )[0]
            assert (values > 0).tolist() == [i == expected for i in range(3)]


@pytest.mark.parametrize("name", ["beta_dpo"])
def test_another_draw_belongs_to_another_seed_and_to_another_update(name):
    pairs = with_margins(*torch.linspace(-1, 1, 12).tolist())

    def kept(seed: float, updates: int) -> list[bool]:
        state = {"mean": 0.0, "deviation": 5.0, "updates": updates}
        return (bind_loss(name, {"drop": 0.5, "drop_seed": seed}).step(pairs, state)[0] > 0).tolist()

    assert kept(2, 3) == kept(2.0, 3) == kept(3, 2) != kept(2, 2)
    assert len({tuple(kept(seed, 0)) for seed in range(20)}) > 10 and sum(kept(0, 0)) == 6


def test_pairs_are_kept_as_often_as_their_weight_says():
    """One of three is kept, by weights 1, 2 and 5."""
    weights = torch.tensor([1.0, 2.0, 5.0]).log()
    counts = sum(drawn(torch.tensor([3.0, 1.0, 2.0]), weights, 0.5, seed).double() for seed in range(4000))
    assert (counts / 4000).tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)


def test_a_single_pair_has_no_deviation_and_is_never_dropped():
    assert deviation_of(torch.tensor([3.0])).item() == 0
    assert drawn(torch.tensor([3.0]), torch.tensor([0.0]), 0.9, 0).tolist() == [True]
