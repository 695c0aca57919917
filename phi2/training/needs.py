"""What a loss asks of the rows: answers to compare, labels of both kinds, answers to imitate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phi2.data.encoded import EncodedPreference
from phi2.data.flat import FlatPreferences, flat_rows
from phi2.losses.bound import BoundLoss
from phi2.losses.registry import PREFERENCE_LOSSES

LABELS = {0.0, 1.0}


def rows_for(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> FlatPreferences:
    """The rows as the loss reads them: without gold answers where it needs none.

    Raises:
        ValueError: naming a row that the loss cannot be given.
    """
    flat = flat_rows(rows, "preference")
    if not flat:
        return flat
    for part in loss.single:
        if part.unit == "answer":
            _require_labels(part, flat)
        else:
            _require_comparison(part, flat)
    golden = flat.table["gold"]
    if "gold" in loss.needs:
        if not golden.all():
            origin = flat[int(golden.argmin())].origin
            raise ValueError(f"loss {loss.name!r} needs an answer to imitate, and {origin} has no reference")
        return flat
    return flat.without_gold() if golden.any() else flat


def tell_unused(loss: BoundLoss, *data: Sequence[EncodedPreference]) -> None:
    """Prints how many answers the loss leaves unused."""
    golden = sum(int(flat_rows(rows, "preference").table["gold"].sum()) for rows in data)
    if golden and "gold" not in loss.needs:
        print(f"loss {loss.name} does not use the answers to imitate of {golden} rows (column reference)")


def _require_comparison(loss: BoundLoss, rows: FlatPreferences) -> None:
    alone = rows.table["answers"] == 1
    if alone.any():
        others = ", ".join(name for name, each in PREFERENCE_LOSSES.items() if each.unit == "answer")
        raise ValueError(
            f"loss {loss.name!r} compares answers to one prompt, and {rows[int(alone.argmax())].origin} has one answer"
            f" with a label: such rows are for {others}"
        )


def _require_labels(loss: BoundLoss, rows: FlatPreferences) -> None:
    if not labels_in(rows) <= LABELS:
        scored = next(row for row in rows if not LABELS.issuperset(row.scores))
        told = ", ".join(f"{score:g}" for score in scored.scores)
        raise ValueError(
            f"loss {loss.name!r} needs pairs, or answers with a label, and the answers of {scored.origin} have scores,"
            f" {told}"
        )


def labels_in(rows: FlatPreferences) -> set[float]:
    """All scores that answers have."""
    return {*np.unique(rows.scores_of_answers).tolist()}


def require_both_labels(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    """Refuses to train on answers that are all good, or all bad, with a loss that has a part of labels.

    Raises:
        ValueError: naming the file.
    """
    labels = labels_in(flat_rows(rows, "preference"))
    if len(labels) == 1 and any(part.unit == "answer" for part in loss.single):
        kind = "good" if labels == {1.0} else "bad"
        raise ValueError(f"loss {loss.name!r} needs good and bad answers, and all of {rows[0].origin.file} are {kind}")


def require_neighbours(loss: BoundLoss, rows_of_update: int) -> None:
    """Refuses updates of one row for a loss that sets answers behind other prompts."""
    if "mismatched" in loss.needs and rows_of_update == 1:
        raise ValueError(
            f"loss {loss.name!r} sets each prompt's answers behind another one: per_device_train_batch_size times"
            " gradient_accumulation_steps must be at least 2, got 1"
        )
