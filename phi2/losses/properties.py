"""What a loss must be, found out by calling it: a function of its answers alone, and of each prompt by itself.

Log-probabilities are made up, in steps of 1/64 nat: sums of so round numbers are exact, whatever the padding, so that a
difference is the loss's own. Everything runs on the CPU and leaves torch's random state as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2.losses.batch import AnswerBatch, Columns, PairBatch
from phi2.losses.bound import BoundLoss
from phi2.losses.registry import EXTRAS, Need

STEPS = 64  # of the made-up log-probabilities in a nat
CLOSE = 1e-4  # by how much of the largest number of a batch the rounding of one formula may differ


class Outcome(NamedTuple):
    """A loss's values, (P,), and the gradient of their sum, (A, T)."""

    values: Tensor
    gradient: Tensor


def made_up_answers(
    lengths: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    columns: Columns,
    reference_free: bool,
    needs: Sequence[Need] = (),
) -> AnswerBatch:
    """Answers of these lengths and scores to each of P prompts, by a policy that has moved away from its reference."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.tensor([n for each in lengths for n in each])
    mask = torch.arange(int(flat.max())) < flat[:, None]
    ref, moved = torch.rand((2, *mask.shape), generator=generator)
    ref, moved = -(4 * STEPS * ref).round() / STEPS, (STEPS * (moved - 0.3)).round() / STEPS
    answers = AnswerBatch(
        (ref - moved).clamp(max=0) * mask,
        tuple(flat.tolist()),
        tuple(prompt for prompt, each in enumerate(lengths) for _ in each),
        tuple(score for each in scores for score in each),
        None if reference_free else ref * mask,
        columns,
    )
    if "mismatched" in needs:
        answers = replace(answers, mismatched=replace(answers, columns=Columns()))
    positive = (1 / STEPS - answers.policy_logps) / 2 * mask  # log sum p^2 is below 0, and above 2 log p
    signs: dict[str, int] = {name: -1 if name == "log_sum_square" else 1 for name in needs if name in EXTRAS}
    answers = replace(answers, extras={name: sign * positive for name, sign in signs.items()})
    if "gold" in needs:
        firsts = [each[:1] for each in lengths]
        answers = replace(answers, gold=made_up_answers(firsts, [(1.0,)] * len(firsts), Columns(), reference_free=True))
    return answers


def made_up_pairs(
    chosen_lengths: list[int], rejected_lengths: list[int], columns: Columns, reference_free: bool
) -> PairBatch:
    """Pairs of these lengths likewise."""
    lengths = [*zip(chosen_lengths, rejected_lengths, strict=True)]
    return made_up_answers(lengths, [(1.0, 0.0)] * len(lengths), columns, reference_free).pairs


def require_pure(loss: BoundLoss, answers: AnswerBatch) -> None:
    """Refuses a loss that depends on more than its answers, or that changes them.

    Raises:
        ValueError: naming what it changes, or that it draws random numbers or keeps a state.
    """
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        once, again = _call(loss, answers), _call(loss, answers)
        drawn = not torch.equal(before, torch.get_rng_state())
    if drawn or not torch.allclose(once, again, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"loss {loss.name!r} is no function of its {loss.unit}s alone: it draws random numbers, or keeps something"
            " from one call to the next"
        )


def _call(loss: BoundLoss, answers: AnswerBatch) -> Tensor:
    given, untouched = _copy(answers), _copy(answers)
    values = loss(given).detach().clone()
    seen, before = (given.pairs, untouched.pairs) if loss.unit == "pair" else (given, untouched)
    changed = [key for key, value in vars(seen).items() if _is_changed(value, getattr(before, key))]
    if changed:  # the first is it: sums, which stand behind what they are made of, may differ because of it
        raise ValueError(f"loss {loss.name!r} changes what it is given ({changed[0]}): it must not work in place")
    return values


def _copy(answers: AnswerBatch) -> AnswerBatch:
    """With tensors of its own."""
    copies = {name: _copied(getattr(answers, name)) for name in (field.name for field in fields(answers))}
    return replace(answers, **copies)


def _copied(value: Any) -> Any:
    if isinstance(value, AnswerBatch):
        return _copy(value)
    if isinstance(value, Columns):
        return value.each(Tensor.clone)
    if isinstance(value, dict):
        return {name: each.clone() for name, each in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _is_changed(value: Any, untouched: Any) -> bool:
    """Also where the numbers happen to be the same: torch counts the times that a tensor was written to."""
    if isinstance(value, Tensor) and isinstance(untouched, Tensor):
        return value._version > 0 or not torch.equal(value.nan_to_num(), untouched.nan_to_num())
    if isinstance(value, AnswerBatch):
        return any(_is_changed(each, getattr(untouched, name)) for name, each in vars(value).items())
    if isinstance(value, dict):
        return value.keys() != untouched.keys() or any(_is_changed(value[name], untouched[name]) for name in value)
    if isinstance(value, tuple):
        return any(map(_is_changed, value, untouched))
    return False


def require_numbers(loss: BoundLoss, answers: AnswerBatch) -> None:
    """Refuses a loss that is no finite number for a prompt, or whose gradient is none, where a run begins.

    Raises:
        ValueError: with its value.
    """
    values, gradient = outcome(loss, answers)
    if not values.isfinite().all():
        raise ValueError(f"step 1: loss {loss.name!r} is {values[~values.isfinite()][0].item()} for a {loss.unit}")
    if not gradient.isfinite().all():
        raise ValueError(f"step 1: loss {loss.name!r} is {values.mean().item():.4g}, but its gradient is no number")


def uses_batch(loss: BoundLoss, answers: AnswerBatch) -> bool:
    """Whether the value or gradient of a prompt's answers differs when they stand alone."""
    whole, end = outcome(loss, answers), 0
    for index in range(answers.count):
        one = answers.only(index)
        start, end = end, end + len(one.lengths)
        try:
            alone = outcome(loss, one)
        except (RuntimeError, IndexError, ValueError):  # it cannot do with one prompt
            return True
        together = whole.gradient[start:end, : alone.gradient.shape[1]]
        if not _is_close(alone.values[0], whole.values[index], whole.values):
            return True
        if not _is_close(alone.gradient, together, whole.gradient):
            return True
    return False


def require_scope(loss: BoundLoss, answers: AnswerBatch) -> None:
    """Refuses a loss that looks at other rows and does not say so.

    Raises:
        ValueError: naming what to register it with.
    """
    if loss.scope == "pair" and uses_batch(loss, answers):
        raise ValueError(
            f"loss {loss.name!r} gives a {loss.unit} another value when other {loss.unit}s stand beside it:"
            f' register it with scope="window", and it is given all {loss.unit}s of an update'
        )


def _is_close(part: Tensor, expected: Tensor, whole: Tensor) -> bool:
    """But for rounding, which is that of the largest number of the batch."""
    largest = whole.nan_to_num(0, 0, 0).abs().amax().item() if whole.numel() else 0.0
    return torch.allclose(part, expected, rtol=CLOSE, atol=CLOSE * largest, equal_nan=True)


def outcome(loss: Callable[[AnswerBatch], Tensor], answers: AnswerBatch) -> Outcome:
    """What a loss makes of answers, and how it would have every token's log-probability move."""
    policy = answers.policy_logps.detach().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics over a single prompt
        values = loss(replace(answers, policy_logps=policy.clone()))  # in training too a loss is given no leaf
        (gradient,) = torch.autograd.grad(values.sum(), policy, allow_unused=True, materialize_grads=True)
    behind = ~answers.mask  # an answer's end, where all is padding
    return Outcome(values.detach(), gradient.masked_fill(behind, 0))
