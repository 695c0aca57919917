"""Every registered loss: one number worked out by hand, and properties that hold whatever the formula."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.registry import PREFERENCE_LOSSES, bind_loss, document, load_loss_file, preference_loss

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


@pytest.fixture
def registry() -> Iterator[dict]:
    """The registry, as it was again after the test."""
    before = dict(PREFERENCE_LOSSES)
    yield PREFERENCE_LOSSES
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


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


# ---- the registry is what users are told ----

ROOT = Path(__file__).parents[1]


def test_the_committed_table_of_losses_is_the_registry(registry):
    assert (ROOT / "docs" / "losses.md").read_text(encoding="utf-8") == document()  # else: python -m phi2.losses


def test_the_readme_names_every_loss():
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("**Losses**"))
    assert re.findall(r"`(\w+)`", line.partition(". ")[0]) == list(BUILT_IN)


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
    assert bind_loss("mine", {"beta": 2.0})(pair_batch(**HAND_PAIR)).tolist() == [-12.0]


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


@pytest.mark.parametrize("code", ["def broken(:", "1 / 0", "import no_such_module_anywhere", "x = '\ud800'"])
def test_a_loss_file_that_cannot_be_run_is_named(code, tmp_path):
    path = tmp_path / "broken.py"
    path.write_bytes(code.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="loss_file .*broken.py: "):
        load_loss_file(path)


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
    assert loss(pair_batch(**HAND_PAIR)).tolist() == [-1.0]  # -0.5 * 2


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
        assert bind_loss("mine", loss_file=path)(pair_batch(**HAND_PAIR)).item() == 6 * float(value)


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
    pairs = random_batch()
    pairs.policy_chosen_logps.requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        bind_loss("mine", {})(pairs)


def test_a_loss_that_does_not_return_one_value_per_pair_is_refused(registry):
    @preference_loss("mean")
    def mean(pairs: PairBatch) -> Tensor:
        return pairs.margin.mean()

    with pytest.raises(ValueError, match=r"loss 'mean' must return one value per pair, \(3,\), got shape \(\)"):
        bind_loss("mean", {})(random_batch())


def test_columns_of_the_data_reach_the_loss(registry):
    @preference_loss("weighted")
    def weighted(pairs: PairBatch) -> Tensor:
        return pairs.columns["weight"] * pairs.margin

    pairs = pair_batch(**HAND_PAIR)
    pairs = PairBatch(**{**pairs.__dict__, "columns": {"weight": torch.tensor([3.0])}})
    assert bind_loss("weighted", {})(pairs).tolist() == [18.0]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="reads the column 'margin'; columns of numbers here are weight"):
        Columns({"weight": torch.ones(2)})["margin"]
