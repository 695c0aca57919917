"""The registry of preference losses, and what a run makes of one: its knobs set, everything about it known.

`@preference_loss("name")` registers a function; its keyword arguments are its knobs, and their defaults say what they
take: a number, true or false, or a string of those that its annotation `Literal[...]` lists. `bind_loss` resolves a
name once, and what it returns is all that a run asks about its loss.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.source import require_source_file, run_source_file, source_of_loss

Knob = float | bool | str
LossFunction = Callable[..., Tensor]  # (pairs, *, knob=default, ...) -> (B,) nats
REWARD_SCALE = "beta"
RANGES = {  # of numbers that mean the same in every loss
    "beta": (lambda value: 0 < value < math.inf, "above 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
}


class PreferenceLoss(NamedTuple):
    """A registered loss.

    Attributes:
        knobs: its keyword arguments with their defaults.
        choices: of the knobs that are strings, what each may be.
        reward_scale: the knob that multiplies the log-ratios in the reward the loss implies; None multiplies by 1.
    """

    function: LossFunction
    reference_free: bool
    knobs: dict[str, Knob]
    choices: dict[str, tuple[str, ...]]
    reward_scale: str | None


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}
_OF_THE_LAST_FILE: list[str] = []  # names that it registered


def preference_loss(
    name: str, *, reference_free: bool = False, reward_scale: str | None = None
) -> Callable[[LossFunction], LossFunction]:
    """Registers a loss under a name.

    Args:
        name: what `--loss` takes.
        reference_free: the loss reads no ref_* log-probabilities, so none are computed.
        reward_scale: the knob that multiplies the log-ratio of an answer (reference-free: its log-probability a token)
            in the reward that the loss implies; unset, beta where that is one, else 1.
    Raises:
        ValueError: when the name is taken by another function, or a keyword argument has no default that says what it
            takes, or reward_scale is no knob that is a number. The same function may come again, as when a notebook
            cell is run twice.
    """

    def register(function: LossFunction) -> LossFunction:
        taken = PREFERENCE_LOSSES.get(name)
        if taken and _full_name(taken.function) != _full_name(function):
            raise ValueError(f"the loss name {name!r} is taken; registered are {', '.join(PREFERENCE_LOSSES)}")
        knobs, choices = _knobs_of(name, function)
        numbers = [knob for knob, default in knobs.items() if not isinstance(default, bool | str)]
        if reward_scale is not None and reward_scale not in numbers:
            told = ", ".join(numbers) or "none"
            raise ValueError(f"loss {name!r}: reward_scale must be one of its numbers, {told}, got {reward_scale!r}")
        scale = reward_scale or (REWARD_SCALE if REWARD_SCALE in numbers else None)
        PREFERENCE_LOSSES[name] = PreferenceLoss(function, reference_free, knobs, choices, scale)
        return function

    return register


def _full_name(function: LossFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _knobs_of(name: str, function: LossFunction) -> tuple[dict[str, Knob], dict[str, tuple[str, ...]]]:
    _, *knobs = inspect.signature(function).parameters.values()
    choices = {knob.name: _choices(name, function, knob) for knob in knobs if isinstance(knob.default, str)}
    for knob in knobs:
        if not isinstance(knob.default, int | float | str):
            raise ValueError(
                f"loss {name!r}: its argument {knob.name!r} needs a number as default, or true or false, or a string"
            )
        if isinstance(knob.default, str) and knob.default not in choices[knob.name]:
            example = f"Literal[{knob.default!r}, ...]"
            raise ValueError(f"loss {name!r}: its argument {knob.name!r} needs its choices as annotation, {example}")
    return {knob.name: knob.default for knob in knobs}, choices


def _choices(name: str, function: LossFunction, knob: inspect.Parameter) -> tuple[str, ...]:
    """What the annotation of a knob lists.

    Raises:
        ValueError: for a choice that a command line or a YAML file would read as something else than text.
    """
    owner: Any = function
    while isinstance(owner, functools.partial):
        owner = owner.func
    space = getattr(owner, "__globals__", None) or getattr(type(owner).__call__, "__globals__", {})
    try:
        hint = get_type_hints(SimpleNamespace(__annotations__={"knob": knob.annotation}), space)["knob"]
    except (NameError, AttributeError, TypeError):  # of an annotation that only a type checker can read
        return ()
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    for choice in choices:
        if yaml.safe_load(str(choice)) != choice:
            raise ValueError(f"loss {name!r}: the choice {choice!r} of its argument {knob.name!r} is not read as text")
    return choices


@dataclass(frozen=True)
class BoundLoss:
    """A loss as a run uses it: called with pairs it returns (B,) nats.

    Attributes:
        knobs: all of them, with the values of this run.
        reference_free: it reads no ref_* log-probabilities.
        reward_scale: of the reward that it implies.
        source: its text, None where Python does not know it.
    """

    name: str
    function: LossFunction
    knobs: dict[str, Knob]
    reference_free: bool
    reward_scale: float
    source: str | None

    def number(self, knob: str) -> float | None:
        """The value of a knob that is a number; None for any other."""
        value = self.knobs.get(knob)
        return None if isinstance(value, bool | str) else value

    def __call__(self, pairs: PairBatch) -> Tensor:
        """(B,) losses in nats.

        Raises:
            ValueError: when the function returns anything else, or what has no gradient where one is asked for.
        """
        losses, expected = self.function(pairs, **self.knobs), (len(pairs.chosen_mask),)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            what = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss {self.name!r} must return a tensor of floats, one value per pair, got {what}")
        if losses.shape != expected:
            shape = tuple(losses.shape)
            raise ValueError(f"loss {self.name!r} must return one value per pair, {expected}, got shape {shape}")
        if pairs.policy_chosen_logps.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(
                f"loss {self.name!r} must depend on the policy's log-probabilities: what it returned has no gradient"
            )
        return losses


def bind_loss(name: str, knobs: Mapping[str, Any] | None = None, loss_file: str | Path | None = None) -> BoundLoss:
    """The loss of that name with its knobs set, those that are not given at their defaults.

    Args:
        loss_file: the user's, run before the name is looked up.
    Raises:
        ValueError: for an unknown name, a knob this loss does not take, or a value out of its range; for a file that
            cannot be run.
        FileNotFoundError: when there is no such file.
    """
    if loss_file is not None:
        load_loss_file(loss_file)
    if name not in PREFERENCE_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(sorted(PREFERENCE_LOSSES))}, got {name!r}")
    loss = PREFERENCE_LOSSES[name]
    for knob, value in (knobs or {}).items():
        _check_knob(name, loss, knob, value)
    values = {**loss.knobs, **(knobs or {})}
    scale = 1.0 if loss.reward_scale is None else values[loss.reward_scale]
    source = source_of_loss(loss.function, loss_file)
    return BoundLoss(name, loss.function, values, loss.reference_free, scale, source)


def _check_knob(name: str, loss: PreferenceLoss, knob: str, value: Any) -> None:
    if knob not in loss.knobs:
        raise ValueError(f"loss {name!r} does not take {knob!r}; its knobs are {', '.join(loss.knobs) or 'none'}")
    default = loss.knobs[knob]
    if isinstance(default, str):
        is_allowed, rule = value in loss.choices[knob], f"one of {', '.join(loss.choices[knob])}"
    elif isinstance(default, bool):
        is_allowed, rule = isinstance(value, bool), "true or false"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        is_allowed, rule = False, "a number"
    else:
        in_range, rule = RANGES.get(knob, (math.isfinite, "a finite number"))
        is_allowed = in_range(value)
    if not is_allowed:
        raise ValueError(f"loss {name!r}: {knob} must be {rule}, got {value!r}")


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


def document() -> str:
    """docs/losses.md: every loss of this package, what it is, and its knobs."""
    head = [
        "# Preference losses",
        "",
        "By `python -m phi2.losses`; the letters are those of `pairwise.py`.",
        "",
    ]
    columns = ["| `--loss` | what it is | knobs | reference | source |", "|---|---|---|---|---|"]
    own = {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.function.__module__.startswith("phi2.")}
    return "\n".join([*head, *columns, *(_row(name, loss) for name, loss in own.items())]) + "\n"


def _row(name: str, loss: PreferenceLoss) -> str:
    about, _, source = " ".join((inspect.getdoc(loss.function) or "").split()).partition(" Source: ")
    knobs = ", ".join(f"{knob} {value}" for knob, value in loss.knobs.items())
    reference = "none" if loss.reference_free else "needed"
    return f"| `{name}` | {about} | {knobs} | {reference} | {source.rstrip('.')} |"
