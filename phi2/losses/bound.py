"""What a run makes of the loss it is asked for: one object, with all knobs set and everything known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi2.losses.batch import AnswerBatch, PairBatch, Unit
from phi2.losses.knobs import Knob
from phi2.losses.modifiers import MODIFIERS, Modifier, modifier_of
from phi2.losses.parts import LossSpec, Part, hint, parts_of
from phi2.losses.registry import Need, PreferenceLoss, Scope, State, knobs_in, load_loss_file
from phi2.losses.source import source_of_loss

Batch = PairBatch | AnswerBatch
Stateful = Callable[[Any, State], tuple[Tensor, State]]  # of the batch that the loss takes


@dataclass(frozen=True)
class BoundLoss:
    """A loss as a run uses it: called with answers to P prompts it returns (P,) nats.

    Attributes:
        function: from a batch and the state of the loss to losses and the state behind them, with its knobs set.
        knobs: all of them, those of modifiers included, with the values of this run; of a mixture, those of its parts.
        reference_free: it reads no ref_* log-probabilities.
        reward_scale: of the reward that it implies; in a mixture, of the first part that has a reference.
        source: its text, None where Python does not know it.
        modifiers: names of those around it.
        parts: of a mixture, with their weights.
        scope: "window" if its value depends on other pairs of an update: it must be given all of them at once.
        state: what it starts from of the numbers that it keeps from one update to the next.
        unit: what a value of it belongs to; of a mixture a prompt, unless all parts are of pairs.
        needs: what else a batch must have.
    """

    name: str
    function: Stateful
    knobs: dict[str, Knob]
    reference_free: bool
    reward_scale: float
    source: str | None
    modifiers: tuple[str, ...] = ()
    parts: tuple[tuple[float, BoundLoss], ...] = ()
    scope: Scope = "pair"
    state: dict[str, float] = field(default_factory=dict)
    unit: Unit = "pair"
    needs: tuple[Need, ...] = ()

    def number(self, knob: str) -> float | None:
        """The value of a knob that is a number; None for any other."""
        value = self.knobs.get(knob)
        return None if isinstance(value, bool | str) else value

    @property
    def single(self) -> list[BoundLoss]:
        """The losses of a mixture; any other is its own."""
        return [loss for _, loss in self.parts] or [self]

    def without(self, modifier: str) -> BoundLoss:
        """The same loss without one of its modifiers."""
        own = MODIFIERS[modifier].knobs.defaults
        return bind_loss(self.name, {knob: value for knob, value in self.knobs.items() if knob not in own})

    def with_knob(self, knob: str, value: Knob) -> BoundLoss:
        """The same loss with another value of a knob."""
        return bind_loss(self.name, {**self.knobs, knob: value})

    def __call__(self, batch: Batch) -> Tensor:
        """Losses in nats, as a run that begins has them; returns and raises what `step` does."""
        return self.step(batch, self.state)[0]

    def step(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Losses in nats at a state of the loss, and the state that an update with this batch leaves.

        Args:
            batch: answers, or where the loss compares pairs, these.
            state: what starts as a whole number is one; all else the loss has on the device of its log-probabilities,
                in their dtype, so that none of them is waited for.
        Returns:
            (P,) of answers to P prompts, for each the mean over its pairs or answers; (B,) of B pairs. And the state.
        Raises:
            ValueError: when the function returns anything else, or what has no gradient where one is asked for, or has
                changed its state in place; for pairs where the loss takes answers, and a batch without what it needs.
        """
        if isinstance(batch, PairBatch) and self.unit != "pair":
            raise ValueError(f"loss {self.name!r} gives each {self.unit} a value: it takes an AnswerBatch, not pairs")
        given = batch.pairs if isinstance(batch, AnswerBatch) and self.unit == "pair" else batch
        for need in self.needs:
            if not batch.has(need):
                way = "" if need == "mismatched" else "; phi2.score_rows(..., needs=loss.needs) makes it"
                raise ValueError(f"loss {self.name!r} needs {need} of its batch, which has none{way}")
        logps = _logps_of(given)
        before = _placed(state, self.state, logps)
        losses, after = self.function(given, dict(before))
        self._require_losses(losses, given)
        self._require_untouched(before)
        if isinstance(batch, AnswerBatch):
            losses = batch.of_prompts(losses, self.unit)
        return losses, _placed(after, self.state, logps)

    def _require_untouched(self, given: State) -> None:
        """Refuses what `+=` does to a tensor: it changes what was read before, and may be needed for the gradient."""
        for name, value in given.items():
            if isinstance(value, Tensor) and not value.is_inference() and value._version:
                raise ValueError(
                    f"loss {self.name!r} works on {name} of its state in place: give back a new number, as in"
                    f' {{"{name}": state["{name}"] + 1}}'
                )

    def _require_losses(self, losses: Any, given: Batch) -> None:
        logps = _logps_of(given)
        expected = (given.count if self.unit == "prompt" and isinstance(given, AnswerBatch) else len(logps),)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            what = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss {self.name!r} must return a tensor of floats, one value per {self.unit}, got {what}"
            )
        if losses.shape != expected:
            shape = tuple(losses.shape)
            raise ValueError(f"loss {self.name!r} must return one value per {self.unit}, {expected}, got shape {shape}")
        if logps.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(
                f"loss {self.name!r} must depend on the policy's log-probabilities: what it returned has no gradient"
            )


def _logps_of(batch: Batch) -> Tensor:
    """(A, T) or (B, T), of the policy."""
    return batch.policy_logps if isinstance(batch, AnswerBatch) else batch.policy_chosen_logps


def _placed(state: State, start: Mapping[str, float], like: Tensor) -> State:
    """A copy of a state: what starts whole is a number, all else tensors like this one, whose device none waits for."""
    return {
        name: int(state[name]) if isinstance(first, int) else _number(state[name], like)
        for name, first in start.items()
    }


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    """() in the dtype and on the device of a tensor, without a graph."""
    return value.detach().to(like, copy=True) if isinstance(value, Tensor) else like.new_full((), float(value))


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
    function, sources = _with_knobs(part.name, loss, knobs), [source_of_loss(loss.function, loss_file)]
    for name, modifier in reversed(MODIFIERS.items()):  # the last is the innermost
        if name in modified:
            values = {**modifier.knobs.defaults, **modified[name]}
            function, knobs = _modified(modifier, function, values), {**knobs, **values}
            sources.append(source_of_loss(modifier.function))
    source, modifiers = _joined(sources), tuple(modified)
    return BoundLoss(
        part.name,
        function,
        knobs,
        loss.reference_free,
        scale,
        source,
        modifiers,
        scope=loss.scope,
        state=dict(loss.state),
        unit=loss.unit,
        needs=tuple(dict.fromkeys([*loss.needs, *(need for name in modified for need in MODIFIERS[name].needs)])),
    )


def _with_knobs(name: str, loss: PreferenceLoss, knobs: Mapping[str, Knob]) -> Stateful:
    """A registered loss; one that keeps a state must give it back whole."""

    def function(batch: Batch, state: State) -> tuple[Tensor, State]:
        if not loss.state:
            return loss(batch, **knobs), {}
        returned = loss(batch, state, **knobs)
        is_both = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
        if not is_both or returned[1].keys() != loss.state.keys():
            what = f"a state of {', '.join(returned[1]) or 'nothing'}" if is_both else type(returned).__name__
            raise ValueError(f"loss {name!r} must return its values and its state, {', '.join(loss.state)}, got {what}")
        for kept, value in returned[1].items():
            _require_number(name, kept, loss.state[kept], value)
        return returned

    return function


def _require_number(name: str, kept: str, start: float, value: Any) -> None:
    """Refuses what a loss keeps as something else than it started."""
    if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.ndim):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss {name!r} must keep numbers in its state, got {got} as {kept}")
    is_whole = not value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, Integral)
    if isinstance(start, int) and not is_whole:
        raise ValueError(
            f"loss {name!r}: {kept} starts as the whole number {start}, and came back as one that is not, {value};"
            f" register it with {float(start)}"
        )


def _modified(modifier: Modifier, function: Stateful, knobs: Mapping[str, Knob]) -> Stateful:
    """The modifier around the loss at one state; the state that the loss gives back goes past it."""
    modifier.function(lambda pairs: function(pairs, {})[0], **knobs)  # refuses its knobs before a run begins

    def modified(pairs: PairBatch, state: State) -> tuple[Tensor, State]:
        after: list[State] = []

        def at_state(given: PairBatch) -> Tensor:
            losses, behind = function(given, state)
            after.append(behind)
            return losses

        return modifier.function(at_state, **knobs)(pairs), after[0]

    return modified


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
        if MODIFIERS[name].needs_values_of_pairs and part.loss.scope == "window":
            raise ValueError(
                f"{knob} {value} acts on the value of each pair, and the values of loss {part.name!r} belong to its"
                " window"
            )
        if part.loss.unit != "pair" and not MODIFIERS[name].any_unit:
            raise ValueError(f"{knob} acts on pairs, and loss {part.name!r} gives each {part.loss.unit} a value")
        if not part.takes(knob):
            raise ValueError(f"loss {part.name!r} has no reference, and {knob} acts on the log-ratio to one")
        MODIFIERS[name].knobs.check(part.name, knob, value)
        modified.setdefault(name, {})[knob] = value
    return modified


def _mixture(parts: list[tuple[float, BoundLoss]]) -> BoundLoss:
    """The weighted sum of bound losses."""

    def total(batch: Batch, state: State) -> tuple[Tensor, State]:
        steps = [loss.step(batch, _of_part(index, state)) for index, (_, loss) in enumerate(parts)]
        losses = [weight * values for (weight, _), (values, _) in zip(parts, steps, strict=True)]
        return torch.stack(losses).sum(dim=0), _joined_states([after for _, after in steps])

    name = ",".join(f"{loss.name}:{weight:g}" for weight, loss in parts)
    with_reference = [loss for _, loss in parts if not loss.reference_free]
    first = (with_reference or [loss for _, loss in parts])[0]
    source = _joined([loss.source for _, loss in parts])
    scope: Scope = "window" if any(loss.scope == "window" for _, loss in parts) else "pair"
    return BoundLoss(
        name,
        total,
        {},
        not with_reference,
        first.reward_scale,
        source,
        parts=tuple(parts),
        scope=scope,
        state=_joined_states([loss.state for _, loss in parts]),
        unit="pair" if all(loss.unit == "pair" for _, loss in parts) else "prompt",
        needs=tuple(dict.fromkeys(need for _, loss in parts for need in loss.needs)),
    )


def _joined_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of the parts of a mixture, their names with the number of the part before them."""
    return {f"{index}.{name}": value for index, state in enumerate(states) for name, value in state.items()}


def _of_part(index: int, state: State) -> State:
    own = f"{index}."
    return {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}


def _joined(sources: list[str | None]) -> str | None:
    known = [source for source in sources if source is not None]
    return "\0".join(known) if len(known) == len(sources) else None
