"""Weights of training pairs from a ledger, or a Parquet file of one's own: a column for `weight_column` to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from phi2.data.encoded import EncodedPreference
from phi2.data.flat import FlatPreferences, flat_rows
from phi2.runs.ledger import Ledger, read_table, weights_by_name
from phi2.training.config import WEIGHTS, PreferenceConfig
from phi2.training.ledger import comparisons_of, name_of


def with_weights(
    config: PreferenceConfig, rows: Sequence[EncodedPreference], eval_rows: Sequence[EncodedPreference]
) -> tuple[FlatPreferences, FlatPreferences]:
    """Both with the weights that `weights_from` asks for as a column; every held-out row weighs 1.

    Raises:
        ValueError: when a training row has no weight there, or is a list, which has several.
    """
    if config.weights_from is None:
        return flat_rows(rows, "preference"), flat_rows(eval_rows, "preference")
    path, names = Path(config.weights_from), [_name_of(row) for row in rows]
    known = weights_in(path)
    missing = [row for row, name in zip(rows, names, strict=True) if name not in known]
    if missing:
        raise ValueError(
            f"weights_from {path} knows {len(rows) - len(missing)} of the {len(rows)} training rows, and not"
            f" {missing[0].origin}: is it of other data, or were these tokenised or cut in another way?"
        )
    weighted = [_with_weight(row, known[name]) for row, name in zip(rows, names, strict=True)]
    held_out = [_with_weight(row, 1.0) for row in eval_rows]
    return flat_rows(weighted, "preference"), flat_rows(held_out, "preference")


def _name_of(row: EncodedPreference) -> str:
    first, *others = comparisons_of(row)
    if others:
        count = len(row.answers) - row.has_gold
        raise ValueError(f"weights_from weighs pairs and answers with a label, and {row.origin} has {count} answers")
    return name_of(row, first)


def _with_weight(row: EncodedPreference, weight: float) -> EncodedPreference:
    return replace(row, columns={**row.columns, WEIGHTS: weight})


def weights_in(path: Path) -> dict[str, float]:
    """By the names of pairs their weights: of the last evaluation in a ledger, or of a Parquet file.

    Raises:
        ValueError: for a file without both columns, a weight that is no number from 0 on, and a pair that has two.
        FileNotFoundError: when there is no such file or folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"weights_from {path}: no such file or folder")
    file = [*Ledger(path).files.values()][-1] if path.is_dir() else path
    table = read_table(file)
    for column in ("pair", "weight"):
        if column not in table.column_names:
            raise ValueError(f"weights_from {file} has no column {column!r}; there are {', '.join(table.column_names)}")
    return weights_by_name(f"weights_from {file}", table["pair"].to_pylist(), table["weight"].to_numpy())
