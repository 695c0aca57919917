"""What a loss must be, found out by calling it: a function of its pairs alone, and of each pair by itself.

Log-probabilities are made up, in steps of 1/64 nat: sums of so round numbers are exact, whatever the padding, so that a
difference is the loss's own. Everything runs on the CPU and leaves torch's random state as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import BoundLoss

STEPS = 64  # of the made-up log-probabilities in a nat
CLOSE = 1e-4  # by how much of the largest number of a batch the rounding of one formula may differ


class Outcome(NamedTuple):
    """A loss's values, (B,), and the gradients of their sum, (B, T_w) and (B, T_l)."""

    values: Tensor
    chosen: Tensor
    rejected: Tensor


def made_up_pairs(
    chosen_lengths: list[int], rejected_lengths: list[int], columns: Columns, reference_free: bool
) -> PairBatch:
    """Pairs of these lengths, whose policy has moved away from its reference."""
    generator = torch.Generator().manual_seed(0)
    masks: list[Tensor] = []
    refs: list[Tensor] = []
    policies: list[Tensor] = []
    for lengths in map(torch.tensor, (chosen_lengths, rejected_lengths)):
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ref, moved = torch.rand((2, *mask.shape), generator=generator)
        ref, moved = -(4 * STEPS * ref).round() / STEPS, (STEPS * (moved - 0.3)).round() / STEPS
        masks, refs = [*masks, mask], [*refs, ref * mask]
        policies = [*policies, (ref - moved).clamp(max=0) * mask]
    pairs = PairBatch(policies[0], policies[1], masks[0], masks[1], refs[0], refs[1], columns)
    return replace(pairs, ref_chosen_logps=None, ref_rejected_logps=None) if reference_free else pairs


def require_pure(loss: BoundLoss, pairs: PairBatch) -> None:
    """Refuses a loss that depends on more than its pairs, or that changes them.

    Raises:
        ValueError: naming what it changes, or that it draws random numbers or keeps a state.
    """
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        once, again = _call(loss, pairs), _call(loss, pairs)
        drawn = not torch.equal(before, torch.get_rng_state())
    if drawn or not torch.allclose(once, again, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"loss {loss.name!r} is no function of its pairs alone: it draws random numbers, or keeps something from"
            " one call to the next"
        )


def _call(loss: BoundLoss, pairs: PairBatch) -> Tensor:
    given, untouched = _copy(pairs), _copy(pairs)
    values = loss(given).detach().clone()
    changed = [key for key, value in vars(given).items() if _is_changed(value, getattr(untouched, key))]
    if changed:  # the first is it: sums, which stand behind what they are made of, may differ because of it
        raise ValueError(f"loss {loss.name!r} changes what it is given ({changed[0]}): it must not work in place")
    return values


def _copy(pairs: PairBatch) -> PairBatch:
    tensors: dict[str, Any] = {name: value.clone() for name, value in _tensors(pairs).items()}
    return replace(pairs, **tensors, columns=pairs.columns.each(Tensor.clone))


def _tensors(pairs: PairBatch) -> dict[str, Tensor]:
    """Log-probabilities and masks by their names."""
    parts = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
    return {name: value for name, value in parts.items() if isinstance(value, Tensor)}


def _is_changed(value: Tensor | Columns | None, untouched: Tensor | Columns | None) -> bool:
    """Also where the numbers happen to be the same: torch counts the times that a tensor was written to."""
    if isinstance(value, Tensor) and isinstance(untouched, Tensor):
        return value._version > 0 or not torch.equal(value, untouched)
    if isinstance(value, Columns) and isinstance(untouched, Columns):
        return value.keys() != untouched.keys() or any(_is_changed(value[name], untouched[name]) for name in value)
    return False


def require_numbers(loss: BoundLoss, pairs: PairBatch) -> None:
    """Refuses a loss that is no finite number for a pair, or whose gradient is none, where a run begins.

    Raises:
        ValueError: with its value.
    """
    values, *gradients = outcome(loss, pairs)
    if not values.isfinite().all():
        raise ValueError(f"step 1: loss {loss.name!r} is {values[~values.isfinite()][0].item()} for a pair")
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise ValueError(f"step 1: loss {loss.name!r} is {values.mean().item():.4g}, but its gradient is no number")


def uses_batch(loss: BoundLoss, pairs: PairBatch) -> bool:
    """Whether a pair's value or gradient differs when the pair stands alone."""
    whole = outcome(loss, pairs)
    for index in range(len(pairs.chosen_mask)):
        try:
            alone = outcome(loss, only(pairs, index))
        except (RuntimeError, IndexError, ValueError):  # it cannot do with one pair
            return True
        if not all(_is_part(by_itself[0], together, index) for by_itself, together in zip(alone, whole, strict=True)):
            return True
    return False


def _is_part(part: Tensor, whole: Tensor, index: int) -> bool:
    """Whether `part` is what stands at that place of `whole`, but for rounding; padding does not count."""
    expected = whole[index, : len(part)] if part.ndim else whole[index]
    largest = whole.nan_to_num(0, 0, 0).abs().amax().item() if whole.numel() else 0.0
    return torch.allclose(part, expected, rtol=CLOSE, atol=CLOSE * largest, equal_nan=True)


def only(pairs: PairBatch, index: int) -> PairBatch:
    """One pair of a batch, without padding."""
    one = slice(index, index + 1)
    chosen, rejected = (int(mask[index].sum()) for mask in (pairs.chosen_mask, pairs.rejected_mask))
    tensors: dict[str, Any] = {
        name: value[one, : rejected if "rejected" in name else chosen] for name, value in _tensors(pairs).items()
    }
    return replace(pairs, **tensors, columns=pairs.columns.each(lambda values: values[one]))


def outcome(loss: Callable[[PairBatch], Tensor], pairs: PairBatch) -> Outcome:
    """What a loss makes of pairs, and how it would have every token's log-probability move."""
    policy = [logps.detach().requires_grad_() for logps in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics over a single pair
        chosen, rejected = (logps.clone() for logps in policy)  # in training too a loss is given no leaves
        values = loss(replace(pairs, policy_chosen_logps=chosen, policy_rejected_logps=rejected))
        gradients = torch.autograd.grad(values.sum(), policy, allow_unused=True, materialize_grads=True)
    return Outcome(values.detach(), *gradients)
