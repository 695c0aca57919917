"""The first look at a preference loss, before anything large is loaded: on rows of the run, with made-up log-probs.

A loss that keeps a state which it was not registered with, draws random numbers or works in place is refused. One that
gives a pair another value when other pairs stand beside it must say so, `scope="window"`: otherwise it would see a part
of an update's pairs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi2.data.encode import EncodedPair
from phi2.losses.batch import PairBatch
from phi2.losses.bound import BoundLoss
from phi2.losses.knobs import told
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.properties import made_up_pairs, require_pure, uses_batch
from phi2.training.pairs import column_gaps, numeric_columns

SPREAD, CANDIDATES = 8, 1024  # pairs over the whole data set that are looked at, and among which columns are


def look_at_loss(loss: BoundLoss, pairs: Sequence[EncodedPair], eval_pairs: Sequence[EncodedPair]) -> None:
    """Refuses a loss that would train on something else than it says.

    Raises:
        ValueError: when the loss is not pure, when it reads a column that is not a number in every row, when a modifier
            leaves it as it is, or when a pair's value depends on other pairs and the loss does not say so.
    """
    gaps = column_gaps([*pairs, *eval_pairs])
    shown = shown_pairs(varied(pairs, gaps), gaps, loss.reference_free)
    require_pure(loss, shown)
    for part in [part for _, part in loss.parts] or [loss]:
        require_effect(part, shown)
        if part.scope == "pair" and uses_batch(part, shown):
            raise ValueError(
                f"loss {part.name!r} gives a pair another value when other pairs stand beside it: register it with"
                ' scope="window", and it is given all pairs of an update'
            )


def require_effect(loss: BoundLoss, pairs: PairBatch) -> None:
    """Refuses a modifier that changes nothing which the loss reads, and one beside which a knob changes nothing."""
    for name in loss.modifiers:
        modifier, plain = MODIFIERS[name], loss.without(name)
        given = {knob: loss.knobs[knob] for knob in modifier.knobs.defaults}
        changed = {knob: value for knob, value in given.items() if value != modifier.knobs.defaults[knob]}
        if not modifier.may_miss:
            continue
        if changed and torch.allclose(loss(pairs), plain(pairs)):
            raise ValueError(f"{told(changed)} changes nothing in loss {loss.name!r}, which reads nothing it acts on")
        for knob in plain.knobs:
            if acts(plain, knob, pairs) and not acts(loss, knob, pairs):
                raise ValueError(f"{knob} of loss {loss.name!r} changes nothing beside {told(given)}")


def acts(loss: BoundLoss, knob: str, pairs: PairBatch) -> bool:
    """Whether a number among a loss's knobs has an effect on these pairs."""
    value = loss.number(knob)
    return value is not None and not torch.equal(loss(pairs), loss.with_knob(knob, 0.5 * value)(pairs))


def varied(pairs: Sequence[EncodedPair], gaps: dict[str, str]) -> list[EncodedPair]:
    """Pairs from the whole data set, among them the lowest and the highest of each column of numbers."""
    candidates = pairs[:: max(1, len(pairs) // CANDIDATES)]
    spread = candidates[:: max(1, len(candidates) // SPREAD)][:SPREAD]
    names = [name for name in pairs[0].columns if name not in gaps]
    by = [lambda pair, name=name: pair.columns[name] for name in names]
    ends = [end(candidates, key=key) for key in by for end in (min, max)]
    return list({id(pair): pair for pair in (*spread, *ends)}.values())


def shown_pairs(pairs: Sequence[EncodedPair], gaps: dict[str, str], reference_free: bool) -> PairBatch:
    """What a loss is shown of them: their lengths and columns, and made-up log-probabilities."""
    chosen, rejected = ([len(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return made_up_pairs(chosen, rejected, numeric_columns(pairs, gaps, torch.device("cpu")), reference_free)
