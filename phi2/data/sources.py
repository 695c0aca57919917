"""Where rows come from: files, folders, hub data sets and named sources, mixed into one list of records.

`load_records` is the way in. Each part of a mixture is a `DataSpec`, and its rows go through the same steps in the same
order: read in file order; the named source's filter; `max_tokens`; `subsample`; parse; shuffle; take the first `rows`.
These are the steps of `datasets` (`filter`, `shuffle(seed)`, `select`), and they pick the same rows for the same seeds.
A row that does not parse keeps its place until the last step, so that one bad row does not change which others are
picked, and is dropped then. What was dropped is counted by rule; a source of which nothing is left is an error.

Rows are filtered and parsed while they stream: no file is ever held in memory as a whole, only its records are.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from phi2 import hub
from phi2.data.audit import Audit
from phi2.data.columns import IGNORED
from phi2.data.config import DataSpec, Subsample
from phi2.data.files import folder_files, one_of, read_rows, suffix_of
from phi2.data.formats import FORMATS, detect_format, parse_row
from phi2.data.records import KINDS, Origin, Record, Row, RowError

HUB_PARQUET = "refs/convert/parquet"  # the branch where the hub keeps every public data set as parquet


@dataclass(frozen=True)
class Source:
    """A data set known by name, with the filter that people apply to it."""

    hub_id: str
    """Data set on the hub, owner/name."""
    format: str
    """Layout of its rows, a name in `formats.FORMATS`."""
    splits: tuple[str, ...] = ("train",)
    """Its splits; the first is the default."""
    drop: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict)
    """Rule -> whether it drops the row."""


def _below(row: Row, column: str, least: float) -> bool:
    value = row.get(column)
    return not (isinstance(value, int | float) and value >= least)


SOURCES = {
    # a million conversations, mostly written by GPT-4: what Phi-2-instruct was tuned on
    "OpenHermes-2.5": Source("teknium/OpenHermes-2.5", "conversations"),
    # 384 thousand short conversations of OpenHermes-2.5, with their lengths in Phi-2 tokens
    "OpenHermes-SLM-384k": Source("rasyosef/OpenHermes-SLM-384k", "messages"),
    # 61 thousand pairs of answers that GPT-4 scored, without ties
    "ultrafeedback_binarized": Source(
        "HuggingFaceH4/ultrafeedback_binarized",
        "prompt-pair",
        splits=("train_prefs", "test_prefs"),
        drop={"tie": lambda row: row.get("score_chosen") == row.get("score_rejected")},
    ),
    # 13 thousand Orca pairs, without ties, rows of GSM8K's training set and chosen answers scored below 8
    "distilabel-intel-orca-dpo-pairs": Source(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "orca-pair",
        drop={
            "tie": lambda row: row.get("status") == "tie",
            "low-score": lambda row: _below(row, "chosen_score", 8),
            "in-gsm8k": lambda row: bool(row.get("in_gsm8k_train")),
        },
    ),
    # 2.4 thousand pairs of answers to mathematical questions
    "distilabel-math-preference-dpo": Source("argilla/distilabel-math-preference-dpo", "math-pair"),
    # the three sets above in one, as ChatML text with token counts: what Phi-2-instruct was aligned on
    "ultrafeedback-orca-math-dpo": Source(
        "rasyosef/ultrafeedback-orca-math-dpo",
        "prompt-pair",
        splits=("train", "test"),
    ),
}
TOYS = {  # name -> (what phi2.data.toy calls it, the kind of its records)
    "toy-pretrain": ("pretrain", "supervised"),
    "toy-sft": ("sft", "supervised"),
    "toy-dpo": ("dpo", "preference"),
}
TOKEN_COLUMNS = {  # kind -> sums of columns, each of which `max_tokens` bounds
    "supervised": (("phi_token_count",),),
    "preference": (("prompt_length", "chosen_length"), ("prompt_length", "rejected_length")),
}


class Loaded(NamedTuple):
    """What `load_records` gives: the records, and the count of what was left out, to be merged into the run's audit.

    Columns are counted in every row that could be read, also in those that a shuffle did not pick.
    """

    records: list[Record]
    dropped: Audit


class OtherKind(ValueError):
    """A named source of rows of another kind."""


class NoUsableRow(ValueError):
    """A source of which nothing is left; `rules` dropped its rows."""

    def __init__(self, message: str, rules: Iterable[str]):
        super().__init__(message)
        self.rules = frozenset(rules)


def load_records(data: str | DataSpec | Iterable[Any], kind: str, ignore_columns: Iterable[str] = ()) -> Loaded:
    """Reads a mixture of sources, one after the other.

    Args:
        data: sources separated by commas; or a list whose elements are sources, `DataSpec`s or dicts of a DataSpec's
            fields; or any iterable of rows (dicts), such as a `datasets.Dataset`, which may also stand in the list.
        kind: what the records are for: "supervised" (gives Chat and Plain), or "preference" (Preference).
        ignore_columns: columns, and keys of messages, that are left out. Whether there were any is for the caller to
            ask (`require_ignored`), who may have several parts that need not all have them.

    Raises:
        FileNotFoundError: for a source that is no file, no folder, no name and no hub id.
        ValueError: for a file that cannot be read through, and for a source without one usable row (`NoUsableRow`).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    loaded = Loaded([], Audit())
    specs = specs_of(data)
    if not specs:
        raise ValueError("data must have at least one source, got none")
    for spec in specs:
        part = _load(spec, kind, frozenset(ignore_columns).union(spec.ignore_columns))
        require_ignored(spec.ignore_columns, part.dropped)
        loaded.records.extend(part.records)
        loaded.dropped.merge(part.dropped)
    return loaded


def require_ignored(names: Iterable[str], *audits: Audit) -> None:
    """Refuses names of `ignore_columns` that nothing was ignored by, such as misspelled ones.

    Raises:
        ValueError: naming them and what there is.
    """
    seen = [name for audit in audits for name in audit.columns[IGNORED]]
    unused = [name for name in names if not any(one == name or one.endswith(f".{name}") for one in seen)]
    if unused:
        others = sorted({name for audit in audits for rows_of in audit.columns.values() for name in rows_of})
        several = "; several are given as [a, b]" if any("," in name for name in unused) else ""
        raise ValueError(
            f"ignore_columns: no row has anything in {', '.join(map(repr, unused))}{several}; what the rows have"
            f" besides what is read: {', '.join(others)[:300] or 'nothing'}"
        )


def split_records(records: list[Record], test_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Train and test part, the same rows in the same order as `datasets` gives.

    Source: huggingface/datasets `Dataset.train_test_split(test_size=test_fraction, seed=seed)`.

    Raises:
        ValueError: if the fraction is not between 0 and 1, or leaves one part empty.
    """
    test = math.ceil(test_fraction * len(records))
    if not (0 < test_fraction < 1 and 0 < test < len(records)):
        raise ValueError(f"test_fraction must leave both parts of {len(records)} rows some, got {test_fraction}")
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in order[test:]], [records[i] for i in order[:test]]


def specs_of(data: Any) -> list[DataSpec]:
    """The parts of a mixture."""
    if isinstance(data, str):
        return [DataSpec(name.strip()) for name in data.split(",")]
    if isinstance(data, list | tuple) and not (data and _is_row(data[0])):
        return [_spec(part) for part in data]
    return [_spec(data)]


def names_of(data: Any) -> list[str]:
    """What the parts of a mixture are called; rows have no name of their own."""
    return [spec.label for spec in specs_of(data)]


def _spec(part: Any) -> DataSpec:
    if isinstance(part, DataSpec):
        return part
    if isinstance(part, str | os.PathLike):
        return DataSpec(os.fspath(part))
    if isinstance(part, Mapping):
        return _spec_of_fields(dict(part))
    if hasattr(part, "iloc"):  # going over it gives the names of its columns
        raise ValueError("data must be a source, a DataSpec or rows; the rows of a table are its to_dict('records')")
    if not isinstance(part, Iterable):
        raise ValueError(f"data must be a source, a DataSpec or rows, got {type(part).__name__}")
    return DataSpec(part)


def _spec_of_fields(values: dict[str, Any]) -> DataSpec:
    try:
        if isinstance(values.get("subsample"), Mapping):
            values["subsample"] = Subsample(**values["subsample"])
        return DataSpec(**values)
    except TypeError as error:  # an unknown or missing field, or a value of a type that cannot be compared
        known = ", ".join(f.name for f in fields(DataSpec))
        raise ValueError(f"data source {str(values)[:200]}: {error}; fields are {known}") from error


def _is_row(value: Any) -> bool:
    """Whether a dict is a row of data; the other dicts in a list are the fields of a DataSpec."""
    if not isinstance(value, Mapping) or "source" not in value:
        return isinstance(value, Mapping)
    try:
        return bool(detect_format(value))
    except ValueError:
        return False


def _load(spec: DataSpec, kind: str, ignore: frozenset[str]) -> Loaded:
    dropped = Audit()
    parsed = _toy_records(spec, kind) if spec.label in TOYS else _parsed_rows(spec, kind, ignore, dropped)
    taken = list(parsed if spec.rows is None or spec.shuffle_seed is not None else islice(parsed, spec.rows))
    if spec.rows is not None and len(taken) < spec.rows:
        raise ValueError(
            f"{spec.label}: rows must be at most {len(taken)}, all there are after filtering, got {spec.rows}"
        )
    if spec.shuffle_seed is not None:
        order = np.random.default_rng(spec.shuffle_seed).permutation(len(taken))
        taken = [taken[i] for i in order[: spec.rows]]
    records = [record for record in taken if record is not None]
    if not records:
        rules = "; ".join(f"{rule} {some.rows}x, first {some.reason}" for rule, some in dropped.dropped.items())
        message = f"{spec.label}: no usable row among {dropped.rows}: {rules or 'it is empty'}"
        raise NoUsableRow(message, dropped.dropped)
    return Loaded(records, dropped)


def _parsed_rows(spec: DataSpec, kind: str, ignore: frozenset[str], dropped: Audit) -> Iterator[Record | None]:
    """The records of one source in file order, None for each row that passed the filters and did not parse."""
    source = SOURCES.get(spec.label)
    rules, filtered_by = _filters(spec, source, kind), _columns_of_filters(spec, kind)
    rows = tqdm(_rows(spec, kind), desc=spec.label, unit=" rows", delay=2, disable=None, leave=False)
    for origin, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{origin}: a row must be an object, got {type(row).__name__}")
        rule = next((rule for rule, drops in rules.items() if drops(row)), None)
        if rule is not None:
            dropped.drop(RowError(origin, rule, "filtered out"))
            continue
        column_status: dict[str, str] = {}
        try:
            record = parse_row(row, origin, source.format if source else None, kind, ignore, column_status)
            dropped.count_columns({name: status for name, status in column_status.items() if name not in filtered_by})
        except RowError as error:
            dropped.drop(error)
            record = None
        yield record


def _toy_records(spec: DataSpec, kind: str) -> list[Record]:
    from phi2.data.toy import skills

    name, toy_kind = TOYS[spec.label]
    _require_kind(spec, toy_kind, kind)
    if spec.max_tokens is not None or spec.subsample is not None:
        raise ValueError(f"{spec.label} has no columns for max_tokens or subsample to read")
    return skills.records(name, spec.split or "train")


def _filters(spec: DataSpec, source: Source | None, kind: str) -> dict[str, Callable[[Row], bool]]:
    """Rule -> whether it drops a row, in the order in which a row meets them."""
    rules = dict(source.drop) if source else {}
    if spec.max_tokens is not None:
        rules["too-long"] = lambda row: _too_long(row, spec, kind)
    if spec.subsample is not None:
        rules["subsample"] = _subsampler(spec.subsample)
    return rules


def _columns_of_filters(spec: DataSpec, kind: str) -> set[str]:
    """The columns that these filters read, whatever the format does with them."""
    counts = TOKEN_COLUMNS[kind] if spec.max_tokens is not None else ()
    thinned = spec.subsample is not None and spec.subsample.source_dataset is not None
    return {column for columns in counts for column in columns} | ({"source_dataset"} if thinned else set())


def _too_long(row: Row, spec: DataSpec, kind: str) -> bool:
    sums = TOKEN_COLUMNS[kind]
    try:
        return any(sum(row[column] for column in columns) >= spec.max_tokens for columns in sums)
    except (KeyError, TypeError):
        needed = " and ".join("+".join(columns) for columns in sums)
        raise ValueError(f"{spec.label}: max_tokens needs columns of numbers {needed}, got {list(row)[:20]}") from None


def _subsampler(subsample: Subsample) -> Callable[[Row], bool]:
    draw, value = random.Random(subsample.seed).random, subsample.source_dataset
    return lambda row: (value is None or row.get("source_dataset") == value) and draw() > subsample.fraction


def _rows(spec: DataSpec, kind: str | None = None) -> Iterator[tuple[Origin, Any]]:
    """The rows of a source in order, each with where it came from."""
    if not isinstance(spec.source, str):
        return _memory_rows(spec)
    return chain.from_iterable(starmap(read_rows, files_of(spec, kind)))


def files_of(spec: DataSpec, kind: str | None = None) -> list[tuple[Path, str]]:
    """The files that a source is read from, each with what to call it in origins.

    Args:
        kind: what the rows are needed for; None means anything.

    Raises:
        FileNotFoundError: for a source that is no file, no folder, no name and no hub id.
        ValueError: for a named source of another kind, and a split that is not there.
    """
    assert isinstance(spec.source, str)
    source = SOURCES.get(spec.source)
    if source:
        _require_kind(spec, FORMATS[source.format].kind, kind)
        return _hub_files(source.hub_id, "", one_of("split", spec.split or source.splits[0], source.splits))
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return folder_files(path, spec.split, str(path))
    if path.exists() or suffix_of(path.name):
        if spec.split is not None:
            raise ValueError(f"{spec.source}: split {spec.split!r} is for folders and data sets, and this is a file")
        return [(path, spec.source)]
    owner, name, config = (*spec.source.split("/", maxsplit=2), "", "")[:3]
    if not hub.HUB_ID.fullmatch(f"{owner}/{name}"):
        names = ", ".join([*SOURCES, *TOYS])
        raise FileNotFoundError(f"{spec.source}: no such file or folder, not a hub id, and no name among {names}")
    return _hub_files(f"{owner}/{name}", config, spec.split)


def raw_rows(source: str) -> Iterator[tuple[Origin, Any]]:
    """The rows of one source, streamed as they are: what a named source would filter is among them.

    Raises:
        FileNotFoundError: for a source that is no file, no folder, no name and no hub id.
        ValueError: for a file that cannot be read, and, while it streams, for one that cannot be read on.
    """
    return _rows(DataSpec(source))


def _memory_rows(spec: DataSpec) -> Iterator[tuple[Origin, Any]]:
    if spec.split is not None:
        raise ValueError(f"split {spec.split!r} is for folders and data sets: pass the rows of that split")
    for number, row in enumerate(spec.source, start=1):
        yield Origin(spec.label, number), row


def _require_kind(spec: DataSpec, held: str, needed: str | None) -> None:
    if needed not in (None, held):
        raise OtherKind(f"{spec.label} holds {held} rows, and {needed} rows are needed")


def _hub_files(hub_id: str, config: str, split: str | None) -> list[tuple[Path, str]]:
    """Files of the hub's parquet conversion of a data set; without one (private sets), of its own files."""
    try:
        folder = hub.resolve(hub_id, HUB_PARQUET, kind="dataset")
    except ValueError:
        folder = hub.resolve(hub_id, kind="dataset")
    return folder_files(folder / config, split, f"{hub_id}/{config}".rstrip("/"))
