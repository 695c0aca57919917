"""What every registered loss of pairs must not depend on, and that it does depend on all else.

`tests/mutate_losses.py` breaks each loss in many ways and runs these on it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.properties import made_up_pairs
from phi2.losses.registry import PREFERENCE_LOSSES

BUILT_IN = {  # of pairs alone; test_answer_losses.py has the others
    name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own and loss.unit == "pair" and not loss.needs
}
OF_PAIRS = [name for name, loss in BUILT_IN.items() if loss.scope == "pair"]
OF_WINDOWS = [name for name, loss in BUILT_IN.items() if loss.scope == "window"]  # of them the mean is what counts
LENGTHS = ([2, 5, 1, 4, 3, 6], [1, 4, 3, 2, 6, 1])


def made_up(reference_free: bool = False) -> PairBatch:
    """Six pairs of 1 to 6 tokens in float64, whose scores are 2 to 7 apart."""
    pairs = change(made_up_pairs(*LENGTHS, Columns(), reference_free), lambda x, is_mask: x if is_mask else x.double())
    apart = torch.arange(2, 8, dtype=torch.float64)
    return replace(pairs, columns=Columns({"score_chosen": apart, "score_rejected": torch.zeros_like(apart)}))


def change(pairs: PairBatch, function: Callable[[Tensor, bool], Tensor]) -> PairBatch:
    """`function(tensor, is_mask)` of every tensor of tokens."""
    names = [name for name in PairBatch.__dataclass_fields__ if name.endswith(("_logps", "_mask"))]
    values = {name: getattr(pairs, name) for name in names}
    return replace(pairs, **{name: function(x, "mask" in name) for name, x in values.items() if x is not None})


def with_policy(pairs: PairBatch, chosen: Tensor, rejected: Tensor) -> PairBatch:
    return replace(pairs, policy_chosen_logps=chosen, policy_rejected_logps=rejected)


# ratio:  only policy - reference counts, token by token
# margin: the same amount on the log-probability of both answers changes nothing
# swap:   answers exchanged and their log-ratios negated is the same pair
# sum:    a token cut in two, each with half its log-probability, changes nothing
# mean:   every token twice changes nothing
INVARIANT = {
    "sigmoid": "ratio margin swap sum",
    "cdpo": "ratio margin swap sum",
    "robust": "ratio margin swap sum",
    "sigmoid_norm": "ratio margin swap mean",
    "rdpo": "ratio margin swap",  # neither sum nor mean: lengths count by themselves
    "dpop": "ratio sum",
    "dposhift": "ratio sum",
    "minor_dpo": "ratio sum",
    "hdpo": "margin swap sum",  # s counts otherwise than r
    "bpo": "ratio sum",
    "c2dpo": "ratio swap sum",
    "chipo": "ratio sum",
    "ipo": "ratio margin swap mean",
    "hinge": "ratio margin swap sum",
    "exo_pair": "ratio margin swap sum",
    "discopop": "ratio margin swap sum",
    "gpo": "ratio margin swap sum",
    "nca_pair": "ratio sum",
    "bco_pair": "ratio swap sum",
    "sppo_hard": "ratio swap sum",
    "apo_zero": "ratio swap sum",
    "apo_down": "ratio sum",
    "caldpo": "ratio swap sum",
    "lsif": "ratio sum",
    "ukl": "sum",  # s_w by itself
    "ddro": "ratio sum",
    "sft": "mean",
    "simpo": "margin swap mean",
    "alphapo": "mean",
    "cpo": "",  # sums in its contrast, a mean in its likelihood
    "slic": "sum",
    "repo": "margin swap mean",
    "orpo": "mean",
    "odpo": "ratio margin swap sum",
    "rpo_bwd_kl": "ratio margin swap sum",
    "rpo_fwd_kl": "ratio margin swap sum",
    "rpo_sq": "ratio margin swap sum",
    "aot": "margin swap sum",  # s and r are sorted apart
    "aot_unpaired": "ratio margin swap sum",
    "dr_dpo": "ratio margin swap sum",
    "beta_dpo": "ratio margin swap sum",
    "alphadpo": "margin swap mean",  # s counts by itself, beside l
    "amapo": "margin swap mean",
    "bco": "ratio margin swap sum",  # its shift moves along, at the start of a run
    "sft_tokens": "mean",
}


def test_every_registered_loss_says_what_it_must_not_depend_on():
    assert INVARIANT.keys() == BUILT_IN.keys()


def shifted_like_its_reference(pairs: PairBatch) -> PairBatch:
    chosen, rejected = (torch.linspace(-4, 8, mask.numel()).view(mask.shape) * mask for mask in _masks(pairs))
    moved = with_policy(pairs, pairs.policy_chosen_logps + chosen, pairs.policy_rejected_logps + rejected)
    return replace(
        moved, ref_chosen_logps=pairs.ref_chosen_logps + chosen, ref_rejected_logps=pairs.ref_rejected_logps + rejected
    )


def _masks(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    return pairs.chosen_mask, pairs.rejected_mask


def moved_together(pairs: PairBatch) -> PairBatch:
    return with_policy(pairs, pairs.policy_chosen_logps - 0.4, pairs.policy_rejected_logps - 0.4)


def swapped_and_negated(pairs: PairBatch) -> PairBatch:
    chosen, rejected = pairs.policy_chosen_logps, pairs.policy_rejected_logps
    if pairs.ref_chosen_logps is None:
        return with_policy(pairs, -rejected, -chosen)
    ref_chosen, ref_rejected = pairs.ref_chosen_logps, pairs.ref_rejected_logps
    return with_policy(pairs, ref_chosen - (rejected - ref_rejected), ref_rejected - (chosen - ref_chosen))


def in_halves(pairs: PairBatch) -> PairBatch:
    return change(pairs, lambda x, is_mask: (x if is_mask else x / 2).repeat_interleave(2, dim=1))


def twice(pairs: PairBatch) -> PairBatch:
    return change(pairs, lambda x, is_mask: x.repeat_interleave(2, dim=1))


def one_token(pairs: PairBatch) -> PairBatch:
    return change(pairs, lambda x, is_mask: x[:, :1])


CHANGES = {  # how pairs are changed, and whether answers of one token are needed for it
    "ratio": (shifted_like_its_reference, False),
    "margin": (moved_together, True),
    "swap": (swapped_and_negated, True),
    "sum": (in_halves, False),
    "mean": (twice, False),
}


def value(loss: BoundLoss, pairs: PairBatch) -> Tensor:
    """What is minimised: (B,) of a loss of pairs, the mean of one of a window."""
    return loss(pairs) if loss.scope == "pair" else loss(pairs).mean()


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_said_not_to_count_does_not_and_all_else_does(name):
    free, loss = BUILT_IN[name].reference_free, bind_loss(name)
    for what, (changed, short) in CHANGES.items():
        if free and what == "ratio":
            continue
        pairs = made_up(reference_free=free)
        pairs = one_token(pairs) if short else pairs
        before, after = value(loss, pairs), value(loss, changed(pairs))
        same = torch.allclose(before, after, rtol=1e-9, atol=1e-12)
        assert same == (what in INVARIANT[name].split()), what


ORDER = [2, 0, 1, 5, 3, 4]


def in_another_order(pairs: PairBatch) -> PairBatch:
    return replace(change(pairs, lambda x, is_mask: x[ORDER]), columns=pairs.columns.each(lambda x: x[ORDER]))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_pairs_in_another_order_have_the_same_losses(name):
    pairs, loss = made_up(), bind_loss(name)
    torch.testing.assert_close(loss(in_another_order(pairs)), loss(pairs)[ORDER], rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_a_window_in_another_order_has_the_same_mean(name):
    pairs, loss = made_up(), bind_loss(name)
    torch.testing.assert_close(loss(in_another_order(pairs)).mean(), loss(pairs).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_padding_changes_nothing(name):
    pairs, loss = made_up(), bind_loss(name)
    padded = change(pairs, lambda x, is_mask: torch.nn.functional.pad(x, (0, 3)))
    torch.testing.assert_close(loss(padded), loss(pairs), rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_pair_does_not_depend_on_its_neighbours_in_the_batch(name):
    pairs, loss = made_up(), bind_loss(name)
    torch.testing.assert_close(each_alone(loss, pairs), loss(pairs))


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_a_pair_of_a_window_depends_on_the_others(name):
    """The policy's differences have another order than the reference's, without which `aot` would sort nothing."""
    pairs, loss = made_up(), bind_loss(name)
    factors = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0, 4.0], dtype=torch.float64)[:, None]
    pairs = with_policy(pairs, factors * pairs.policy_chosen_logps, pairs.policy_rejected_logps)
    assert not torch.allclose(each_alone(loss, pairs).mean(), loss(pairs).mean(), rtol=1e-7, atol=0)


def each_alone(loss: BoundLoss, pairs: PairBatch) -> Tensor:
    def alone(row: int) -> PairBatch:
        one = change(pairs, lambda x, _: x[row : row + 1])
        return replace(one, columns=pairs.columns.each(lambda x: x[row : row + 1]))

    return torch.cat([loss(alone(row)) for row in range(len(pairs.chosen_mask))])
