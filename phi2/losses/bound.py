"""What a run makes of the loss it is asked for: one object, with all knobs set and everything known about it.

What is asked for is a name, a preset, or a weighted mixture of these: `sigmoid`, `paper:ipo`, `sigmoid:0.8,sft:0.2`.
Knobs go to every part of a mixture that takes them; written as a list, each part has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.knobs import Knob, nearest
from phi2.losses.modifiers import MODIFIERS, modifier_of
from phi2.losses.presets import PRESETS
from phi2.losses.registry import PREFERENCE_LOSSES, knobs_in, load_loss_file
from phi2.losses.source import source_of_loss

LossSpec = str | Sequence[str | Mapping[str, Any]]
PART = ("loss", "weight", "args")  # what a part of a mixture may say


class Part(NamedTuple):
    """One loss of a mixture, its weight in it, and the knobs that were given for it alone."""

    name: str
    weight: float
    knobs: dict[str, Any]


@dataclass(frozen=True)
class BoundLoss:
    """A loss as a run uses it: called with pairs it returns (B,) nats.

    Attributes:
        function: from pairs to losses, with its knobs set.
        knobs: all of them, those of modifiers included, with the values of this run; of a mixture, those of its parts.
        reference_free: it reads no ref_* log-probabilities.
        reward_scale: of the reward that it implies; in a mixture, of the first part that has a reference.
        source: its text, None where Python does not know it.
        modifiers: names of those around it.
        parts: of a mixture, with their weights.
    """

    name: str
    function: Callable[[PairBatch], Tensor]
    knobs: dict[str, Knob]
    reference_free: bool
    reward_scale: float
    source: str | None
    modifiers: tuple[str, ...] = ()
    parts: tuple[tuple[float, BoundLoss], ...] = ()

    def number(self, knob: str) -> float | None:
        """The value of a knob that is a number; None for any other."""
        value = self.knobs.get(knob)
        return None if isinstance(value, bool | str) else value

    def without(self, modifier: str) -> BoundLoss:
        """The same loss without one of its modifiers."""
        own = MODIFIERS[modifier].knobs.defaults
        return bind_loss(self.name, {knob: value for knob, value in self.knobs.items() if knob not in own})

    def __call__(self, pairs: PairBatch) -> Tensor:
        """(B,) losses in nats.

        Raises:
            ValueError: when the function returns anything else, or what has no gradient where one is asked for.
        """
        losses, expected = self.function(pairs), (len(pairs.chosen_mask),)
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


def bind_loss(loss: LossSpec, knobs: Mapping[str, Any] | None = None, loss_file: str | Path | None = None) -> BoundLoss:
    """The loss of that name, preset or mixture with its knobs set, those that are not given at their defaults.

    Args:
        knobs: of the loss and of modifiers; in a mixture each goes to every part that takes it.
        loss_file: the user's, run before names are looked up.
    Raises:
        ValueError: for an unknown name, a knob that nothing takes, or a value out of its range; for a file that cannot
            be run.
        FileNotFoundError: when there is no such file.
    """
    if loss_file is not None:
        load_loss_file(loss_file)
    parts, knobs = parts_of(loss), knobs or {}
    if len(parts) == 1 and parts[0].weight == 1:
        (part,) = parts
        return _bind(part.name, {**part.knobs, **knobs}, loss_file)
    for knob in knobs:
        if not any(_takes(part.name, knob) for part in parts):
            raise ValueError(f"none of {', '.join(part.name for part in parts)} takes {knob!r}{_hint(parts, knob)}")
    return _mixture(
        [
            (
                part.weight,
                _bind(part.name, part.knobs | {k: v for k, v in knobs.items() if _takes(part.name, k)}, loss_file),
            )
            for part in parts
        ]
    )


def parts_of(loss: LossSpec) -> list[Part]:
    """What is asked for, presets replaced by what they stand for.

    Raises:
        ValueError: for a name that is none, and a part that says something else than loss, weight and args.
    """
    written = loss.split(",") if isinstance(loss, str) else loss
    return [part for each in written for part in _without_preset(_part(each))] or _no_loss()


def _no_loss() -> list[Part]:
    raise ValueError("loss must name one loss at least, got none")


def _part(written: str | Mapping[str, Any]) -> Part:
    if isinstance(written, str):
        name, _, weight = written.strip().rpartition(":")
        try:
            return Part(name, _weight(float(weight)), {}) if name else Part(weight, 1.0, {})
        except ValueError as error:
            if "weight" in str(error):
                raise
            return Part(written.strip(), 1.0, {})  # what stands behind the colon is no number: a preset
    for key in written:
        if key not in PART:
            raise ValueError(f"a part of a mixture has {', '.join(PART)}, got {key!r}{nearest(key, PART)}")
    if not isinstance(written.get("loss"), str):
        raise ValueError(f"a part of a mixture needs its loss, got {dict(written)}")
    return Part(written["loss"], _weight(written.get("weight", 1.0)), dict(written.get("args") or {}))


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"the weight of a loss must be a number above 0, got {value!r}")
    return float(value)


def _without_preset(part: Part) -> list[Part]:
    """The part itself, or what the preset it names stands for, its knobs below those that were given."""
    if part.name not in PRESETS:
        if part.name not in PREFERENCE_LOSSES:
            raise ValueError(_unknown(part.name))
        return [part]
    preset = PRESETS[part.name]
    own = [inner._replace(weight=inner.weight * part.weight) for inner in map(_part, preset.loss.split(","))]
    for knob in part.knobs:
        if not any(_takes(inner.name, knob) for inner in own):
            raise ValueError(f"preset {part.name!r} does not take {knob!r}{_hint(own, knob)}")
    given = {**preset.knobs, **part.knobs}
    return [inner._replace(knobs={k: v for k, v in given.items() if _takes(inner.name, k)}) for inner in own]


def _unknown(name: str) -> str:
    if ":" in name:
        return f"preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}"
    known = sorted(PREFERENCE_LOSSES)
    return f"loss must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"


def _takes(name: str, knob: str) -> bool:
    """Whether a knob means something to this loss, its own or that of a modifier that goes with it."""
    loss, modifier = PREFERENCE_LOSSES[name], modifier_of(knob)
    goes_with = modifier is not None and not (MODIFIERS[modifier].needs_reference and loss.reference_free)
    return knob in loss.knobs or goes_with


def _hint(parts: Sequence[Part], knob: str) -> str:
    own = dict.fromkeys(own for part in parts for own in PREFERENCE_LOSSES[part.name].knobs)
    any_loss = [other for each in MODIFIERS.values() for other in each.knobs.defaults]
    near = nearest(knob, [*own, *any_loss])
    return near or f"; its knobs are {', '.join(own) or 'none'}, and with any loss go {', '.join(any_loss)}"


def _bind(name: str, given: Mapping[str, Any], loss_file: str | Path | None) -> BoundLoss:
    """One loss, with the modifiers whose knobs are given around it."""
    loss = PREFERENCE_LOSSES[name]
    modified: dict[str, dict[str, Any]] = {}
    for knob, value in given.items():
        if knob in loss.knobs:
            knobs_in(loss).check(name, knob, value)
            continue
        modifier = modifier_of(knob)
        if modifier is None:
            raise ValueError(f"loss {name!r} does not take {knob!r}{_hint([Part(name, 1.0, {})], knob)}")
        if loss.reference_free and MODIFIERS[modifier].needs_reference:
            raise ValueError(f"loss {name!r} has no reference, and {knob} acts on the log-ratio to one")
        MODIFIERS[modifier].knobs.check(name, knob, value)
        modified.setdefault(modifier, {})[knob] = value
    knobs = {**loss.knobs, **{knob: value for knob, value in given.items() if knob in loss.knobs}}
    scale = 1.0 if loss.reward_scale is None else float(knobs[loss.reward_scale])
    function: Callable[[PairBatch], Tensor] = partial(loss.function, **knobs)
    sources = [source_of_loss(loss.function, loss_file)]
    for modifier in reversed(MODIFIERS):  # the innermost is applied last
        if modifier in modified:
            values = {**MODIFIERS[modifier].knobs.defaults, **modified[modifier]}
            function, knobs = MODIFIERS[modifier].function(function, **values), {**knobs, **values}
            sources.append(source_of_loss(MODIFIERS[modifier].function))
    return BoundLoss(name, function, knobs, loss.reference_free, scale, _joined(sources), tuple(modified))


def _mixture(parts: list[tuple[float, BoundLoss]]) -> BoundLoss:
    """The weighted sum of bound losses."""

    def total(pairs: PairBatch) -> Tensor:
        return torch.stack([weight * loss(pairs) for weight, loss in parts]).sum(dim=0)

    name = ",".join(f"{loss.name}:{weight:g}" for weight, loss in parts)
    with_reference = [loss for _, loss in parts if not loss.reference_free]
    first = (with_reference or [loss for _, loss in parts])[0]
    source = _joined([loss.source for _, loss in parts])
    return BoundLoss(name, total, {}, not with_reference, first.reward_scale, source, parts=tuple(parts))


def _joined(sources: list[str | None]) -> str | None:
    known = [source for source in sources if source is not None]
    return "\0".join(known) if len(known) == len(sources) else None
