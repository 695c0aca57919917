"""The ledger of a preference run: what each evaluation found of each held-out pair, or answer with a label, as Parquet.

A list of answers has a row for every two of them of which one is better, and an answer with a label, which stands
alone, one whose other side is null: it is the chosen answer where it is good, else the rejected one.

    ledger/step-N.parquet        one file for each evaluation; together they are one table, for pandas or polars too

    step                                        update behind which it was
    pair, file, row                             the pair by a hash of its tokens, and where it came from
    s_w, s_l, r_w, r_l                          log-probs of chosen and rejected, of policy and reference, nats
    n_w, n_l                                    their tokens
    margin                                      (s_w - r_w) - (s_l - r_l); without a reference s_w - s_l
    margin_first, margin_last                   what of it lies in the first tokens, and in the last, of both answers
    loss, d_w, d_l                              of the run's loss, the list's where it is one, and its derivatives with
                                                respect to s_w and s_l
    weight                                      |d_w| + |d_l|, 1 on average: how much the pair pulls
    correct, was_correct                        the chosen reward above the rejected one, or above 0, that of the
                                                reference, where either stands alone; at the evaluation before
    column/NAME                                 columns of the data
    prompt, chosen, rejected                    texts
    {policy,ref}_{chosen,rejected}_logps        token by token
    {policy,ref}_gold_logps, NAME_{chosen,rejected}, mismatched/...
                                                likewise what else the run's loss needs: of the answer to imitate, a
                                                number of each token, answers behind other prompts

Every file is written whole or not at all. What a run without a reference does not have is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from phi2.files import one_line, whole_file

FOLDER, ABOUT = "ledger", b"phi2"  # in the folder of a run; key of the metadata in which a file tells of its evaluation
SIDES = ("chosen", "rejected")
COLUMN = "column/"  # before the names of columns of the data
MISMATCHED = "mismatched/"  # before the names of columns of answers behind other prompts
FIRST_TOKENS = 5  # of an answer: what `margin_first` counts
LOGPS = tuple(f"{model}_{side}_logps" for model in ("policy", "ref") for side in SIDES)
ROUNDING = 1e-3  # by how much of it the weight of a pair may differ in two of its rows
REQUIRED = ("pair", "file", "row", "s_w", "s_l")


@dataclass(frozen=True)
class Evaluation:
    """The rows of a ledger that one evaluation wrote.

    Attributes:
        path: its file.
        about: its step, and of the run: loss, knobs, the state of the loss, nll_weight; and unless all are pairs, of
            each prompt the scores of its answers.
    """

    path: Path
    about: Mapping[str, Any]
    table: pyarrow.Table

    def __repr__(self) -> str:
        return f"Evaluation({str(self.path)!r}, {len(self)} rows behind update {self.step})"

    @property
    def step(self) -> int:
        return int(self.about["step"])

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: object) -> bool:
        """Whether there is such a column, and anything in it."""
        return name in self.table.column_names and self.table[name].null_count < len(self)

    def __getitem__(self, name: str) -> np.ndarray:
        """(pairs,) of a column; a null among numbers is NaN, any other None."""
        if name not in self.table.column_names:
            raise ValueError(f"{self.path} has no column {name!r}; there are {', '.join(self.table.column_names)}")
        return self.table[name].to_numpy()

    def tokens(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a column of lists: their (N,) numbers one behind the other, and the (pairs,) lengths, 0 of a null."""
        lists = self.table[name].combine_chunks()
        return lists.flatten().to_numpy(), lists.value_lengths().fill_null(0).to_numpy()

    @cached_property
    def origins(self) -> list[str]:
        """Where each pair came from."""
        return [f"{file} row {row}" for file, row in zip(self["file"], self["row"], strict=True)]

    def write_weights(self, path: str | os.PathLike[str], weights: np.ndarray) -> None:
        """Writes a file for `weights_from`: (pairs,) weights, by the pairs' names.

        Raises:
            ValueError: for another shape, a weight that is no number from 0 on, and a pair that has two.
        """
        if np.shape(weights) != (len(self),):
            raise ValueError(f"weights must have shape ({len(self)},), one for each pair, got {np.shape(weights)}")
        known = weights_by_name("weights", self.table["pair"].to_pylist(), np.asarray(weights, dtype=np.float64))
        with whole_file(Path(path)) as unfinished:
            columns = {"pair": [*known], "weight": [*known.values()]}
            pyarrow.parquet.write_table(pyarrow.table(columns), unfinished, write_page_checksum=True)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the data."""
        return [name.removeprefix(COLUMN) for name in self.table.column_names if name.startswith(COLUMN)]


def weights_by_name(told: str, names: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """Weights by the names of the pairs; one that is there several times has one weight, but for rounding.

    Args:
        told: what they are of, for the error.
    Raises:
        ValueError: naming the row of a weight that is no number from 0 on, or another one for the same pair.
    """
    is_weight = np.isfinite(weights) & (weights >= 0) if weights.dtype.kind in "if" else np.zeros(len(weights), bool)
    if not is_weight.all():
        row = int(np.flatnonzero(~is_weight)[0])
        raise ValueError(f"{told} row {row + 1}: a weight is a number from 0 on, got {weights[row]}")
    known: dict[str, float] = {}
    for row, (name, weight) in enumerate(zip(names, weights.tolist(), strict=True)):
        if not np.isclose(known.setdefault(name, weight), weight, rtol=ROUNDING):
            raise ValueError(f"{told} row {row + 1}: pair {name} weighs {weight:g} there and {known[name]:g} above it")
    return known


class Ledger:
    """The evaluations of a run, pair by pair.

    Args:
        path: folder of the run, of its ledger, or one file of that.

    Raises:
        FileNotFoundError: when there is no such folder or file.
        ValueError: when it holds no ledger.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        if self.path.is_dir():
            self.files = ledger_files(self.path) or (ledger_files(self.path.parent) if self.path.name == FOLDER else {})
        else:
            self.files = {read_evaluation(self.path).step: self.path}
        if not self.files:
            raise ValueError(f"{self.path} holds no ledger: {_where_one_is(self.path)}")

    @property
    def steps(self) -> list[int]:
        """Of its evaluations."""
        return list(self.files)

    def at(self, step: int | str = "last") -> Evaluation:
        """One of the evaluations.

        Raises:
            ValueError: when there is none behind that update, or its file is damaged.
        """
        steps = self.steps
        wanted = steps[-1] if step == "last" else int(step) if str(step).isdigit() else None
        if wanted not in self.files:
            raise ValueError(f"{self.path}: evaluation must be last or one of {_listed(steps)}, got {step!r}")
        return read_evaluation(self.files[wanted])

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}, steps {_listed(self.steps)})"


def _where_one_is(folder: Path) -> str:
    if (folder / "cells").is_dir():
        return "those of a comparison are in its runs, cells/VARIANT/SEED"
    return (
        "a preference run writes one at its evaluations of pairs (eval_data or test_fraction), unless ledger is false"
    )


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]]))


def ledger_files(run: Path) -> dict[int, Path]:
    """The files of its ledger by the steps of their evaluations, in their order."""
    named = ((path.stem.removeprefix("step-"), path) for path in (run / FOLDER).glob("step-*.parquet"))
    return dict(sorted((int(step), path) for step, path in named if step.isdigit()))


def file_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step}.parquet"


def drop_behind(run: Path, step: int) -> None:
    """Removes what an interrupted run wrote behind the update at which it goes on: it will be made again."""
    for later, path in ledger_files(run).items():
        if later > step:
            path.unlink()


def write_evaluation(path: Path, about: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Writes a file of a ledger, whole or not at all."""
    table = pyarrow.table(dict(columns)).replace_schema_metadata({ABOUT: json.dumps(about)})
    path.parent.mkdir(exist_ok=True)
    tokens = token_columns(table.schema)
    others, lists = [name for name in columns if name not in tokens], [f"{name}.list.element" for name in tokens]
    with whole_file(path) as unfinished:  # log-probs do not repeat: a dictionary of them would be larger than they are
        pyarrow.parquet.write_table(
            table,
            unfinished,
            compression="zstd",
            use_dictionary=others,
            use_byte_stream_split=lists,
            write_page_checksum=True,
        )


def read_evaluation(path: Path, with_tokens: bool = True) -> Evaluation:
    """Reads one, whole or without what it has token by token.

    Raises:
        ValueError: naming the file, when it is damaged or no file of a ledger.
    """
    table = read_table(path, None if with_tokens else _without_tokens(path))
    missing = [name for name in (*REQUIRED, *(LOGPS if with_tokens else ())) if name not in table.column_names]
    about = json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))
    if missing or "step" not in about:
        raise ValueError(f"{path}: no file of a ledger, it has no {', '.join(missing) or 'account of its run'}")
    return Evaluation(path, about, table)


def read_table(path: Path, columns: list[str] | None = None) -> pyarrow.Table:
    """A Parquet file.

    Raises:
        ValueError: naming the file, when it cannot be read.
    """
    with _named(path):
        return pyarrow.parquet.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)


def _without_tokens(path: Path) -> list[str]:
    """Names of the columns that are one value a row."""
    schema = schema_of(path)
    tokens = token_columns(schema)
    return [name for name in schema.names if name not in tokens]


def token_columns(schema: pyarrow.Schema) -> list[str]:
    """Names of the columns that are a list a row."""
    return [field.name for field in schema if pyarrow.types.is_list(field.type)]


def schema_of(path: Path) -> pyarrow.Schema:
    """The columns of a Parquet file; raises what `read_table` raises."""
    with _named(path):
        return pyarrow.parquet.read_schema(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged, or not Parquet ({one_line(error)[:200]})") from error
