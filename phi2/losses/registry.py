"""The registry of preference losses: what is in it, and what a loss file adds.

`@preference_loss("name")` registers a function; its keyword arguments are its knobs (`knobs.py`). `bind_loss`
(`bound.py`) resolves a name once, and what it returns is all that a run asks about its loss.

A loss is given a `PairBatch` and returns a value of each pair; one whose unit is "answer" or "prompt" is given an
`AnswerBatch` and returns a value of each of these.

A loss of scope "pair" gives each pair its value whatever stands beside it. One of scope "window" is given all pairs of
an update at once, and may keep numbers from one update to the next: its state, which it is given and gives back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from phi2.losses.batch import Unit
from phi2.losses.knobs import Knob, Knobs, knobs_of, require_choices
from phi2.losses.source import call, require_source_file, run_source_file

# (pairs, *, knob=default, ...) -> (B,) nats; with a state, (pairs, state, *, knob=default, ...) -> both
LossFunction = Callable[..., Any]
Scope = Literal["pair", "window"]
Need = Literal["gold", "mismatched", "entropy", "log_sum_square", "kl"]  # what a batch has only for a loss that asks
EXTRAS = ("entropy", "log_sum_square", "kl")  # those of each token
State = Mapping[str, float | Tensor]
REWARD_SCALE = "beta"


def as_numbers(state: State) -> dict[str, float]:
    """A state as a file keeps it. Its device is waited for."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in state.items()}


class PreferenceLoss(NamedTuple):
    """A registered loss.

    Attributes:
        knobs: its keyword arguments with their defaults.
        choices: of the knobs that are strings, what each may be.
        reward_scale: the knob that multiplies the log-ratios in the reward the loss implies; None multiplies by 1.
        scope: what its value depends on, each pair alone or all pairs of an update.
        state: what it starts from of the numbers that it keeps; empty where it keeps none.
        unit: what each of its values belongs to.
        needs: what else its batch must have.
    """

    function: LossFunction
    reference_free: bool
    knobs: dict[str, Knob]
    choices: dict[str, tuple[str, ...]]
    reward_scale: str | None
    scope: Scope
    state: Mapping[str, float]
    unit: Unit
    needs: tuple[Need, ...]

    @property
    def is_own(self) -> bool:
        """Whether it is this package's."""
        return (self.function.__module__ or "").startswith("phi2.")

    def __call__(self, *given: Any, **knobs: Knob) -> Any:
        """What the function returns; what goes wrong in one of the user's is one line."""
        return self.function(*given, **knobs) if self.is_own else call(self.function, *given, **knobs)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}
_OF_THE_LAST_FILE: list[str] = []  # names that it registered


def preference_loss(
    name: str,
    *,
    reference_free: bool = False,
    reward_scale: str | None = None,
    scope: Scope = "pair",
    state: Mapping[str, float] | None = None,
    unit: Unit = "pair",
    needs: tuple[Need, ...] = (),
) -> Callable[[LossFunction], LossFunction]:
    """Registers a loss under a name.

    Called with a `PairBatch` of B pairs it returns (B,) nats; with unit "answer" or "prompt", with an `AnswerBatch` of
    A answers to P prompts, (A,) or (P,). Given lists, a loss of pairs sees every two answers of which one is better,
    and its values are averaged for each prompt.

    Args:
        name: what `--loss` takes.
        reference_free: the loss reads no ref_* log-probabilities, so none are computed.
        reward_scale: the knob that multiplies the log-ratio of an answer (reference-free: its log-probability a token)
            in the reward that the loss implies; unset, beta where that is one, else 1.
        scope: "window" for a loss whose value depends on other rows. It is called once an update with all its rows,
            however they are cut into passes, and the mean over these of what it returns is minimised.
        state: numbers that a loss of that scope keeps from one update to the next, as they start. It is then called as
            loss(pairs, state, *, knobs) and returns its values and the state behind them, which a checkpoint keeps. A
            number that starts whole is a Python number (counts), any other a tensor of shape () on the device, which is
            not to be changed in place.
        unit: "answer" for a loss that gives each answer its value, from its label, "prompt" for one that gives the
            answers to a prompt their value together. It is called with an `AnswerBatch`.
        needs: "gold" for an answer to be imitated beside each pair, which the data must have; "mismatched" for answers
            to other prompts behind each prompt of the update, whichever rows the loss is called with; "entropy" and
            "log_sum_square", log sum p^2, of the policy's distribution at each token, in `extras`, without gradient;
            "kl", KL(reference to policy) over all ids at each token, in `extras`, with its gradient.
    Raises:
        ValueError: when the name is none, is taken by another function or cannot be written in a mixture, or a keyword
            argument has no default that says what it takes, or reward_scale is no knob that is a number, or a scope,
            unit or need is none, or a loss of pairs has a state. The same function may come again, as when a notebook
            cell is run twice.
    """
    if not isinstance(name, str):
        raise ValueError(f'preference_loss needs a name, @preference_loss("mine"), got {name!r}')

    def register(function: LossFunction) -> LossFunction:
        taken = PREFERENCE_LOSSES.get(name)
        if taken and _full_name(taken.function) != _full_name(function):
            raise ValueError(f"the loss name {name!r} is taken; registered are {', '.join(PREFERENCE_LOSSES)}")
        if {*name} & {*":,"}:
            raise ValueError(f"the loss name {name!r} has a colon or a comma: they part the losses of a mixture")
        _require_scope(name, scope, state)
        _require_one_of(name, "unit", get_args(Unit), unit)
        if "kl" in needs and (scope == "window" or reference_free):
            raise ValueError(f'loss {name!r}: a KL needs a reference, and its gradient needs scope="pair"')
        for need in needs:
            _require_one_of(name, "needs", get_args(Need), need)
        knobs = knobs_of(name, function, given=1 if state is None else 2)
        require_choices(name, knobs)
        numbers = [knob for knob, default in knobs.defaults.items() if not isinstance(default, bool | str)]
        if reward_scale is not None and reward_scale not in numbers:
            told = ", ".join(numbers) or "none"
            raise ValueError(f"loss {name!r}: reward_scale must be one of its numbers, {told}, got {reward_scale!r}")
        scale = reward_scale or (REWARD_SCALE if REWARD_SCALE in numbers else None)
        kept = dict(state or {})
        PREFERENCE_LOSSES[name] = PreferenceLoss(
            function, reference_free, knobs.defaults, knobs.choices, scale, scope, kept, unit, tuple(needs)
        )
        return function

    return register


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_scope(name: str, scope: str, state: Mapping[str, float] | None) -> None:
    _require_one_of(name, "scope", get_args(Scope), scope)
    if state is not None and scope == "pair":
        raise ValueError(f'loss {name!r}: a state moves once an update, register it with scope="window"')
    if state is not None and not (state and all(map(_is_number, state.values()))):
        raise ValueError(f"loss {name!r}: state must name numbers, as {{'mean': 0.0}}, got {state!r}")


def _require_one_of(name: str, what: str, allowed: tuple[str, ...], value: str) -> None:
    if value not in allowed:
        raise ValueError(f"loss {name!r}: {what} must be one of {', '.join(allowed)}, got {value!r}")


def _full_name(function: LossFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def knobs_in(loss: PreferenceLoss) -> Knobs:
    return Knobs(loss.knobs, loss.choices)


def load_loss_file(path: str | Path) -> None:
    """Runs a Python file of the user's, for the losses it registers; those of the file before it are forgotten.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be run.
    """
    require_source_file(path, "loss_file")
    for name in _OF_THE_LAST_FILE:
        PREFERENCE_LOSSES.pop(name, None)
    before = set(PREFERENCE_LOSSES)
    try:
        run_source_file(path, "loss_file")
    finally:
        _OF_THE_LAST_FILE[:] = PREFERENCE_LOSSES.keys() - before
