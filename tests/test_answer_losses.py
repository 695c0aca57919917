"""The losses of labelled answers, of lists and with an answer to imitate, on numbers worked out by hand.

`tests/mutate_losses.py` breaks each in many ways and runs these on it; `test_answer_invariances.py` has what each must
not depend on.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import AnswerBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES

BUILT_IN = {
    name: loss
    for name, loss in PREFERENCE_LOSSES.items()
    if loss.is_own and (loss.unit != "pair" or loss.needs) and "kl" not in loss.needs
}
Answer = tuple[float, list[float], list[float]]  # a score, and the log-probabilities of policy and reference


def batch_of(*prompts: list[Answer]) -> AnswerBatch:
    """Prompts with their answers, float64."""
    answers = [answer for each in prompts for answer in each]
    longest = max(len(policy) for _, policy, _ in answers)
    padded = [[row + [0.0] * (longest - len(row)) for row in logps] for _, *logps in answers]
    policy, ref = torch.tensor(padded, dtype=torch.float64).unbind(dim=1)
    prompt = tuple(i for i, each in enumerate(prompts) for _ in each)
    return AnswerBatch(
        policy, tuple(len(row) for _, row, _ in answers), prompt, tuple(score for score, *_ in answers), ref
    )


# Labelled answers: a pair, a good one, a bad one.
#   a  good  s = -3  r = -5  l =  2     c  good  s = -4  r = -1  l = -3
#   b  bad   s = -8  r = -4  l = -4     d  bad   s = -3  r = -6  l =  3
# Behind other prompts: l = 1, then 2.5 and -1, then -0.5; their mean is 0.5.
A = (1.0, [-1.0, -2.0], [-2.0, -3.0])
B = (0.0, [-2.0, -1.0, -2.0, -3.0], [-1.0] * 4)
C = (1.0, [-4.0], [-1.0])
D = (0.0, [-1.0] * 3, [-2.0] * 3)
OTHERS = ([(0.0, [-0.5, -0.5], [-1.0, -1.0])], [(1.0, [-1.0], [-3.5]), (0.0, [-2.0], [-1.0])], [(1.0, [-2.0], [-1.5])])


def labelled(others: float = 0.0) -> AnswerBatch:
    """These; `others` is added to l of each answer behind another prompt."""
    mismatched = batch_of(*OTHERS)
    mismatched = replace(
        mismatched, policy_logps=mismatched.policy_logps + others * mismatched.mask / mismatched.length[:, None]
    )
    return replace(batch_of([A, B], [C], [D]), mismatched=mismatched)


# Lists: four answers to the first prompt, two of them of the same score, and two to the second, whose order is wrong.
#   a  score  3  n = 2  s = -3  r = -5  l =  2   s/n = -1.5     e  score  1  n = 3  s = -6  r = -3  l = -3  s/n = -2
#   b  score  1  n = 4  s = -8  r = -4  l = -4   s/n = -2       f  score -1  n = 2  s = -2  r = -4  l =  2  s/n = -1
#   c  score  1  n = 1  s = -1  r = -2  l =  1   s/n = -1
#   d  score -1  n = 3  s = -9  r = -9  l =  0   s/n = -3
LIST = [(3.0, *A[1:]), (1.0, *B[1:]), (1.0, [-1.0], [-2.0]), (-1.0, [-3.0] * 3, [-1.0, -4.0, -4.0])]
WRONG = [(1.0, [-2.0] * 3, [-1.0] * 3), (-1.0, [-1.0] * 2, [-2.0] * 2)]
Z = {"a": 1.0, "b": -2.0, "c": 0.5, "d": 0.0, "e": -1.5, "f": 1.0}  # l / 2


def lists() -> AnswerBatch:
    return batch_of(LIST, WRONG)


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    """-log sigma(x), whose slope is -sigma(-x)."""
    return log(1 + exp(-x))


# Of each loss: knobs, the batch, the value of each prompt, the slopes of their sum for s of each answer.
Case = tuple[dict, AnswerBatch, list[float], list[float]]


def kto_case() -> Case:
    """z = 0.5: beta (l - z) is 0.75, -2.25, -1.75, 1.25. The first prompt's value is the mean of two."""
    good, bad = 2.0, 0.75
    values = [
        (good * (1 - sigma(0.75)) + bad * (1 - sigma(2.25))) / 2,
        good * (1 - sigma(-1.75)),
        bad * (1 - sigma(-1.25)),
    ]
    of_sigma = {x: 0.5 * sigma(x) * sigma(-x) for x in (0.75, 2.25, 1.75, 1.25)}  # beta sigma'
    slopes = [-good * of_sigma[0.75] / 2, bad * of_sigma[2.25] / 2, -good * of_sigma[1.75], bad * of_sigma[1.25]]
    return {"beta": 0.5, "desirable_weight": good, "undesirable_weight": bad}, labelled(), values, slopes


def kto_below_zero_case() -> Case:
    """The mean behind other prompts is -0.25: z = 0."""
    return {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.75}, labelled(-0.75), *by_label(2.0, 0.75)


def by_label(good: float, bad: float) -> tuple[list[float], list[float]]:
    """Of l / 2 = 1, -2, -1.5, 1.5."""
    values = [(good * sigma(-1) + bad * sigma(-2)) / 2, good * sigma(1.5), bad * sigma(1.5)]
    of_sigma = {x: 0.5 * sigma(x) * sigma(-x) for x in (1, 2, 1.5)}
    return values, [-good * of_sigma[1] / 2, bad * of_sigma[2] / 2, -good * of_sigma[1.5], bad * of_sigma[1.5]]


def apo_zero_unpaired_case() -> Case:
    knobs = {"beta": 0.5, "desirable_weight": 0.5, "undesirable_weight": 3.0}
    return knobs, labelled(), *by_label(0.5, 3.0)


def bco_unpaired_case() -> Case:
    """l / 2 = 1, -2, -1.5, 1.5: d is their mean, -0.25."""
    values = [(nls(1.25) + nls(1.75)) / 2, nls(-1.25), nls(-1.75)]
    slopes = [-0.5 * sigma(-1.25) / 2, 0.5 * sigma(-1.75) / 2, -0.5 * sigma(1.25), 0.5 * sigma(1.75)]
    return {"beta": 0.5}, labelled(), values, slopes


def shares(*names: str) -> dict[str, float]:
    """e^z of each over their sum."""
    powers = {name: exp(Z[name]) for name in names}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def plackett_luce_case() -> Case:
    """a before b, c and d; b before d; c before d. e before f."""
    best, b, c = shares(*"abcd"), shares(*"bd"), shares(*"cd")
    values = [-log(best["a"]) - log(b["b"]) - log(c["c"]), nls(-2.5)]
    first = [best["a"] - 1, best["b"] + b["b"] - 1, best["c"] + c["c"] - 1, best["d"] + b["d"] + c["d"]]
    return {"beta": 0.5}, lists(), values, [*(0.5 * x for x in first), -0.5 * sigma(2.5), 0.5 * sigma(2.5)]


def softmax_dpo_case() -> Case:
    best = shares(*"abcd")
    first = [best["a"] - 1, best["b"], best["c"], best["d"]]
    return (
        {"beta": 0.5},
        lists(),
        [-log(best["a"]), nls(-2.5)],
        [*(0.5 * x for x in first), -0.5 * sigma(2.5), 0.5 * sigma(2.5)],
    )


def lipo_case() -> Case:
    """Gains 7, 1, 1, -1/2 and 1, -1/2. By z the order is a c d b and f e, so that D is log 2, log 5, log 3, log 4 and
    log 3, log 2. -log sigma of each better z less a worse one."""
    weights = {
        "ab": 6 * (1 / log(2) - 1 / log(5)),
        "ac": 6 * (1 / log(2) - 1 / log(3)),
        "ad": 7.5 * (1 / log(2) - 1 / log(4)),
        "bd": 1.5 * (1 / log(4) - 1 / log(5)),
        "cd": 1.5 * (1 / log(3) - 1 / log(4)),
        "ef": 1.5 * (1 / log(2) - 1 / log(3)),
    }
    values, slopes = [0.0, 0.0], dict.fromkeys(Z, 0.0)
    for (i, j), weight in weights.items():
        values[i == "e"] += weight * nls(Z[i] - Z[j])
        slopes[i] -= 0.5 * weight * sigma(Z[j] - Z[i])
        slopes[j] += 0.5 * weight * sigma(Z[j] - Z[i])
    return {"beta": 0.5}, lists(), values, list(slopes.values())


def soft_labels() -> tuple[list[float], list[float]]:
    """e^(score / 2) over their sums."""
    first, second = [exp(1.5), exp(0.5), exp(0.5), exp(-0.5)], [exp(0.5), exp(-0.5)]
    return [x / sum(first) for x in first], [x / sum(second) for x in second]


def infonca_case() -> Case:
    of_z = [list(shares(*"abcd").values()), list(shares(*"ef").values())]
    both = [*zip(soft_labels(), of_z, strict=True)]
    values = [-sum(q * log(p) for q, p in zip(labels, found, strict=True)) for labels, found in both]
    slopes = [0.5 * (p - q) for labels, found in both for q, p in zip(labels, found, strict=True)]
    return {"beta": 0.5, "temperature": 2.0}, lists(), values, slopes


def nca_case() -> Case:
    first, second = (
        [*zip(labels, names, strict=True)] for labels, names in zip(soft_labels(), ("abcd", "ef"), strict=True)
    )
    values = [sum(q * nls(Z[i]) + nls(-Z[i]) / len(each) for q, i in each) for each in (first, second)]
    slopes = [0.5 * (-q * sigma(-Z[i]) + sigma(Z[i]) / len(each)) for each in (first, second) for q, i in each]
    return {"beta": 0.5, "temperature": 2.0}, lists(), values, slopes


def sppo_case() -> Case:
    """P is the mean of sigma over the answer itself, 1/2, and the others: differences 2, 2, 4 of a and so on."""
    half = 0.5
    wins = [
        (half + 2 * sigma(2) + sigma(4)) / 4,
        (sigma(-2) + half + half + sigma(2)) / 4,
        (sigma(-2) + half + half + sigma(2)) / 4,
        (sigma(-4) + 2 * sigma(-2) + half) / 4,
        (half + sigma(2)) / 2,
        (sigma(-2) + half) / 2,
    ]
    apart = [ratio - (p - half) / 0.25 for ratio, p in zip((2, -4, 1, 0, -3, 2), wins, strict=True)]
    squares = [x**2 for x in apart]
    slopes = [*(2 * x / 4 for x in apart[:4]), *(2 * x / 2 for x in apart[4:])]
    return {"beta": 0.25}, lists(), [sum(squares[:4]) / 4, sum(squares[4:]) / 2], slopes


def rrhf_case() -> Case:
    """Of s/n only c is above a, by 1/2, and f above e, by 1."""
    values = [2 * 0.5 + 3, 2 * 1 + 6]
    return {"rank_weight": 2.0}, lists(), values, [-1 - 2 / 2, 0.0, 2 / 1, 0.0, -1 - 2 / 3, 2 / 2]


# tpo: both pairs of test_losses.py with an answer to imitate, of 1 and of 4 tokens, 2.5 in the mean.
#   s_w - s_l = 5, -5   s_w/n_w - s_l/n_l = 0.5, -0.5   s of the answer to imitate: -2, -8
GOLD = ([(1.0, [-2.0], [0.0])], [(1.0, [-2.0] * 4, [0.0] * 4)])


def with_gold() -> AnswerBatch:
    return replace(batch_of([A, B], [(1.0, *B[1:]), (0.0, *A[1:])]), gold=batch_of(*GOLD))


def tpo_cases() -> list[Case]:
    def case(values: tuple[float, float], slopes: list[float], **knobs) -> Case:
        imitated = [0.6 * s / 2.5 for s in (2, 8)]
        return {"tpo_alpha": 0.6, **knobs}, with_gold(), [x + y for x, y in zip(values, imitated, strict=True)], slopes

    smooth = {x: 0.9 * nls(x) + 0.1 * nls(-x) for x in (2.5, -2.5, 0.125, -0.375)}
    down = {x: 0.9 * sigma(-x) - 0.1 * sigma(x) for x in smooth}  # -slope
    first, second = 0.5 * down[2.5], 0.5 * down[-2.5]
    near, far = 0.5 * down[0.125], 0.5 * down[-0.375]  # beta 1/2: 0.25 - 0.125, -0.25 - 0.125
    per_token = [-near / 2, near / 4, -far / 4, far / 2]
    return [
        case((smooth[2.5], smooth[-2.5]), [-first, first, -second, second], beta=0.5, label_smoothing=0.1),
        case((0.0, 1 + 2.5), [0.0, 0.0, -0.5, 0.5], beta=0.5, contrast="hinge"),
        case((2.25, 6.25), [-3 / 2, 3 / 4, -5 / 4, 5 / 2], beta=0.25, contrast="ipo"),  # 1 / (2 beta) = 2
        case(
            (smooth[0.125], smooth[-0.375]),
            per_token,
            beta=0.5,
            label_smoothing=0.1,
            contrast="tpo_l",
            tpo_l_gamma=0.125,
        ),
    ]


BY_HAND: dict[str, list[Case]] = {
    "tpo": tpo_cases(),
    "kto": [kto_case(), kto_below_zero_case()],
    "apo_zero_unpaired": [apo_zero_unpaired_case()],
    "bco_unpaired": [bco_unpaired_case()],
    "plackett_luce": [plackett_luce_case()],
    "softmax_dpo": [softmax_dpo_case()],
    "lipo": [lipo_case()],
    "infonca": [infonca_case()],
    "nca": [nca_case()],
    "sppo": [sppo_case()],
    "rrhf": [rrhf_case()],
}

# A good answer and a bad one of one token, where policy and reference are one model, at the default knobs: the loss,
# and its slopes for s of both. sigma(0) = 1/2 and sigma'(0) = 1/4 make most of them.
STEP = 1 / log(2) - 1 / log(3)  # of the two ranks of lipo
TARGET = (sigma(1) / 2 + 1 / 4 - 1 / 2) / 0.001  # of sppo: P is the mean of 1/2 and sigma(1)
AT_REFERENCE: dict[str, tuple[float, float, float]] = {
    "kto": (1 / 2, -0.1 / 4 / 2, 0.1 / 4 / 2),
    "apo_zero_unpaired": (1 / 2, -0.1 / 4 / 2, 0.1 / 4 / 2),
    "bco_unpaired": (log(2), -0.01 / 2 / 2, 0.01 / 2 / 2),
    "plackett_luce": (log(2), -0.1 / 2, 0.1 / 2),
    "softmax_dpo": (log(2), -0.1 / 2, 0.1 / 2),
    "lipo": (STEP * log(2), -0.05 * STEP / 2, 0.05 * STEP / 2),
    "infonca": (log(2), 0.01 * (1 / 2 - sigma(1)), 0.01 * (1 / 2 - sigma(-1))),
    "nca": (2 * log(2), 0.01 * (1 / 4 - sigma(1) / 2), 0.01 * (1 / 4 - sigma(-1) / 2)),
    "sppo": (TARGET**2, -TARGET, TARGET),
}


def values_and_slopes(name: str, knobs: dict, answers: AnswerBatch) -> tuple[Tensor, Tensor]:
    """(P,) losses, and (A, T) derivatives of their sum."""
    policy = answers.policy_logps.clone().requires_grad_()
    values = bind_loss(name, knobs)(replace(answers, policy_logps=policy))
    return values.detach(), torch.autograd.grad(values.sum(), policy)[0]


def test_every_loss_of_answers_has_its_numbers_worked_out_by_hand():
    assert BY_HAND.keys() == BUILT_IN.keys()
    assert AT_REFERENCE.keys() == {name for name, loss in BUILT_IN.items() if not loss.reference_free}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_and_slopes_equal_those_worked_out_by_hand(name):
    """Scores are float32, and so is what is made of them alone."""
    for knobs, answers, values, slopes in BY_HAND[name]:
        found, gradient = values_and_slopes(name, knobs, answers)
        assert found.tolist() == pytest.approx(values, rel=1e-6), knobs
        assert gradient[:, 0].tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-9), knobs  # of every first token
        assert (gradient == gradient[:, :1]).all()  # of a sum: every token has the same


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_and_slopes_where_policy_and_reference_agree(name):
    answers = batch_of([(1.0, [-1.0], [-1.0]), (0.0, [-1.0], [-1.0])])
    value, slopes = values_and_slopes(name, {}, replace(answers, mismatched=answers))
    assert [value.item(), *slopes[:, 0].tolist()] == pytest.approx(AT_REFERENCE[name], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["bco_unpaired"])
def test_the_state_of_a_loss_moves_as_worked_out_by_hand(name):
    """Rewards 1, -2, -1.5, 1.5 behind 6 of mean 2: d = (12 - 1) / 10 = 1.1."""
    values, after = bind_loss(name, {"beta": 0.5}).step(labelled(), {"mean": 2.0, "answers": 6})
    assert after == pytest.approx({"mean": 1.1, "answers": 10})
    expected = [(nls(1 - 1.1) + nls(1.1 + 2)) / 2, nls(-1.5 - 1.1), nls(1.1 - 1.5)]
    assert values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tpo"])
def test_every_token_to_imitate_pulls_the_same(name):
    """-tpo_alpha over 2.5 tokens in the mean, whichever answer a token belongs to."""
    answers = with_gold()
    assert answers.gold is not None
    gold = answers.gold.policy_logps.clone().requires_grad_()
    answers = replace(answers, gold=replace(answers.gold, policy_logps=gold))
    bind_loss(name, {"tpo_alpha": 0.6})(answers).sum().backward()
    assert gold.grad is not None and gold.grad[answers.gold.mask].tolist() == pytest.approx([-0.24] * 5)


@pytest.mark.parametrize("name", ["kto"])
def test_answers_behind_other_prompts_get_no_gradient(name):
    """z = 0.5 is above 0, where its clamp has a slope."""
    answers = labelled()
    assert answers.mismatched is not None
    others = answers.mismatched.policy_logps.clone().requires_grad_()
    policy = answers.policy_logps.clone().requires_grad_()
    answers = replace(answers, policy_logps=policy, mismatched=replace(answers.mismatched, policy_logps=others))
    bind_loss(name)(answers).sum().backward()
    assert others.grad is None and policy.grad is not None


WITHOUT_CENTRE = [name for name in BUILT_IN if name != "bco_unpaired"]  # it moves with the answers, without gradient


@pytest.mark.parametrize("name", WITHOUT_CENTRE)
def test_gradient_equals_finite_differences(name):
    _, answers, _, _ = BY_HAND[name][0]
    loss, policy = bind_loss(name), answers.policy_logps.clone().requires_grad_()

    def values(logps: Tensor) -> Tensor:
        return loss(replace(answers, policy_logps=logps * answers.mask))

    assert torch.autograd.gradcheck(values, policy, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_reference_is_asked_for_by_those_that_need_one_alone(name):
    loss, (_, answers, values, _) = bind_loss(name, BY_HAND[name][0][0]), BY_HAND[name][0]
    without = replace(answers, ref_logps=None)
    if loss.reference_free:
        assert loss(without).tolist() == pytest.approx(values)
    else:
        with pytest.raises(ValueError, match="this run has no reference"):
            loss(without)
