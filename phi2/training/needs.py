"""What a loss asks of the rows: answers to compare, labels of both kinds, answers to imitate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phi2.data.encode import EncodedPreference
from phi2.losses.bound import BoundLoss
from phi2.losses.registry import PREFERENCE_LOSSES

LABELS = {0.0, 1.0}


def rows_for(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> list[EncodedPreference]:
    """The rows as the loss reads them: without gold answers where it needs none.

    Raises:
        ValueError: naming a row that the loss cannot be given.
    """
    if not rows:
        return []
    for part in parts_of(loss):
        if part.unit == "answer":
            _require_labels(part, rows)
        else:
            _require_comparison(part, rows)
    if "gold" in loss.needs:
        missing = next((row for row in rows if not row.has_gold), None)
        if missing is not None:
            raise ValueError(f"loss {loss.name!r} needs an answer to imitate, and {missing.origin} has no reference")
        return [*rows]
    return [_without_gold(row) if row.has_gold else row for row in rows]


def tell_unused(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    """Prints how many answers the loss leaves unused."""
    golden = 0 if "gold" in loss.needs else sum(row.has_gold for row in rows)
    if golden:
        print(f"loss {loss.name} does not use the answers to imitate of {golden} rows (column reference)")


def parts_of(loss: BoundLoss) -> list[BoundLoss]:
    """Those of a mixture; any other loss is its own part."""
    return [part for _, part in loss.parts] or [loss]


def _without_gold(row: EncodedPreference) -> EncodedPreference:
    return replace(row, answers=row.answers[:-1], scores=row.scores[:-1], has_gold=False)


def _require_comparison(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    alone = next((row for row in rows if len(row.answers) == 1), None)
    if alone is not None:
        others = ", ".join(name for name, each in PREFERENCE_LOSSES.items() if each.unit == "answer")
        raise ValueError(
            f"loss {loss.name!r} compares answers to one prompt, and {alone.origin} has one answer with a label: such"
            f" rows are for {others}"
        )


def _require_labels(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    scored = next((row for row in rows if not LABELS.issuperset(row.scores)), None)
    if scored is not None:
        told = ", ".join(f"{score:g}" for score in scored.scores)
        raise ValueError(
            f"loss {loss.name!r} needs pairs, or answers with a label, and the answers of {scored.origin} have scores,"
            f" {told}"
        )


def require_both_labels(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    """Refuses to train on answers that are all good, or all bad, with a loss that has a part of labels.

    Raises:
        ValueError: naming the file.
    """
    labels = {score for row in rows for score in row.scores}
    if len(labels) == 1 and any(part.unit == "answer" for part in parts_of(loss)):
        kind = "good" if labels == {1.0} else "bad"
        raise ValueError(f"loss {loss.name!r} needs good and bad answers, and all of {rows[0].origin.file} are {kind}")


def require_neighbours(loss: BoundLoss, rows_of_update: int) -> None:
    """Refuses updates of one row for a loss that sets answers behind other prompts."""
    if "mismatched" in loss.needs and rows_of_update == 1:
        raise ValueError(
            f"loss {loss.name!r} sets each prompt's answers behind another one: per_device_train_batch_size times"
            " gradient_accumulation_steps must be at least 2, got 1"
        )
