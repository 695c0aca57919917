"""What each loss of labelled answers, of lists, or with an answer to imitate must not depend on, and what it becomes.

`tests/mutate_losses.py` breaks each in many ways and runs these on it too; `test_answer_losses.py` has their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.properties import made_up_answers
from phi2.losses.registry import PREFERENCE_LOSSES

OWN = {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own}
BUILT_IN = {name: loss for name, loss in OWN.items() if (loss.unit != "pair" or loss.needs) and "kl" not in loss.needs}
ALONE = [name for name, loss in BUILT_IN.items() if loss.scope == "pair"]
OF_WINDOWS = [name for name, loss in BUILT_IN.items() if loss.scope == "window"]
OF_LISTS = [name for name, loss in BUILT_IN.items() if loss.unit == "prompt"]

LABELS = ([(3, 5), (4,), (2,), (1, 6)], [(1.0, 0.0), (1.0,), (0.0,), (1.0, 0.0)])
LISTS = ([(3, 5, 2, 4), (4, 1), (2, 3, 6)], [(3.0, 1.0, 1.0, -1.0), (1.0, 0.0), (0.5, 0.25, 0.0)])
PAIRS = ([(3, 5), (4, 1), (2, 6)], [(1.0, 0.0)] * 3)


def made_up(name: str) -> AnswerBatch:
    """Answers such as the loss takes, in float64; those behind other prompts are more likely than to the reference."""
    loss = BUILT_IN[name]
    lengths, scores = {"answer": LABELS, "prompt": LISTS, "pair": PAIRS}[loss.unit]
    answers = made_up_answers(lengths, scores, Columns(), loss.reference_free, loss.needs)
    answers = change(answers, lambda logps, _: logps.double())
    others = answers.mismatched
    return replace(answers, mismatched=others and replace(others, policy_logps=others.policy_logps + 0.5 * others.mask))


def change(answers: AnswerBatch, function: Callable[[Tensor, AnswerBatch], Tensor], **options) -> AnswerBatch:
    """`function(logps, batch)` of the log-probabilities of policy and reference, those of other answers too."""
    others = {
        name: each and change(each, function) for name in ("gold", "mismatched") if (each := getattr(answers, name))
    }
    ref = None if answers.ref_logps is None else function(answers.ref_logps, answers)
    return replace(answers, policy_logps=function(answers.policy_logps, answers), ref_logps=ref, **others, **options)


def shifted_like_its_reference(answers: AnswerBatch) -> AnswerBatch:
    return change(
        answers, lambda logps, batch: logps + torch.linspace(-4, 8, logps.numel()).view_as(logps) * batch.mask
    )


def moved_together(answers: AnswerBatch) -> AnswerBatch:
    """Every answer by as much, so that nothing between two of them changes."""
    moved = answers.policy_logps - 0.25 * answers.mask / answers.length[:, None]
    return replace(answers, policy_logps=moved)


def in_halves(answers: AnswerBatch) -> AnswerBatch:
    def halves(logps: Tensor, _: AnswerBatch) -> Tensor:
        return (logps / 2).repeat_interleave(2, dim=1)

    return longer(change(answers, halves))


def twice(answers: AnswerBatch) -> AnswerBatch:
    return longer(change(answers, lambda logps, _: logps.repeat_interleave(2, dim=1)))


def longer(answers: AnswerBatch) -> AnswerBatch:
    gold = answers.gold and replace(answers.gold, lengths=tuple(2 * n for n in answers.gold.lengths))
    return replace(answers, lengths=tuple(2 * n for n in answers.lengths), gold=gold)


def rescored(factor: float, offset: float) -> Callable[[AnswerBatch], AnswerBatch]:
    return lambda answers: replace(answers, scores=tuple(factor * score + offset for score in answers.scores))


# ratio:    only policy - reference counts, token by token
# together: the same amount on the log-probability of every answer changes nothing
# sum:      a token cut in two, each with half its log-probability, changes nothing
# mean:     every token twice changes nothing
# offset:   the same number on every score changes nothing
# order:    scores by another unit change nothing: what is better than what is all that counts
INVARIANT = {
    "tpo": "together",  # sums in its contrast, a mean in its likelihood
    "kto": "ratio sum",
    "apo_zero_unpaired": "ratio sum",
    "bco_unpaired": "ratio together sum",  # its shift moves along, at the start of a run
    "plackett_luce": "ratio together sum offset order",
    "softmax_dpo": "ratio together sum offset order",
    "lipo": "ratio together sum",
    "infonca": "ratio together sum offset",
    "nca": "ratio sum offset",
    "sppo": "ratio sum offset",
    "rrhf": "offset order",  # a sum in its likelihood, means in its ranking
}
CHANGES = {
    "ratio": shifted_like_its_reference,
    "together": moved_together,
    "sum": in_halves,
    "mean": twice,
    "offset": rescored(1.0, 2.0),
    "order": rescored(0.5, 0.0),
}


def test_every_loss_of_answers_says_what_it_must_not_depend_on():
    assert INVARIANT.keys() == BUILT_IN.keys()


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_said_not_to_count_does_not_and_all_else_does(name):
    answers, loss = made_up(name), bind_loss(name)
    for what, changed in CHANGES.items():
        if (loss.reference_free and what == "ratio") or (what in ("offset", "order") and name not in OF_LISTS):
            continue
        same = torch.allclose(loss(changed(answers)), loss(answers), rtol=1e-6, atol=1e-9)
        assert same == (what in INVARIANT[name].split()), what


# ---- order, padding, neighbours ----


def reordered(answers: AnswerBatch, order: list[int]) -> AnswerBatch:
    """The prompts in another order, with all that belongs to them."""
    each = [answers.only(prompt) for prompt in order]
    return joined(each)


def joined(each: list[AnswerBatch]) -> AnswerBatch:
    width = max(one.policy_logps.shape[1] for one in each)
    ref = None if each[0].ref_logps is None else torch.cat([widened(one.ref_logps, width) for one in each])
    others = {
        name: joined([getattr(one, name) for one in each])
        for name in ("gold", "mismatched")
        if getattr(each[0], name) is not None
    }
    return AnswerBatch(
        torch.cat([widened(one.policy_logps, width) for one in each]),
        tuple(n for one in each for n in one.lengths),
        tuple(prompt for prompt, one in enumerate(each) for _ in one.lengths),
        tuple(score for one in each for score in one.scores),
        ref,
        **others,
    )


def widened(logps: Tensor, width: int) -> Tensor:
    return pad(logps, (0, width - logps.shape[1]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_prompts_in_another_order_have_the_same_losses(name):
    answers, loss = made_up(name), bind_loss(name)
    order = [2, 0, 1, 3][: answers.count] if answers.count == 4 else [2, 0, 1]
    torch.testing.assert_close(loss(reordered(answers, order)), loss(answers)[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OF_LISTS)
def test_answers_of_the_same_score_may_change_places(name):
    """The second and the third answer to the first prompt."""
    answers, loss, places = made_up(name), bind_loss(name), [0, 2, 1, *range(3, 9)]
    exchanged = change(answers, lambda logps, _: logps[places], lengths=tuple(answers.lengths[i] for i in places))
    torch.testing.assert_close(loss(exchanged), loss(answers), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_padding_changes_nothing(name):
    answers, loss = made_up(name), bind_loss(name)
    padded = change(answers, lambda logps, _: pad(logps, (0, 3)))
    torch.testing.assert_close(loss(padded), loss(answers), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALONE)
def test_a_prompt_does_not_depend_on_its_neighbours_in_the_batch(name):
    """Among them are prompts of more answers, which make its row of the grid longer: values and gradients are alike."""
    answers, loss = made_up(name), bind_loss(name)
    values, gradient = values_and_gradient(loss, answers)
    start = 0
    for prompt in range(answers.count):
        alone = answers.only(prompt)
        value, own = values_and_gradient(loss, alone)
        torch.testing.assert_close(value[0], values[prompt], rtol=1e-12, atol=0)
        whole = gradient[start : start + len(alone.lengths), : own.shape[1]]
        torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-15)
        start += len(alone.lengths)


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_a_prompt_of_a_window_depends_on_the_others(name):
    answers, loss = made_up(name), bind_loss(name, {"beta": 0.5})
    alone = torch.cat([loss(answers.only(prompt)) for prompt in range(answers.count)])
    assert not torch.allclose(alone.mean(), loss(answers).mean(), rtol=1e-7, atol=0)


def values_and_gradient(loss: BoundLoss, answers: AnswerBatch) -> tuple[Tensor, Tensor]:
    policy = answers.policy_logps.clone().requires_grad_()
    values = loss(replace(answers, policy_logps=policy))
    return values.detach(), torch.autograd.grad(values.sum(), policy)[0]


# ---- far away, and at the edge ----


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_far_from_the_reference_have_a_finite_loss_and_gradient(name):
    """Log-ratios of 300 and of -300 over a whole answer, whose e^300 no float32 holds."""
    for sign in (1, -1):
        answers = change(made_up(name), lambda logps, _: logps.float())
        far = torch.tensor([[(-1.0) ** i * sign * 300 / n] for i, n in enumerate(answers.lengths)])
        moved = replace(answers, policy_logps=(answers.policy_logps + far) * answers.mask)
        values, gradient = values_and_gradient(bind_loss(name), moved)
        assert values.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_answer_without_tokens_gives_a_finite_loss_and_gradient(name):
    answers = made_up(name)
    short = replace(answers, lengths=(*answers.lengths[:-1], 0))
    empty = change(short, lambda logps, batch: logps * batch.mask)
    values, gradient = values_and_gradient(bind_loss(name), empty)
    assert values.isfinite().all() and gradient.isfinite().all()


# ---- what it becomes ----


def pairs() -> AnswerBatch:
    """A chosen and a rejected answer to each of three prompts."""
    answers = made_up_answers(*PAIRS, Columns(), reference_free=False, needs=("mismatched",))
    return change(answers, lambda logps, _: logps.double())


REDUCTIONS = {  # of pairs: a loss, its knobs, the loss of pairs that it is then, and how many times it
    "plackett_luce": ({"beta": 0.3}, "sigmoid", {"beta": 0.3}, 1),
    "softmax_dpo": ({"beta": 0.3}, "sigmoid", {"beta": 0.3}, 1),
    "infonca": ({"beta": 0.3, "temperature": 1e-4}, "sigmoid", {"beta": 0.3}, 1),
    "nca": ({"beta": 0.3, "temperature": 1e-4}, "nca_pair", {"beta": 0.3}, 1),
    "apo_zero_unpaired": ({"beta": 0.3}, "apo_zero", {"beta": 0.3}, 0.5),
    "bco_unpaired": ({"beta": 0.3}, "bco", {"beta": 0.3}, 0.5),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_of_pairs_it_is_a_loss_of_pairs(name):
    """Where a value is that of a pair's two answers, it is their mean, and that of the pair their sum."""
    knobs, other, of_pair, factor = REDUCTIONS[name]
    torch.testing.assert_close(bind_loss(name, knobs)(pairs()), factor * bind_loss(other, of_pair)(pairs()))


@pytest.mark.parametrize("name", ["sppo"])
def test_with_certain_wins_its_targets_are_a_quarter_from_the_middle(name):
    """Scores far apart: P = (1/2 + 1) / 2 and (1/2 + 0) / 2, where `sppo_hard` has 1 and 0."""
    answers = replace(pairs(), scores=(100.0, 0.0) * 3)
    hard = bind_loss("sppo_hard", {"beta": 0.6})(answers) / 2
    torch.testing.assert_close(bind_loss(name, {"beta": 0.3})(answers), hard)


@pytest.mark.parametrize("name", ["infonca"])
def test_with_all_weight_on_the_best_answer_its_share_is_that_among_all(name):
    """Of lists whose answers all differ in score, that is `softmax_dpo`."""
    answers = replace(made_up(name), scores=(3.0, 2.0, 1.0, -1.0, 1.0, 0.0, 0.5, 0.25, 0.0))
    found = bind_loss(name, {"beta": 0.3, "temperature": 1e-4})(answers)
    torch.testing.assert_close(found, bind_loss("softmax_dpo", {"beta": 0.3})(answers))


@pytest.mark.parametrize("name", ["kto"])
def test_with_z_at_0_it_is_apo_zero(name):
    answers = pairs()
    assert answers.mismatched is not None
    lower = replace(answers.mismatched, policy_logps=answers.mismatched.policy_logps - 10)
    torch.testing.assert_close(
        bind_loss(name)(replace(answers, mismatched=lower)), bind_loss("apo_zero_unpaired")(answers)
    )


def test_a_loss_of_pairs_on_a_list_is_the_mean_over_all_pairs_of_which_one_is_better():
    answers, loss = made_up("plackett_luce"), bind_loss("sigmoid", {"beta": 0.3})
    first = answers.only(0)  # scores 3, 1, 1, -1
    better = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    of_pairs = [-torch.nn.functional.logsigmoid(0.3 * (first.logratio[i] - first.logratio[j])) for i, j in better]
    torch.testing.assert_close(loss(answers)[0], torch.stack(of_pairs).mean())


def test_gaps_are_those_of_the_pairs_of_each_prompt_and_there_may_be_none():
    answers = made_up("plackett_luce")
    expected = answers.pairs.chosen_logratio - answers.pairs.rejected_logratio
    torch.testing.assert_close(answers.gaps(answers.logratio), expected)
    single = answers.only(1)
    alone = replace(single, policy_logps=single.policy_logps[:1], lengths=(4,), prompts=(0,), scores=(1.0,))
    assert alone.gaps(alone.policy).shape == (0,)


# ---- mixtures, and what is refused ----


def test_a_mixture_of_units_gives_each_prompt_the_sum_of_its_parts():
    loss, answers = bind_loss("sigmoid:0.5,kto:0.25,plackett_luce:2", {"beta": 0.3}), pairs()
    parts = {name: bind_loss(name, {"beta": 0.3})(answers) for name in ("sigmoid", "kto", "plackett_luce")}
    expected = 0.5 * parts["sigmoid"] + 0.25 * parts["kto"] + 2 * parts["plackett_luce"]
    torch.testing.assert_close(loss(answers), expected)
    assert (loss.unit, loss.scope, loss.needs) == ("prompt", "pair", ("mismatched",))


def test_a_mixture_with_sigmoid_on_pairs_is_sigmoid():
    mixed, answers = bind_loss("sigmoid:0.5,plackett_luce:0.5"), pairs()
    torch.testing.assert_close(mixed(answers), bind_loss("sigmoid")(answers))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if BUILT_IN[name].unit != "pair"])
def test_pairs_in_the_place_of_answers_are_refused(name):
    with pytest.raises(ValueError, match=f"loss '{name}' gives each (answer|prompt) a value: it takes an AnswerBatch"):
        bind_loss(name)(pairs().pairs)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if BUILT_IN[name].unit == "answer"])
def test_scores_in_the_place_of_labels_are_refused(name):
    answers = replace(made_up(name), scores=(0.5,) * 6)
    with pytest.raises(ValueError, match="the loss needs answers with a label, good or bad, or pairs, and one has a"):
        bind_loss(name)(answers)
