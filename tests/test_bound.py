"""What a run asks for: names, presets and mixtures of losses, resolved once into one object."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.presets import PRESETS
from phi2.losses.properties import made_up_answers
from phi2.losses.registry import preference_loss


def pair() -> PairBatch:
    """l_w = 2 in 2 tokens, l_l = -4 in 4 tokens, s_w = -3."""
    logps = [[-1.0, -2.0], [-2.0, -1.0, -2.0, -3.0], [-2.0, -3.0], [-1.0] * 4]
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x], dtype=torch.float64) for x in logps)
    return PairBatch(chosen, rejected, chosen < 1, rejected < 1, ref_chosen, ref_rejected)


def value(loss, knobs: dict | None = None) -> float:
    return bind_loss(loss, knobs)(pair()).item()


def nls(x: float) -> float:
    return log(1 + exp(-x))


# ---- mixtures ----

SIGMOID_AND_SFT = 0.8 * nls(0.5 * 6) + 0.2 * 3 / 2


@pytest.mark.parametrize(
    "written",
    [
        "sigmoid:0.8,sft:0.2",
        " sigmoid:0.8 , sft:0.2",
        ["sigmoid:0.8", "sft:0.2"],
        [{"loss": "sigmoid", "weight": 0.8}, {"loss": "sft", "weight": 0.2}],
    ],
)
def test_a_mixture_is_the_weighted_sum_of_its_parts(written):
    assert value(written, {"beta": 0.5}) == pytest.approx(SIGMOID_AND_SFT)


def test_a_part_without_a_weight_counts_once():
    assert value("sigmoid,sft", {"beta": 0.5}) == pytest.approx(nls(3) + 1.5)


def test_one_loss_may_have_a_weight_too():
    assert value("sigmoid:0.25", {"beta": 0.5}) == pytest.approx(0.25 * nls(3))


def test_a_knob_goes_to_every_part_that_takes_it():
    # hinge: 1 - 0.1 * 6; bco_pair: -log sigma(0.1 * 2) - log sigma(0.1 * 4)
    assert value("hinge,bco_pair:2", {"beta": 0.1}) == pytest.approx(0.4 + 2 * (nls(0.2) + nls(0.4)))


def test_a_knob_may_be_a_number_of_numpy():
    assert bind_loss("sigmoid", {"beta": np.float32(0.5)}).knobs["beta"] == 0.5
    assert type(bind_loss([{"loss": "sigmoid", "args": {"beta": np.int64(2)}}]).knobs["beta"]) is int


def test_the_parts_of_a_list_have_knobs_of_their_own():
    parts = [{"loss": "hinge", "args": {"beta": 0.1}}, {"loss": "sigmoid", "args": {"beta": 0.5, "ld_alpha": 0.5}}]
    assert value(parts) == pytest.approx(0.4 + nls(0.5 * 4.5))  # the rejected tail counts half: l_l = -2.5


def test_a_modifier_of_ratios_leaves_a_part_without_a_reference_alone():
    # js of l_w = 2, l_l = -4
    margin = log(2 / (1 + exp(-2))) - log(2 / (1 + exp(4)))
    found = value("sigmoid,sft:0.5", {"beta": 0.5, "f_divergence_type": "js_divergence"})
    assert found == pytest.approx(nls(0.5 * margin) + 0.5 * 1.5)


def test_a_mixture_needs_a_reference_if_a_part_does_and_rewards_as_that_part():
    mixed, free = bind_loss("sft,sigmoid", {"beta": 0.3}), bind_loss("sft,simpo", {"beta": 3.0})
    assert (mixed.reference_free, mixed.reward_scale) == (False, 0.3)
    assert (free.reference_free, free.reward_scale) == (True, 1.0)


def test_the_parts_that_were_used_can_be_asked_for_again():
    mixed = bind_loss("trl:mpo", {"ld_alpha": 0.5})
    again = [{"loss": part.name, "weight": weight, "args": part.knobs} for weight, part in mixed.parts]
    assert value(again) == value("trl:mpo", {"ld_alpha": 0.5}) and bind_loss(again).name == mixed.name


def test_a_changed_part_or_modifier_changes_the_source(registry):
    def mine(pairs: PairBatch) -> Tensor:
        return pairs.margin

    preference_loss("mine")(mine)
    sources = [bind_loss(name, knobs).source for name, knobs in (("mine", {}), ("mine", {"ld_alpha": 0.5}))]
    sources += [bind_loss("mine:0.5,sigmoid").source]
    assert len(set(sources)) == 3 and all("return pairs.margin" in source for source in sources)


def test_a_file_is_no_part_of_a_loss_that_is_not_in_it(registry, tmp_path):
    sources = []
    for text in ("# one", "# another"):
        (tmp_path / "mine.py").write_text(
            f"import phi2\n{text}\n@phi2.preference_loss('mine')\ndef mine(pairs):\n    return -pairs.margin"
        )
        sources.append([bind_loss(name, loss_file=tmp_path / "mine.py").source for name in ("sigmoid", "mine")])
        registry.pop("mine", None)
    (own, mine), (own_again, another) = sources
    assert own == own_again and mine != another


def test_a_loss_that_wraps_a_librarys_is_the_files(registry, tmp_path):
    sources = []
    for factor in (2, 3):
        (tmp_path / "mine.py").write_text(WRAPPED.format(factor=factor))
        sources.append(bind_loss("mine", loss_file=tmp_path / "mine.py").source)
        registry.pop("mine")
    assert sources[0] != sources[1]


WRAPPED = """
import functools, phi2
from phi2.losses.logistic import sigmoid

@phi2.preference_loss("mine")
@functools.wraps(sigmoid)
def mine(pairs, **knobs):
    return {factor} * sigmoid(pairs, **knobs)
"""


def test_a_part_whose_source_is_not_known_leaves_the_whole_unknown(registry):
    names: dict = {}
    exec(compile("def typed(pairs): return pairs.margin", "<typed>", "exec"), names)  # "<string>" is known to 3.13
    preference_loss("typed")(names["typed"])
    assert bind_loss("typed,sigmoid").source is None and bind_loss("typed", {"ld_alpha": 0.5}).source is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sigmoid,sfft", "loss must be one of alphadpo, .*, got 'sfft'; did you mean sft?"),
        ("sigmoid:0,sft", "the weight of a loss must be a number above 0, got 0.0"),
        ("sigmoid:x,sft", "the weight of a loss must be a number above 0, got 'x'"),
        (
            "simpo(beta=0.3)",
            r"knobs of a loss do not stand in its name, got 'simpo\(beta=0.3\)': they are settings",
        ),
        ("mine.py:hot", "loss must be a name, got 'mine.py:hot': give the file as loss_file, and the name that it"),
        ("sigmoid:inf,sft", "the weight of a loss must be a number above 0, got inf"),
        (None, "loss must be a name, a mixture, or a list of its parts, got NoneType"),
        (len, "loss must be a name, .*; a function of yours has a name by @phi2.preference_loss"),
        ("paper:ippo", "preset must be one of paper:dpo, .*, got 'paper:ippo'; did you mean paper:ipo?"),
        ("sigmoid,", "loss must be one of .*, got ''"),
        ([], "loss must name one loss at least, got none"),
        (
            [{"loss": "sigmoid", "wieght": 1}],
            "has loss, weight, args, got 'wieght'; did you mean weight?",
        ),
        ([{"weight": 1}], "a part of a mixture needs its loss, got {'weight': 1}"),
        ([{"loss": "sigmoid", "weight": "much"}], "the weight of a loss must be a number above 0, got 'much'"),
        (
            [{"loss": "sft", "args": {"beta": 1}}],
            "'sft' does not take 'beta'; its knobs are none, and with any loss",
        ),
    ],
)
def test_what_names_no_loss_is_refused_in_one_line(written, message):
    with pytest.raises(ValueError, match=message) as caught:
        bind_loss(written)
    assert "\n" not in str(caught.value)


def test_a_knob_that_no_part_takes_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="none of sigmoid, sft takes 'betta'; did you mean beta?"):
        bind_loss("sigmoid,sft", {"betta": 1})


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_a_name_that_a_mixture_would_take_apart_cannot_be_registered(registry, name):
    with pytest.raises(ValueError, match="has a colon or a comma"):
        preference_loss(name)(lambda pairs: pairs.margin)


def test_a_knob_of_ones_own_that_is_named_like_a_modifiers_stays_the_losss(registry):
    @preference_loss("mine")
    def mine(pairs: PairBatch, *, ld_alpha: float = 1.0) -> Tensor:
        return ld_alpha * pairs.margin

    bound = bind_loss("mine", {"ld_alpha": 0.5})
    assert bound(pair()).item() == 3.0 and bound.modifiers == ()


# ---- presets ----


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_used_and_says_what_sets_it_apart(name):
    loss = bind_loss(name)
    answers = made_up_answers([(2, 4)], [(1.0, 0.0)], Columns(), loss.reference_free, loss.needs)
    assert loss(answers).isfinite().all() and len(PRESETS[name].note) > 5


@pytest.mark.parametrize("name", PRESETS)
def test_every_knob_of_a_preset_is_that_of_a_part(name):
    loss = bind_loss(name)
    knobs = [part.knobs for _, part in loss.parts] or [loss.knobs]
    for knob, expected in PRESETS[name].knobs.items():
        assert any(each.get(knob) == expected for each in knobs), knob


def test_ipo_has_sums_in_its_paper_and_means_in_trl():
    # 1 / (2 * 0.1) = 5
    assert value("paper:ipo") == pytest.approx((6 - 5) ** 2) and value("trl:ipo") == pytest.approx((2 - 5) ** 2)


def test_a_knob_given_beside_a_preset_wins():
    assert value("paper:ipo", {"beta": 0.5}) == pytest.approx((6 - 1) ** 2)


def test_a_preset_may_be_a_part_of_a_mixture():
    # 0.5 * (0.8 * sigmoid + 0.2 * bco_pair) + sft, beta 0.1
    expected = 0.5 * (0.8 * nls(0.6) + 0.2 * (nls(0.2) + nls(0.4))) + 1.5
    assert value("trl:mpo:0.5,sft") == pytest.approx(expected)


def test_a_knob_that_no_part_of_a_preset_takes_is_refused():
    with pytest.raises(ValueError, match="preset 'paper:ipo' does not take 'gamma'; its knobs are beta"):
        bind_loss([{"loss": "paper:ipo", "args": {"gamma": 1.0}}])


# ---- scope and state ----


def keeping(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
    return pairs.margin - state["mean"], {"mean": state["mean"] + pairs.margin.mean()}


def test_a_mixture_is_of_windows_if_a_part_is(registry):
    assert bind_loss("sigmoid,sft").scope == "pair" and bind_loss("sigmoid:0.5,aot").scope == "window"


def test_a_modifier_keeps_scope_and_state(registry):
    preference_loss("keeping", scope="window", state={"mean": 1.0})(keeping)
    loss = bind_loss("keeping", {"ld_alpha": 0.5})
    assert loss.scope == "window" and loss.state == {"mean": 1.0}
    values, after = loss.step(pair(), {"mean": 10.0})  # s_l and r_l without half of two tokens: l_l = -1 - 1.5
    assert (values.item(), after) == (4.5 - 10, {"mean": 14.5})


def test_every_part_of_a_mixture_has_a_state_of_its_own(registry):
    preference_loss("keeping", scope="window", state={"mean": 1.0})(keeping)
    loss = bind_loss(["sigmoid", "keeping:2", "keeping"])
    assert loss.state == {"1.mean": 1.0, "2.mean": 1.0}
    values, after = loss.step(pair(), {"1.mean": 2.0, "2.mean": 3.0})
    assert values.item() == pytest.approx(nls(0.6) + 2 * (6 - 2) + (6 - 3))
    assert after == {"1.mean": 8.0, "2.mean": 9.0}


def test_a_call_is_the_loss_of_a_run_that_begins(registry):
    preference_loss("keeping", scope="window", state={"mean": 1.0})(keeping)
    loss = bind_loss("keeping")
    assert loss(pair()).item() == loss(pair()).item() == 5.0 and loss.state == {"mean": 1.0}


def test_a_loss_that_works_on_its_state_in_place_changes_what_it_gives_back_alone(registry):
    @preference_loss("counting", scope="window", state={"calls": 0})
    def counting(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
        state["calls"] += 1
        return pairs.margin, state

    loss, before = bind_loss("counting"), {"calls": 4.0}
    assert loss.step(pair(), before)[1] == {"calls": 5.0} and before == {"calls": 4.0}
    assert loss(pair()) == 6 and loss.state == {"calls": 0.0}


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda pairs, state: pairs.margin, "got Tensor"),
        (lambda pairs, state: (pairs.margin, 1.0), "got tuple"),
        (lambda pairs, state: (pairs.margin, {}), "got a state of nothing"),
        (lambda pairs, state: (pairs.margin, {**state, "std": 1}), "got a state of mean, std"),
    ],
)
def test_a_loss_that_does_not_give_its_state_back_is_told_in_one_line(registry, returned, got):
    preference_loss("mine", scope="window", state={"mean": 0.0})(returned)
    with pytest.raises(ValueError, match=f"loss 'mine' must return its values and its state, mean, {got}$"):
        bind_loss("mine")(pair())


def test_a_loss_has_whole_numbers_as_they_are_and_all_others_as_tensors(registry):
    given = []

    @preference_loss("mine", scope="window", state={"mean": 0.0, "calls": 0})
    def mine(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
        given.append(state)
        return pairs.margin, {"mean": state["mean"] + 1, "calls": state["calls"] + 1}

    state = bind_loss("mine").state
    for _ in range(2):
        _, state = bind_loss("mine").step(pair(), state)
    assert [each["calls"] for each in given] == [0, 1] and all(type(each["calls"]) is int for each in given)
    assert [each["mean"].item() for each in given] == [0, 1] and all(each["mean"].ndim == 0 for each in given)


STRANGE = [
    (0.0, torch.zeros(2), r"must keep numbers in its state, got a tensor of shape \(2,\) as mean"),
    (0.0, None, "must keep numbers in its state, got NoneType as mean"),
    (0, 0.5, "mean starts as the whole number 0, and came back as one that is not, 0.5; register it with 0.0"),
    (
        0,
        torch.tensor(0.5),
        "mean starts as the whole number 0, and came back as one that is not, 0.5; register it with",
    ),
]


@pytest.mark.parametrize(("start", "kept", "message"), STRANGE)
def test_a_state_of_something_else_than_it_started_with_is_refused(registry, start, kept, message):
    preference_loss("mine", scope="window", state={"mean": start})(lambda pairs, state: (pairs.margin, {"mean": kept}))
    with pytest.raises(ValueError, match=f"^loss 'mine':? {message}"):
        bind_loss("mine")(pair())


@pytest.mark.parametrize("kept", [3, 3.0, np.float32(3), np.int64(3), torch.tensor(3), torch.tensor(3.0)], ids=repr)
def test_a_number_of_any_library_may_be_kept(registry, kept):
    preference_loss("mine", scope="window", state={"mean": 0.5})(lambda pairs, state: (pairs.margin, {"mean": kept}))
    _, state = bind_loss("mine").step(pair(), {"mean": 0.5})
    assert state["mean"].dtype == pair().policy_chosen_logps.dtype and state == {"mean": 3}


@pytest.mark.parametrize("kept", [3, np.int64(3), torch.tensor(3)], ids=repr)
def test_a_count_of_any_library_stays_one(registry, kept):
    preference_loss("mine", scope="window", state={"calls": 0})(lambda pairs, state: (pairs.margin, {"calls": kept}))
    _, state = bind_loss("mine").step(pair(), {"calls": 0})
    assert type(state["calls"]) is int and state == {"calls": 3}


def test_a_state_keeps_no_graph_and_stays_as_it_was_given(registry):
    preference_loss("keeping", scope="window", state={"mean": 1.0})(keeping)
    given, loss = pair(), bind_loss("keeping")
    given.policy_chosen_logps.requires_grad_()
    _, first = loss.step(given, loss.state)
    before = first["mean"].clone()
    _, second = loss.step(given, first)
    assert not first["mean"].requires_grad and torch.equal(first["mean"], before) and second["mean"] != before


def test_a_loss_that_works_in_place_on_a_tensor_of_its_state_is_refused(registry):
    @preference_loss("adding", scope="window", state={"mean": 0.0})
    def adding(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
        losses = pairs.margin * state["mean"]
        state["mean"] += pairs.margin.detach().mean()
        return losses, state

    @preference_loss("taking", scope="window", state={"mean": 0.0})
    def taking(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
        mean = state.pop("mean")
        mean += pairs.margin.detach().mean()
        return pairs.margin, {"mean": mean}

    for name in ("adding", "taking"):
        message = f"^loss '{name}' works on mean of its state in place: give back a new number"
        with pytest.raises(ValueError, match=message):
            bind_loss(name)(pair())


def test_a_loss_may_work_in_place_on_what_it_has_made(registry):
    @preference_loss("own", scope="window", state={"mean": 1.0})
    def own(pairs: PairBatch, state: dict) -> tuple[Tensor, dict]:
        state["mean"] = 0.5 * state["mean"]
        state["mean"] += 1
        return pairs.margin, state

    assert bind_loss("own").step(pair(), {"mean": 1.0})[1] == {"mean": 1.5}
