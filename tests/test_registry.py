"""The registry: which losses there are, what their knobs take, and what becomes of a loss of one's own."""

from __future__ import annotations

import functools
import math
import re
from typing import Literal

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import bind_loss
from phi2.losses.registry import PREFERENCE_LOSSES, load_loss_file, preference_loss

BUILT_IN = {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own}


def pairs_of(count: int = 1) -> PairBatch:
    """So many times the pair with l_w - l_l = 6, l_w/n_w - l_l/n_l = 2."""
    policy, ref = ([[-1.0, -2.0], [-2.0, -1.0, -2.0, -3.0]], [[-2.0, -3.0], [-1.0] * 4])
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.tensor([logps] * count, dtype=torch.float64) for logps in (*policy, *ref)
    )
    return PairBatch(chosen, rejected, chosen < 1, rejected < 1, ref_chosen, ref_rejected)


# ---- choosing a loss ----


def test_an_unknown_loss_is_refused_in_one_line_with_all_names():
    with pytest.raises(ValueError) as caught:
        bind_loss("dpo", {})
    message = str(caught.value)
    assert "\n" not in message and "'dpo'" in message and all(name in message for name in PREFERENCE_LOSSES)


def test_a_knob_the_loss_does_not_take_is_refused_with_those_it_takes():
    with pytest.raises(ValueError, match="loss 'simpo' does not take 'label_smoothing'; its knobs are beta, gamma"):
        bind_loss("simpo", {"label_smoothing": 0.1})


@pytest.mark.parametrize("value", [0.5, -0.1, 1.0, math.nan])
@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust"])
def test_label_smoothing_out_of_range_is_refused_before_anything_is_computed(name, value):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got"):
        bind_loss(name, {"label_smoothing": value})


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo"])
def test_a_beta_that_is_not_above_zero_is_refused(name, value):
    with pytest.raises(ValueError, match="beta must be above 0, got"):
        bind_loss(name, {"beta": value})


def test_other_knobs_must_be_finite():
    with pytest.raises(ValueError, match="gamma must be a finite number, got nan"):
        bind_loss("simpo", {"gamma": math.nan})


# ---- losses of one's own ----

FIVE_LINES = """import phi2
@phi2.preference_loss("mine")
def mine(pairs, *, beta: float = 0.5):
    return -(beta * pairs.margin)
"""


def test_a_loss_in_a_file_of_its_own_is_a_choice_like_any_other(registry, tmp_path):
    path = tmp_path / "my_losses.py"
    path.write_text(FIVE_LINES)
    load_loss_file(path)
    assert registry["mine"].knobs == {"beta": 0.5}
    assert bind_loss("mine", {"beta": 2.0})(pairs_of()).tolist() == [-12.0]


def test_a_loss_file_may_be_run_twice(registry, tmp_path):
    path = tmp_path / "my_losses.py"
    for beta in (0.5, 0.25):
        path.write_text(FIVE_LINES.replace("0.5", str(beta)))
        load_loss_file(path)
    assert registry["mine"].knobs == {"beta": 0.25}


def test_a_loss_file_is_compiled_as_the_user_wrote_it(registry, tmp_path):
    """Without this package's `from __future__ import annotations`, under which a dataclass here would not work."""
    path = tmp_path / "my_losses.py"
    path.write_text("from dataclasses import dataclass\n@dataclass\nclass State:\n    mean: float = 0.0\n" + FIVE_LINES)
    load_loss_file(path)
    assert "mine" in registry


def test_a_missing_loss_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="loss_file .*none.py: no such file"):
        load_loss_file(tmp_path / "none.py")


@pytest.mark.parametrize(
    "code", ["def broken(:", "1 / 0", "import no_such_module_anywhere", "x = '\ud800'", "raise SystemExit(3)"]
)
def test_a_loss_file_that_cannot_be_run_is_named(code, tmp_path):
    path = tmp_path / "broken.py"
    path.write_bytes(code.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="loss_file .*broken.py( line 1)?: "):
        load_loss_file(path)


RAISING = """import phi2, torch


@phi2.preference_loss("raising")
def raising(pairs):
    {code}
"""
RAISED = {
    "raise KeyError('late')": "KeyError: 'late'",
    "raise ValueError('late')": "ValueError: late",
    "return pairs.margins": "AttributeError: 'PairBatch' object has no attribute 'margins'",
    "return torch.ones(2) + torch.ones(3)": "RuntimeError: The size of tensor a",
}


@pytest.mark.parametrize("code", RAISED)
def test_what_a_loss_of_a_file_raises_is_told_with_its_line(code, registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RAISING.format(code=code))
    loss = bind_loss("raising", loss_file=path)
    with pytest.raises(ValueError, match=re.escape(f"{path} line 6, in raising: {RAISED[code]}")):
        loss(pairs_of())


def test_a_want_of_memory_in_a_loss_of_a_file_stays_one(registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RAISING.format(code="raise MemoryError"))
    with pytest.raises(MemoryError):
        bind_loss("raising", loss_file=path)(pairs_of())


def test_a_decorator_without_a_name_is_refused(registry):
    with pytest.raises(ValueError, match="preference_loss needs a name, @preference_loss"):

        @preference_loss
        def mine(pairs: PairBatch) -> Tensor:
            return pairs.margin


def test_a_name_of_another_function_is_taken(registry):
    with pytest.raises(ValueError, match="the loss name 'sigmoid' is taken; registered are sigmoid, "):

        @preference_loss("sigmoid")
        def other(pairs: PairBatch) -> Tensor:
            return pairs.margin


def test_a_file_cannot_replace_a_built_in_loss_by_a_function_of_the_same_name(registry, tmp_path):
    path = tmp_path / "my_losses.py"
    path.write_text(FIVE_LINES.replace('"mine"', '"sigmoid"').replace("def mine", "def sigmoid"))
    with pytest.raises(ValueError, match="the loss name 'sigmoid' is taken"):
        load_loss_file(path)
    assert registry["sigmoid"] is BUILT_IN["sigmoid"]


def test_a_knob_without_a_number_as_default_is_refused(registry):
    with pytest.raises(ValueError, match="loss 'mine': its argument 'beta' needs a number as default"):

        @preference_loss("mine")
        def mine(pairs: PairBatch, *, beta) -> Tensor:
            return pairs.margin


def test_a_string_without_its_choices_is_refused_as_a_knob(registry):
    with pytest.raises(ValueError, match=r"'kl' needs its choices as annotation, Literal\['forward', ...\]"):

        @preference_loss("mine")
        def mine(pairs: PairBatch, *, kl: str = "forward") -> Tensor:
            return pairs.margin


class Called:
    """A loss that is an object."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, pairs, *, kl: Literal["a", "b"] = "a") -> Tensor:
        return self.function(pairs, kl=kl)


@pytest.fixture
def typed(registry) -> str:
    """The name of a loss with a knob of each type."""

    @preference_loss("typed")
    def typed(pairs, *, beta: float = 0.5, kl: Literal["forward", "reverse"] = "forward", mean: bool = False) -> Tensor:
        margin = pairs.margin_per_token if mean else pairs.margin
        return beta * (margin if kl == "forward" else -margin)

    return "typed"


def test_knobs_may_be_numbers_booleans_and_strings_with_their_choices(typed):
    loss = bind_loss(typed, {"kl": "reverse", "mean": True})
    assert loss.knobs == {"beta": 0.5, "kl": "reverse", "mean": True}
    assert loss(pairs_of()).tolist() == [-1.0]  # -0.5 * 2


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("kl", "sideways", "kl must be one of forward, reverse, got 'sideways'"),
        ("kl", 1.0, "kl must be one of forward, reverse, got 1.0"),
        ("mean", 1.0, "mean must be true or false, got 1.0"),
        ("beta", True, "beta must be a number, got True"),
        ("beta", None, "beta must be a number, got None"),
        ("beta", [1], r"beta must be a number, got \[1\]"),
        ("beta", "forward", "beta must be a number, got 'forward'"),
    ],
)
def test_a_knob_takes_values_of_its_own_type_only(typed, knob, value, message):
    with pytest.raises(ValueError, match=message):
        bind_loss(typed, {knob: value})


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial, Called], ids=["function", "partial", "object"])
def test_the_choices_of_a_knob_are_found_however_the_loss_is_made(registry, wrap):
    def loss(pairs: NotHere, *, kl: Literal["a", "b"] = "a") -> Tensor:  # noqa: F821  only a type checker knows it
        return pairs.margin

    wrapped = wrap(loss)
    wrapped.__qualname__ = "loss"
    preference_loss("wrapped")(wrapped)
    assert registry["wrapped"].choices == {"kl": ("a", "b")}


@pytest.mark.parametrize("choice", ["1", "on", "null"])
def test_a_choice_that_a_command_line_would_read_as_something_else_is_refused(registry, choice):
    def loss(pairs, *, kl="a") -> Tensor:
        return pairs.margin

    loss.__annotations__["kl"] = Literal["a", choice]
    with pytest.raises(ValueError, match=f"the choice '{choice}' of its argument 'kl' is not read as text"):
        preference_loss("mine")(loss)


@pytest.mark.parametrize("scale", ["taau", "kl"])
def test_a_reward_scale_that_is_no_number_of_the_loss_is_refused(registry, scale):
    def loss(pairs, *, tau: float = 1.0, kl: Literal["a"] = "a") -> Tensor:
        return pairs.margin

    with pytest.raises(ValueError, match=f"reward_scale must be one of its numbers, tau, got '{scale}'"):
        preference_loss("mine", reward_scale=scale)(loss)


def test_a_loss_file_takes_the_place_of_the_one_before_it(registry, tmp_path):
    for name, value in (("one", "1.0"), ("two", "2.0")):
        path = tmp_path / f"{name}.py"
        path.write_text(FIVE_LINES.replace("-(beta * pairs.margin)", f"{value} * pairs.margin"))
        assert bind_loss("mine", loss_file=path)(pairs_of()).item() == 6 * float(value)


def test_the_reward_that_a_loss_implies_is_scaled_by_the_knob_it_names(registry):
    def loss(pairs: PairBatch, *, tau: float = 0.25) -> Tensor:
        return tau * pairs.margin

    preference_loss("unscaled")(loss)
    preference_loss("scaled", reward_scale="tau")(loss)
    assert bind_loss("unscaled").reward_scale == 1.0
    assert bind_loss("scaled").reward_scale == 0.25 and bind_loss("scaled", {"tau": 4.0}).reward_scale == 4.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda pairs: None, "must return a tensor of floats, one value per pair, got NoneType"),
        (
            lambda pairs: pairs.chosen_length.long(),
            "must return a tensor of floats, one value per pair, got torch.int64",
        ),
        (lambda pairs: pairs.margin.detach(), "what it returned has no gradient"),
    ],
    ids=["nothing", "integers", "detached"],
)
def test_a_loss_that_returns_nothing_to_train_on_is_refused(registry, result, message):
    preference_loss("mine")(result)
    pairs = pairs_of(3)
    pairs.policy_chosen_logps.requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        bind_loss("mine", {})(pairs)


def test_a_loss_that_does_not_return_one_value_per_pair_is_refused(registry):
    @preference_loss("mean")
    def mean(pairs: PairBatch) -> Tensor:
        return pairs.margin.mean()

    with pytest.raises(ValueError, match=r"loss 'mean' must return one value per pair, \(3,\), got shape \(\)"):
        bind_loss("mean", {})(pairs_of(3))


def test_columns_of_the_data_reach_the_loss(registry):
    @preference_loss("weighted")
    def weighted(pairs: PairBatch) -> Tensor:
        return pairs.columns["weight"] * pairs.margin

    pairs = pairs_of()
    pairs = PairBatch(**{**pairs.__dict__, "columns": {"weight": torch.tensor([3.0])}})
    assert bind_loss("weighted", {})(pairs).tolist() == [18.0]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="reads the column 'margin'; columns of numbers here are weight"):
        Columns({"weight": torch.ones(2)})["margin"]


# ---- scope, unit, needs and state ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "batch"}, "loss 'mine': scope must be one of pair, window, got 'batch'"),
        ({"unit": "token"}, "loss 'mine': unit must be one of pair, answer, prompt, got 'token'"),
        ({"needs": ("silver",)}, "loss 'mine': needs must be one of gold, mismatched, .*got 'silver'"),
        ({"state": {"mean": 0.0}}, "loss 'mine': a state moves once an update, register it with scope=\"window\""),
        ({"scope": "window", "state": {}}, r"loss 'mine': state must name numbers, as {'mean': 0.0}, got {}"),
        ({"scope": "window", "state": {"mean": None}}, "loss 'mine': state must name numbers"),
        ({"scope": "window", "state": {"mean": True}}, "loss 'mine': state must name numbers"),
        ({"scope": "window", "state": {"mean": math.inf}}, "loss 'mine': state must name numbers"),
    ],
)
def test_a_scope_unit_need_or_state_that_means_nothing_is_refused(registry, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss("mine", **options)(lambda pairs, state: (pairs.margin, state))


def test_the_knobs_of_a_loss_with_a_state_stand_behind_it(registry):
    @preference_loss("mine", scope="window", state={"mean": 0.0})
    def mine(pairs: PairBatch, state: dict, *, beta: float = 0.3) -> tuple[Tensor, dict]:
        return beta * pairs.margin, state

    assert registry["mine"].knobs == {"beta": 0.3} and bind_loss("mine", {"beta": 2.0})(pairs_of()).item() == 12.0
