"""The knobs of a loss or of a modifier: its keyword arguments, whose defaults say what they take.

A number, true or false, or a string of those that its annotation `Literal[...]` lists.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

Knob = float | bool | str
RANGES = {  # of numbers; those of a single loss stand behind its name
    "beta": (lambda value: 0 < value < math.inf, "above 0"),
    "discopop_tau": (lambda value: 0 < value < math.inf, "above 0"),
    "r_max": (lambda value: 0 < value < math.inf, "above 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    "exo_pair.label_smoothing": (lambda value: 0 < value < 0.5, "in (0, 0.5)"),
    "ld_alpha": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "sampo_seed": (lambda value: value >= 0 and value == int(value), "a whole number from 0 on"),
    "drop_seed": (lambda value: value >= 0 and value == int(value), "a whole number from 0 on"),
    "drop": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "beta_prime": (lambda value: 0 < value < math.inf, "above 0"),
    "temperature": (lambda value: 0 < value < math.inf, "above 0"),
    "desirable_weight": (lambda value: 0 <= value < math.inf, "from 0 on"),
    "undesirable_weight": (lambda value: 0 <= value < math.inf, "from 0 on"),
}


class Knobs(NamedTuple):
    """Defaults by name, and of those that are strings what each may be; no choices: any text."""

    defaults: dict[str, Knob]
    choices: dict[str, tuple[str, ...]]

    def check(self, owner: str, knob: str, value: Any) -> None:
        """Refuses a value of another type, none of the choices, or out of its range.

        Args:
            owner: a loss by its name, or a modifier, as the message has it.
        """
        default = self.defaults[knob]
        if isinstance(default, str):
            choices = self.choices[knob]
            is_allowed = value in choices if choices else isinstance(value, str) and value != ""
            rule = f"one of {', '.join(choices)}" if choices else "a name"
        elif isinstance(default, bool):
            is_allowed, rule = isinstance(value, bool), "true or false"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            is_allowed, rule = False, "a number"
        else:
            in_range, rule = RANGES.get(f"{owner}.{knob}") or RANGES.get(knob, (math.isfinite, "a finite number"))
            is_allowed = math.isfinite(value) and in_range(value)
        if not is_allowed:
            raise ValueError(f"loss {owner!r}: {knob} must be {rule}, got {value!r}")


def knobs_of(name: str, function: Callable[..., Any], given: int = 1) -> Knobs:
    """Those of a function's keyword arguments.

    Args:
        given: arguments that stand before them.
    Raises:
        ValueError: for one whose default does not say what it takes.
    """
    knobs = [*inspect.signature(function).parameters.values()][given:]
    choices = {knob.name: _choices(name, function, knob) for knob in knobs if isinstance(knob.default, str)}
    for knob in knobs:
        if not isinstance(knob.default, int | float | str):
            raise ValueError(
                f"loss {name!r}: its argument {knob.name!r} needs a number as default, or true or false, or a string"
            )
    return Knobs({knob.name: knob.default for knob in knobs}, choices)


def require_choices(name: str, knobs: Knobs) -> None:
    """Refuses a string whose choices are not told, or that is none of them."""
    for knob, choices in knobs.choices.items():
        default = knobs.defaults[knob]
        if default not in choices:
            example = f"Literal[{default!r}, ...]"
            raise ValueError(f"loss {name!r}: its argument {knob!r} needs its choices as annotation, {example}")


def _choices(name: str, function: Callable[..., Any], knob: inspect.Parameter) -> tuple[str, ...]:
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


def told(values: Mapping[str, Knob]) -> str:
    """Knobs with their values, as a message or table has them."""
    return ", ".join(f"{knob} {value}" for knob, value in values.items())


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at what was meant, empty where nothing is near."""
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
