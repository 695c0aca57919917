"""What is asked for where a loss is named: a loss, a preset, or a weighted mixture of these.

`sigmoid`, `paper:ipo`, `sigmoid:0.8,sft:0.2`; or a list, whose parts may have knobs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phi2.keywords import plain_number
from phi2.losses.knobs import nearest
from phi2.losses.modifiers import MODIFIERS, modifier_of
from phi2.losses.presets import PRESETS
from phi2.losses.registry import PREFERENCE_LOSSES, PreferenceLoss

LossSpec = str | Sequence[str | Mapping[str, Any]]
KEYS = ("loss", "weight", "args")  # what a part of a list may say


class Part(NamedTuple):
    """One loss of a mixture, its weight in it, and the knobs that were given for it."""

    name: str
    weight: float
    knobs: dict[str, Any]

    @property
    def loss(self) -> PreferenceLoss:
        return PREFERENCE_LOSSES[self.name]

    def takes(self, knob: str) -> bool:
        """Whether a knob means something to this loss, its own or that of a modifier that goes with it."""
        name = modifier_of(knob)
        goes_with = (
            name is not None
            and (self.loss.unit == "pair" or MODIFIERS[name].any_unit)
            and not (MODIFIERS[name].needs_reference and self.loss.reference_free)
        )
        return knob in self.loss.knobs or goes_with

    def with_knobs(self, knobs: Mapping[str, Any]) -> Part:
        """The same part with these knobs too; they win."""
        return self._replace(knobs={**self.knobs, **_plain(knobs)})


def parts_of(loss: LossSpec) -> list[Part]:
    """The parts of a mixture, one for a single loss; presets are replaced by what they stand for.

    Raises:
        ValueError: for a name that is none, and a part that says something else than loss, weight and args.
    """
    if not isinstance(loss, str | list | tuple):
        yours = "; a function of yours has a name by @phi2.preference_loss(NAME)" if callable(loss) else ""
        raise ValueError(f"loss must be a name, a mixture, or a list of its parts, got {type(loss).__name__}{yours}")
    written = loss.split(",") if isinstance(loss, str) else loss
    parts = [part for each in written for part in _without_preset(_part(each))]
    if not parts:
        raise ValueError("loss must name one loss at least, got none")
    return parts


def _part(written: str | Mapping[str, Any]) -> Part:
    if isinstance(written, str):
        return _part_of_text(written.strip())
    for key in written:
        if key not in KEYS:
            raise ValueError(f"a part of a mixture has {', '.join(KEYS)}, got {key!r}{nearest(key, KEYS)}")
    if not isinstance(written.get("loss"), str):
        raise ValueError(f"a part of a mixture needs its loss, got {dict(written)}")
    return Part(written["loss"], _weight(written.get("weight", 1.0)), _plain(written.get("args") or {}))


def _plain(knobs: Mapping[str, Any]) -> dict[str, Any]:
    return {knob: plain_number(value) for knob, value in knobs.items()}


def _part_of_text(text: str) -> Part:
    """A name, behind which a colon and a weight may stand; there is a colon in the names of presets too."""
    name, _, behind = text.rpartition(":")
    try:
        weight = float(behind)
    except ValueError:
        return Part(text, 1.0, {})
    return Part(name, _weight(weight), {})


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"the weight of a loss must be a number above 0, got {value!r}")
    return float(value)


def _without_preset(part: Part) -> list[Part]:
    """The part itself, or what the preset it names stands for, whose knobs give way to those of the part."""
    if part.name in PREFERENCE_LOSSES:
        return [part]
    if part.name not in PRESETS:
        raise ValueError(_unknown(part.name))
    preset = PRESETS[part.name]
    own = [inner._replace(weight=inner.weight * part.weight) for inner in map(_part, preset.loss.split(","))]
    for knob in part.knobs:
        if not any(inner.takes(knob) for inner in own):
            raise ValueError(f"preset {part.name!r} does not take {knob!r}{hint(own, knob)}")
    given = {**preset.knobs, **part.knobs}
    return [inner.with_knobs({k: v for k, v in given.items() if inner.takes(k)}) for inner in own]


def _unknown(name: str) -> str:
    known, weight = name.partition(":")[::2]
    if known.endswith(".py"):
        return f"loss must be a name, got {name!r}: give the file as loss_file, and the name that it registers"
    if known in PREFERENCE_LOSSES:
        return f"the weight of a loss must be a number above 0, got {weight!r}"
    if "(" in name:
        return f"knobs of a loss do not stand in its name, got {name!r}: they are settings, beta or loss_args"
    if ":" in name:
        return f"preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}"
    names = sorted(PREFERENCE_LOSSES)
    return f"loss must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}"


def hint(parts: Sequence[Part], knob: str) -> str:
    """Behind the refusal of a knob: the nearest one, else all that these parts take."""
    own = dict.fromkeys(own for part in parts for own in part.loss.knobs)
    any_loss = [other for each in MODIFIERS.values() for other in each.knobs.defaults]
    near = nearest(knob, [*own, *any_loss])
    return near or f"; its knobs are {', '.join(own) or 'none'}, and with any loss go {', '.join(any_loss)}"
