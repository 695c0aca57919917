"""What a run makes of the loss it is asked for: one object, with all knobs set and everything known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.knobs import Knob
from phi2.losses.modifiers import MODIFIERS, modifier_of
from phi2.losses.parts import LossSpec, Part, hint, parts_of
from phi2.losses.registry import knobs_in, load_loss_file
from phi2.losses.source import source_of_loss


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

    def with_knob(self, knob: str, value: Knob) -> BoundLoss:
        """The same loss with another value of a knob."""
        return bind_loss(self.name, {**self.knobs, knob: value})

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
        return _bind(parts[0].with_knobs(knobs), loss_file)
    for knob in knobs:
        if not any(part.takes(knob) for part in parts):
            raise ValueError(f"none of {', '.join(part.name for part in parts)} takes {knob!r}{hint(parts, knob)}")
    each = [part.with_knobs({k: v for k, v in knobs.items() if part.takes(k)}) for part in parts]
    return _mixture([(part.weight, _bind(part, loss_file)) for part in each])


def _bind(part: Part, loss_file: str | Path | None) -> BoundLoss:
    """One loss, with the modifiers whose knobs are given around it."""
    loss, modified = part.loss, _modifiers(part)
    knobs = {**loss.knobs, **{knob: value for knob, value in part.knobs.items() if knob in loss.knobs}}
    scale = 1.0 if loss.reward_scale is None else float(knobs[loss.reward_scale])
    function: Callable[[PairBatch], Tensor] = partial(loss.function, **knobs)
    sources = [source_of_loss(loss.function, loss_file)]
    for name, modifier in reversed(MODIFIERS.items()):  # the last is the innermost
        if name in modified:
            values = {**modifier.knobs.defaults, **modified[name]}
            function, knobs = modifier.function(function, **values), {**knobs, **values}
            sources.append(source_of_loss(modifier.function))
    return BoundLoss(part.name, function, knobs, loss.reference_free, scale, _joined(sources), tuple(modified))


def _modifiers(part: Part) -> dict[str, dict[str, Any]]:
    """By modifier its knobs that are given; all knobs are checked."""
    modified: dict[str, dict[str, Any]] = {}
    for knob, value in part.knobs.items():
        if knob in part.loss.knobs:
            knobs_in(part.loss).check(part.name, knob, value)
            continue
        name = modifier_of(knob)
        if name is None:
            raise ValueError(f"loss {part.name!r} does not take {knob!r}{hint([part], knob)}")
        if not part.takes(knob):
            raise ValueError(f"loss {part.name!r} has no reference, and {knob} acts on the log-ratio to one")
        MODIFIERS[name].knobs.check(part.name, knob, value)
        modified.setdefault(name, {})[knob] = value
    return modified


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
