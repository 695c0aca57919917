"""Modifiers: what each does to a pair, by hand; around any loss; and that none is ignored in silence."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.data.records import PAIR
from phi2.losses.batch import AnswerBatch, Columns, PairBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.properties import made_up_answers, require_pure, uses_batch
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.training.look import require_effect

GIVEN = {  # of each modifier knobs that change something
    "weight": {"weight_column": "weight"},
    "wpo": {"use_weighting": True},
    "sampo": {"sampo_seed": 3},
    "ld": {"ld_alpha": 0.25},
    "humanline": {"humanline_min": -0.25, "humanline_max": 0.25},
    "reduction": {"reduction": "mean"},
    "f_divergence": {"f_divergence_type": "js_divergence"},
}
BUILT_IN = [name for name, loss in PREFERENCE_LOSSES.items() if loss.is_own and loss.unit == "pair"]


# l_w = 2 in 2 tokens (1 and 1), l_l = -4 in 4 tokens (-1, 0, -1, -2)
SHORT, LONG = ([-1.0, -2.0], [-2.0, -3.0]), ([-2.0, -1.0, -2.0, -3.0], [-1.0] * 4)


def pair(chosen_answer=SHORT, rejected_answer=LONG) -> PairBatch:
    """One pair, from the log-probabilities of policy and reference of its answers."""
    chosen, ref_chosen, rejected, ref_rejected = (
        torch.tensor([logps], dtype=torch.float64) for logps in (*chosen_answer, *rejected_answer)
    )
    columns = Columns({"weight": torch.tensor([3.0], dtype=torch.float64)})
    return PairBatch(chosen, rejected, chosen < 1, rejected < 1, ref_chosen, ref_rejected, columns)


def value(name: str, **knobs) -> float:
    return bind_loss(name, knobs)(pair()).item()


def test_every_modifier_is_tried_here():
    assert GIVEN.keys() == MODIFIERS.keys()


def test_a_weight_multiplies_the_loss_of_its_pair():
    assert value("hinge", beta=0.1, weight_column="weight") == pytest.approx(3 * 0.4)


def weighed(**knobs) -> float:
    """log p - log sum p^2 of SHORT and LONG, policy: -1 + 2, -2 + 2; -2 + 2, -1 + 1, -2 + 2.5, -3 + 3.5."""
    sums = [torch.tensor([each], dtype=torch.float64) for each in ([-2.0, -2.0], [-2.0, -1.0, -2.5, -3.5])]
    pairs = replace(pair(), extras={"log_sum_square": tuple(sums)})
    return bind_loss("hinge", {"beta": 0.1, **knobs})(pairs).item()


def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_say_it():
    assert weighed(use_weighting=True) == pytest.approx(0.4 * exp(1 / 2 + 1 / 4))
    assert weighed(use_weighting=True, weighting_max=1.0) == pytest.approx(0.4)
    assert weighed(use_weighting=True, weighting_max=1.2) == pytest.approx(0.4 * 1.2)
    assert weighed(use_weighting=False) == pytest.approx(0.4)


def test_the_weight_of_wpo_has_no_gradient():
    pairs = replace(pair(), extras={"log_sum_square": (torch.full((1, 2), -2.0), torch.full((1, 4), -2.0))})
    chosen = pairs.policy_chosen_logps.requires_grad_()
    losses = [bind_loss("hinge", {"beta": 0.1, "use_weighting": on})(pairs).sum() for on in (True, False)]
    with_weight, plain = (torch.autograd.grad(loss, chosen) for loss in losses)
    weight = exp((-1 + 2 - 2 + 2) / 2 + (-2 + 2 - 1 + 2 - 2 + 2 - 3 + 2) / 4)
    torch.testing.assert_close(with_weight[0], weight * plain[0])


def test_ld_counts_the_tail_of_the_longer_answer_less():
    # the last two rejected tokens half: l_l = -1 - 0 - 0.5 - 1 = -2.5, l_w - l_l = 4.5
    assert value("gpo", link="squared", beta=1.0, ld_alpha=0.5) == pytest.approx((4.5 - 1) ** 2)
    assert value("gpo", link="squared", beta=1.0, ld_alpha=1) == pytest.approx((6 - 1) ** 2)
    assert value("slic", delta=10.0, slic_lambda=0.0, ld_alpha=0) == pytest.approx(10 + 3 - 3)  # s_l = -2 - 1


def test_ld_counts_the_tail_of_a_longer_chosen_answer_less_too():
    # l_w = -2.5, l_l = 2
    loss = bind_loss("gpo", {"link": "squared", "beta": 1.0, "ld_alpha": 0.5})
    assert loss(pair(LONG, SHORT)).item() == pytest.approx((-4.5 - 1) ** 2)


def test_ld_leaves_lengths_as_they_are():
    # l_l / n_l = -2.5 / 4
    assert value("ipo", beta=0.5, ld_alpha=0.5) == pytest.approx((1 + 2.5 / 4 - 1) ** 2)


def test_humanline_clamps_the_log_ratio_of_each_token():
    # l_w = 0.5 + 0.5, l_l = -1 + 0 - 1 - 1.5
    found = value("gpo", link="squared", beta=1.0, humanline_min=-1.5, humanline_max=0.5)
    assert found == pytest.approx((1 + 3.5 - 1) ** 2)


def test_a_clamped_token_has_no_gradient():
    pairs = pair()
    pairs.policy_rejected_logps.requires_grad_()
    bind_loss("sigmoid", {"humanline_min": -1.5})(pairs).sum().backward()
    assert (pairs.policy_rejected_logps.grad[0] != 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("kind", "ipo", "squared"),
    [
        ("sum", (6 - 1) ** 2, (6 - 1) ** 2),  # l_w - l_l = 6
        ("mean", (2 - 1) ** 2, (2 - 1) ** 2),  # 2 / 2 + 4 / 4 = 2
    ],
)
def test_a_reduction_makes_sums_or_means_of_what_a_loss_reads_as_either(kind, ipo, squared):
    assert value("ipo", beta=0.5, reduction=kind) == pytest.approx(ipo)
    assert value("gpo", link="squared", beta=1.0, reduction=kind) == pytest.approx(squared)


F_PRIME = {  # of l_w = 2 and of l_l = -4
    "reverse_kl": (2.0, -4.0),
    "forward_kl": (1 - exp(-2), 1 - exp(4)),
    "js_divergence": (log(2 / (1 + exp(-2))), log(2 / (1 + exp(4)))),
    "alpha_divergence": ((exp(-1) - 1) / -0.5, (exp(2) - 1) / -0.5),  # e^(-l / 2)
}


@pytest.mark.parametrize("name", F_PRIME)
def test_an_f_divergence_scores_the_log_ratio_of_the_answer(name):
    chosen, rejected = F_PRIME[name]
    given = {"f_divergence_type": name}
    assert value("gpo", link="squared", beta=1.0, **given) == pytest.approx((chosen - rejected - 1) ** 2)
    assert value("ipo", beta=0.5, **given) == pytest.approx((chosen / 2 - rejected / 4 - 1) ** 2)  # as in trl


def test_alpha_1_is_reverse_kl_and_another_alpha_is_used():
    given = {"f_divergence_type": "alpha_divergence"}
    assert value("sigmoid", f_alpha_divergence_coef=1.0, **given) == pytest.approx(value("sigmoid"))
    # a = 3: (e^(2 l) - 1) / 2
    found = value("gpo", link="squared", beta=1.0, f_alpha_divergence_coef=3.0, **given)
    assert found == pytest.approx(((exp(4) - 1) / 2 - (exp(-8) - 1) / 2 - 1) ** 2)


def test_likelihoods_beside_a_divergence_stay_likelihoods():
    # ukl: -s_w + e^(score of l_l)
    assert value("ukl", f_divergence_type="forward_kl") == pytest.approx(3 + exp(1 - exp(4)))


def test_sampo_keeps_as_many_tokens_as_the_shorter_answer_has():
    found = {value("gpo", link="squared", beta=1.0, sampo_seed=seed) for seed in range(40)}
    two_of_four = (-1, -2, -3)  # the sums that two of -1, 0, -1, -2 may have
    assert found == {(2 - rejected - 1) ** 2 for rejected in two_of_four}


def test_sampo_draws_from_the_chosen_answer_where_that_is_the_longer_one():
    losses = [bind_loss("gpo", {"link": "squared", "beta": 1.0, "sampo_seed": seed}) for seed in range(40)]
    assert {loss(pair(LONG, SHORT)).item() for loss in losses} == {(drawn - 2 - 1) ** 2 for drawn in (-1, -2, -3)}


def test_sampo_draws_each_token_alike_often():
    drawn = torch.stack([kept_by(seed) for seed in range(400)]).double().mean(dim=0)
    assert ((drawn - 0.5).abs() < 0.1).all()  # four standard deviations


def kept_by(seed: float) -> Tensor:
    """Which of the four rejected tokens a loss is given."""
    kept = masks_of(given := pair(), seed)[1]
    assert given.rejected_mask.all()  # what it is given stays as it is
    return kept[0]


def test_sampo_draws_the_same_tokens_whatever_else_is_masked_out():
    """Of nine tokens the first, the third and the last four are none of the rejected answer's."""
    places, rejected = [1, 3, 4], torch.zeros(1, 9)
    rejected[0, places] = torch.tensor([-1.0, -2.0, -3.0])
    given = pair((rejected[0].tolist(), [0.0] * 9), SHORT)
    given = replace(given, chosen_mask=(rejected < 0), ref_chosen_logps=None, ref_rejected_logps=None)
    for seed in range(20):
        kept, padded = (masks_of(pairs, seed)[0] for pairs in (given, with_padding(given, 30)))
        assert kept.sum() == 2 and not kept[~given.chosen_mask].any()
        assert torch.equal(padded[:, :9], kept) and not padded[:, 9:].any()


def masks_of(pairs: PairBatch, seed: float) -> tuple[Tensor, Tensor]:
    """What sampo gives a loss of a chosen and a rejected answer's tokens."""
    seen: list[PairBatch] = []
    MODIFIERS["sampo"].function(seen.append, sampo_seed=seed)(pairs)
    return seen[0].chosen_mask, seen[0].rejected_mask


def with_padding(pairs: PairBatch, tokens: int) -> PairBatch:
    wider = {name: F.pad(getattr(pairs, name), (0, tokens)) for name in ("policy_chosen_logps", "chosen_mask")}
    return replace(pairs, **wider)


def test_the_seed_of_sampo_may_come_as_a_float():
    assert torch.equal(kept_by(3.0), kept_by(3))


def test_alpha_divergence_stays_finite_far_from_the_reference():
    far = pair(([-2000.0], [-1.0]), ([-1.0], [-1.0]))
    assert bind_loss("sigmoid", {"f_divergence_type": "alpha_divergence"})(far).isfinite().all()


# ---- around any loss ----


def shown(loss: BoundLoss) -> AnswerBatch:
    weights = torch.tensor([1.0, 2.0, 0.5])
    columns = Columns({"weight": weights, "score_chosen": 1 + weights, "score_rejected": 0 * weights})
    lengths = [(5, 2), (2, 4), (3, 0)]
    return made_up_answers(lengths, [PAIR] * 3, columns, loss.reference_free, loss.needs)


def combinations() -> list[tuple[str, str]]:
    free = {name for name in BUILT_IN if PREFERENCE_LOSSES[name].reference_free}
    whole = {name for name in BUILT_IN if PREFERENCE_LOSSES[name].scope == "window"}
    return [
        (name, modifier)
        for name in BUILT_IN
        for modifier, each in MODIFIERS.items()
        if not (each.needs_reference and name in free) and not (each.needs_values_of_pairs and name in whole)
    ]


@pytest.mark.parametrize(("name", "modifier"), combinations())
def test_a_modified_loss_is_a_pure_function_of_each_pair(name, modifier):
    loss = bind_loss(name, GIVEN[modifier])
    pairs = shown(loss)
    require_pure(loss, pairs)
    assert loss.scope == "window" or not uses_batch(loss, pairs)
    assert loss(pairs).isfinite().all()


# What a modifier acts on and a loss does not read: means per token are means already, s and r are no log-ratio.
MISSES = {("reduction", name) for name in ("sigmoid_norm", "ipo", "sft", "simpo", "alphapo", "repo", "orpo")}
MISSES |= {("reduction", name) for name in ("alphadpo", "amapo")}
MISSES |= {("f_divergence", name) for name in ("hdpo", "aot")}


@pytest.mark.parametrize(
    ("name", "modifier"),
    [pair for pair in combinations() if MODIFIERS[pair[1]].may_miss and pair != ("rdpo", "reduction")],
)
def test_a_modifier_that_changes_nothing_in_a_loss_is_refused_by_the_first_look(name, modifier):
    loss = bind_loss(name, GIVEN[modifier])
    if (modifier, name) in MISSES:
        with pytest.raises(ValueError, match=f"changes nothing in loss '{name}'"):
            require_effect(loss, shown(loss))
    else:
        require_effect(loss, shown(loss))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_goes_with_a_reduction(kind):
    """The coefficient that only one of the divergences has is at its default."""
    loss = bind_loss("sigmoid", {"reduction": "mean", "f_divergence_type": kind})
    require_effect(loss, shown(loss))


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_no_reduction_goes_with_a_loss_that_counts_tokens(kind):
    loss = bind_loss("rdpo", {"reduction": kind})
    with pytest.raises(ValueError, match=f"alpha of loss 'rdpo' changes nothing beside reduction {kind}"):
        require_effect(loss, shown(loss))


def test_a_neutral_value_may_be_written_down():
    for knobs in ({"reduction": "sum"}, {"f_divergence_type": "reverse_kl"}):
        loss = bind_loss("hdpo", knobs)
        require_effect(loss, shown(loss))


def test_several_modifiers_apply_in_their_order():
    # tokens first, l_l = -2.5, then the mean over all 4, then the score 1 - e^-l of both means
    knobs = {"ld_alpha": 0.5, "reduction": "mean", "f_divergence_type": "forward_kl", "weight_column": "weight"}
    expected = 3 * ((1 - exp(-1)) - (1 - exp(2.5 / 4)) - 1) ** 2
    assert value("gpo", link="squared", beta=1.0, **knobs) == pytest.approx(expected)
    assert value("gpo", link="squared", beta=1.0, **dict(reversed(knobs.items()))) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["apo_zero_unpaired", "nca"])
def test_a_weight_multiplies_the_loss_of_each_prompt_whatever_its_answers_are(name):
    columns = Columns({"weight": torch.tensor([3.0, 0.5])})
    answers = made_up_answers([(5, 2, 3), (2, 4)], [(1.0, 0.0, 0.0), PAIR], columns, reference_free=False)
    weighted, plain = bind_loss(name, {"weight_column": "weight"}), bind_loss(name)
    torch.testing.assert_close(weighted(answers), plain(answers) * columns["weight"])


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        (
            "simpo",
            {"f_divergence_type": "js_divergence"},
            "'simpo' has no reference, and f_divergence_type acts on",
        ),
        (
            "orpo",
            {"humanline_min": -1.0},
            "'orpo' has no reference, and humanline_min acts on the log-ratio",
        ),
        (
            "sigmoid",
            {"f_divergence_type": "kl"},
            "f_divergence_type must be one of reverse_kl, forward_kl, js_",
        ),
        (
            "sigmoid",
            {"f_alpha_divergence_coef": 0.7},
            "f_alpha_divergence_coef 0.7 needs f_divergence_type alpha_",
        ),
        ("sigmoid", {"weighting_max": 1.0}, "weighting_max 1.0 needs use_weighting true, got false"),
        ("sigmoid", {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ("sigmoid", {"sampo_seed": 0.5}, "sampo_seed must be a whole number from 0 on, got 0.5"),
        ("sigmoid", {"reduction": "median"}, "reduction must be one of sum, mean, got 'median'"),
        ("sigmoid", {"weight_column": 3}, "weight_column must be a name, got 3"),
        ("sigmoid", {"humanline_min": 2.0}, "humanline_min must be below humanline_max 1.5, got 2.0"),
        (
            "aot",
            {"weight_column": "weight"},
            "weight_column .* acts on the value of each pair, and the values of loss 'aot'",
        ),
        ("kto", {"ld_alpha": 0.5}, "ld_alpha acts on pairs, and loss 'kto' gives each answer a value$"),
        ("nca", {"use_weighting": True}, "use_weighting acts on pairs, and loss 'nca' gives each prompt a value$"),
        ("bco_unpaired", {"weight_column": "w"}, "the values of loss 'bco_unpaired' belong to its window"),
        ("sigmoid", {"ld_alfa": 0.5}, "loss 'sigmoid' does not take 'ld_alfa'; did you mean ld_alpha?"),
    ],
)
def test_what_cannot_be_applied_is_refused(name, knobs, message):
    with pytest.raises(ValueError, match=message):
        bind_loss(name, knobs)


def test_a_missing_weight_is_named_with_the_columns_there_are():
    with pytest.raises(ValueError, match="reads the column 'w'; columns of numbers here are weight"):
        value("sigmoid", weight_column="w")
