"""Where rows come from: files, folders, hub data sets and named sources, mixed into one list of records.

`load_records` is the way in. Each part of a mixture is a `DataSpec`, and its rows go through the same steps in the same
order: read in file order; the named source's filter; `max_tokens`; `subsample`; parse; shuffle; take the first `rows`.
These are the steps of `datasets` (`filter`, `shuffle(seed)`, `select`), and they pick the same rows for the same seeds.
A row that does not parse keeps its place until the last step, so that one bad row does not change which others are
picked, and is dropped then. What was dropped is counted by rule; a source of which nothing is left is an error.

Rows are filtered and parsed while they stream: no file is ever held in memory as a whole, only its records are.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from phi2 import hub
from phi2.data.audit import Audit
from phi2.data.records import FORMATS, KINDS, Origin, Record, Row, RowError, detect_format, parse_row

CHUNK = 1 << 20  # characters read at a time from a JSON array
MAX_ELEMENT = 64 << 20  # characters one row of a JSON array may have: broken JSON is found out before memory is full
FIRST_START, NEXT_START, ARRAY_END = re.compile(r"\s*(?={)"), re.compile(r"\s*,\s*(?={)"), re.compile(r"\s*]")
HUB_PARQUET = "refs/convert/parquet"  # the branch where the hub keeps every public data set as parquet


@dataclass(frozen=True)
class Source:
    """A data set known by name, with the filter that people apply to it."""

    hub_id: str
    """Data set on the hub, owner/name."""
    doc: str
    """One sentence for help texts."""
    format: str
    """Layout of its rows, a name in `records.FORMATS`."""
    splits: tuple[str, ...] = ("train",)
    """Its splits; the first is the default."""
    drop: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict)
    """Rule -> whether it drops the row."""


def _below(row: Row, column: str, least: float) -> bool:
    value = row.get(column)
    return not (isinstance(value, int | float) and value >= least)


SOURCES = {
    "OpenHermes-2.5": Source(
        "teknium/OpenHermes-2.5",
        "A million conversations, mostly written by GPT-4: what Phi-2-instruct was tuned on.",
        "conversations",
    ),
    "OpenHermes-SLM-384k": Source(
        "rasyosef/OpenHermes-SLM-384k",
        "384 thousand short conversations of OpenHermes-2.5, with their lengths in Phi-2 tokens.",
        "messages",
    ),
    "ultrafeedback_binarized": Source(
        "HuggingFaceH4/ultrafeedback_binarized",
        "61 thousand pairs of answers that GPT-4 scored, without ties.",
        "prompt-pair",
        splits=("train_prefs", "test_prefs"),
        drop={"tie": lambda row: row.get("score_chosen") == row.get("score_rejected")},
    ),
    "distilabel-intel-orca-dpo-pairs": Source(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "13 thousand Orca pairs, without ties, rows of GSM8K's training set and chosen answers scored below 8.",
        "orca-pair",
        drop={
            "tie": lambda row: row.get("status") == "tie",
            "low-score": lambda row: _below(row, "chosen_score", 8),
            "in-gsm8k": lambda row: bool(row.get("in_gsm8k_train")),
        },
    ),
    "distilabel-math-preference-dpo": Source(
        "argilla/distilabel-math-preference-dpo",
        "2.4 thousand pairs of answers to mathematical questions.",
        "math-pair",
    ),
    "ultrafeedback-orca-math-dpo": Source(
        "rasyosef/ultrafeedback-orca-math-dpo",
        "The three sets above in one, as ChatML text with token counts: what Phi-2-instruct was aligned on.",
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
    "unpaired": (("phi_token_count",),),
    "preference": (("prompt_length", "chosen_length"), ("prompt_length", "rejected_length")),
}


@dataclass(frozen=True)
class Subsample:
    """Keep a random part of the rows."""

    fraction: float
    """Part of the rows to keep, above 0 and up to 1. For each matching row that reaches this step, in file order, one
    number is drawn from `random.Random(seed)`, and the row stays if it is not above the fraction. Others draw none."""
    source_dataset: str | None = None
    """Only rows with this value in their column source_dataset are thinned out; unset, all rows are."""
    seed: int = 42
    """Seed of the draws."""

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"subsample.fraction must be above 0 and at most 1, got {self.fraction}")


@dataclass(frozen=True)
class DataSpec:
    """One part of a mixture: a source, and which of its rows to take."""

    source: str | Iterable[dict]
    """File, folder, named source, or hub data set (owner/name or owner/name/configuration); in Python also rows."""
    split: str | None = None
    """Split of a folder or data set; unset, its train split, or all its files if they are not named after splits."""
    max_tokens: int | None = None
    """Keep rows below this many tokens by the data set's own count: phi_token_count, or for pairs prompt_length plus
    chosen_length and plus rejected_length."""
    subsample: Subsample | None = None
    """Keep a random part of the rows."""
    shuffle_seed: int | None = None
    """Shuffle with this seed; unset, rows stay in file order."""
    rows: int | None = None
    """Take this many rows, the first ones after the shuffle; unset, all of them."""

    def __post_init__(self):
        if self.source == "":
            raise ValueError("a data source must have a name, got ''")
        for name in ("max_tokens", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        return self.source if isinstance(self.source, str) else "data"


class Loaded(NamedTuple):
    """What `load_records` gives: the records, and the count of what was left out, to be merged into the run's audit."""

    records: list[Record]
    dropped: Audit


def load_records(data: str | DataSpec | Iterable[Any], kind: str) -> Loaded:
    """Reads a mixture of sources, one after the other.

    Args:
        data: sources separated by commas; or a list whose elements are sources, `DataSpec`s or dicts of a DataSpec's
            fields; or any iterable of rows (dicts), such as a `datasets.Dataset`, which may also stand in the list.
        kind: what the records are for: "supervised" (gives Chat and Plain), "preference" (Pair), "unpaired".

    Raises:
        FileNotFoundError: for a source that is no file, no folder, no name and no hub id.
        ValueError: for a file that cannot be read through, and for a source without one usable row.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    loaded = Loaded([], Audit())
    specs = _specs(data)
    if not specs:
        raise ValueError("data must have at least one source, got none")
    for spec in specs:
        part = _load(spec, kind)
        loaded.records.extend(part.records)
        loaded.dropped.merge(part.dropped)
    return loaded


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


def _specs(data: Any) -> list[DataSpec]:
    if isinstance(data, str):
        return [DataSpec(name.strip()) for name in data.split(",")]
    if isinstance(data, list | tuple) and not (data and _is_row(data[0])):
        return [_spec(part) for part in data]
    return [_spec(data)]


def _spec(part: Any) -> DataSpec:
    if isinstance(part, DataSpec):
        return part
    if isinstance(part, str | os.PathLike):
        return DataSpec(os.fspath(part))
    if isinstance(part, Mapping):
        return _spec_of_fields(dict(part))
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


def _load(spec: DataSpec, kind: str) -> Loaded:
    dropped = Audit()
    slots = _toy_slots(spec, kind) if spec.label in TOYS else _slots(spec, kind, dropped)
    taken = list(slots if spec.rows is None or spec.shuffle_seed is not None else islice(slots, spec.rows))
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
        raise ValueError(f"{spec.label}: no usable row among {dropped.rows}: {rules or 'it is empty'}")
    return Loaded(records, dropped)


def _slots(spec: DataSpec, kind: str, dropped: Audit) -> Iterator[Record | None]:
    """The records of one source in file order, None for each row that passed the filters and did not parse."""
    source = SOURCES.get(spec.label)
    if source and FORMATS[source.format].kind != kind:
        raise ValueError(f"{spec.label} holds {FORMATS[source.format].kind} rows, and {kind} rows are needed")
    rules = _filters(spec, source, kind)
    rows = tqdm(_rows(spec, source), desc=spec.label, unit=" rows", delay=2, disable=None, leave=False)
    for origin, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{origin}: a row must be an object, got {type(row).__name__}")
        rule = next((rule for rule, drops in rules.items() if drops(row)), None)
        if rule is not None:
            dropped.drop(RowError(origin, rule, "filtered out"))
            continue
        try:
            record = parse_row(row, origin, source and source.format, kind)
        except RowError as error:
            dropped.drop(error)
            record = None
        yield record


def _toy_slots(spec: DataSpec, kind: str) -> list[Record]:
    from phi2.data import toy

    name, toy_kind = TOYS[spec.label]
    if toy_kind != kind:
        raise ValueError(f"{spec.label} holds {toy_kind} rows, and {kind} rows are needed")
    if spec.max_tokens is not None or spec.subsample is not None:
        raise ValueError(f"{spec.label} has no columns for max_tokens or subsample to read")
    return toy.records(name, spec.split or "train")


def _filters(spec: DataSpec, source: Source | None, kind: str) -> dict[str, Callable[[Row], bool]]:
    """Rule -> whether it drops a row, in the order in which a row meets them."""
    rules = dict(source.drop) if source else {}
    if spec.max_tokens is not None:
        rules["too-long"] = lambda row: _too_long(row, spec, kind)
    if spec.subsample is not None:
        rules["subsample"] = _thinning(spec.subsample)
    return rules


def _too_long(row: Row, spec: DataSpec, kind: str) -> bool:
    sums = TOKEN_COLUMNS[kind]
    try:
        return any(sum(row[column] for column in columns) >= spec.max_tokens for columns in sums)
    except (KeyError, TypeError):
        needed = " and ".join("+".join(columns) for columns in sums)
        raise ValueError(f"{spec.label}: max_tokens needs columns of numbers {needed}, got {list(row)[:20]}") from None


def _thinning(subsample: Subsample) -> Callable[[Row], bool]:
    draw, value = random.Random(subsample.seed).random, subsample.source_dataset
    return lambda row: (value is None or row.get("source_dataset") == value) and draw() > subsample.fraction


def _rows(spec: DataSpec, source: Source | None) -> Iterator[tuple[Origin, Any]]:
    """The rows of a source in order, each with where it came from."""
    if not isinstance(spec.source, str):
        return _memory_rows(spec)
    if source:
        return _hub_rows(source.hub_id, "", _choice("split", spec.split or source.splits[0], source.splits))
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return _folder_rows(path, spec.split, str(path))
    if path.exists() or _suffix(path.name):
        if spec.split is not None:
            raise ValueError(f"{spec.source}: split {spec.split!r} is for folders and data sets, and this is a file")
        return read_rows(path, spec.source)
    owner, name, config = (*spec.source.split("/", maxsplit=2), "", "")[:3]
    if not hub.HUB_ID.fullmatch(f"{owner}/{name}"):
        names = ", ".join([*SOURCES, *TOYS])
        raise FileNotFoundError(f"{spec.source}: no such file or folder, not a hub id, and no name among {names}")
    return _hub_rows(f"{owner}/{name}", config, spec.split)


def _memory_rows(spec: DataSpec) -> Iterator[tuple[Origin, Any]]:
    if spec.split is not None:
        raise ValueError(f"split {spec.split!r} is for folders and data sets: pass the rows of that split")
    for number, row in enumerate(spec.source, start=1):
        yield Origin(spec.label, number), row


def _hub_rows(hub_id: str, config: str, split: str | None) -> Iterator[tuple[Origin, Any]]:
    """Rows of the hub's parquet conversion of a data set; without one (private sets), of its own files."""
    try:
        folder = hub.resolve(hub_id, HUB_PARQUET, kind="dataset")
    except ValueError:
        folder = hub.resolve(hub_id, kind="dataset")
    return _folder_rows(folder / config, split, f"{hub_id}/{config}".rstrip("/"))


def _folder_rows(folder: Path, split: str | None, label: str) -> Iterator[tuple[Origin, Any]]:
    for path in _files_of_split(folder, split, label):
        yield from read_rows(path, f"{label}/{path.relative_to(folder).as_posix()}")


def _files_of_split(folder: Path, split: str | None, label: str) -> list[Path]:
    """The data files of one split: in a folder of that name, or named after it ("train.jsonl", "train-00000-of-3")."""
    files = sorted(path for path in folder.rglob("*") if _suffix(path.name) and path.is_file())
    wanted = split or "train"
    chosen = [path for path in files if _in_split(path.relative_to(folder), wanted)]
    if split is None and not chosen:
        chosen = files
    if not chosen:
        found = ", ".join(path.relative_to(folder).as_posix() for path in files[:5]) or "none"
        raise ValueError(f"{label}: no files of split {wanted!r}; files ({', '.join(READERS)}) there: {found}")
    configs = sorted({path.relative_to(folder).parts[0] for path in chosen if len(path.relative_to(folder).parts) > 2})
    if len(configs) > 1:
        raise ValueError(f"{label}: several configurations ({', '.join(configs)}): name one, as {label}/{configs[0]}")
    return chosen


def _in_split(path: Path, split: str) -> bool:
    in_folder = not {split, f"partial-{split}"}.isdisjoint(path.parts[:-1])  # partial: the first 5 GB of a larger set
    return in_folder or path.name.startswith((f"{split}.", f"{split}-"))


def _choice(name: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def read_rows(path: str | Path, label: str | None = None) -> Iterator[tuple[Origin, Any]]:
    """The rows of one file, streamed; `label` is what to call the file in origins, its path if not given.

    A .json file is an array of objects or, like .jsonl, an object a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a suffix not in `READERS`, and, naming the row, where the file cannot be read on.
    """
    path, label = Path(path), label or str(path)
    if not path.is_file():
        raise FileNotFoundError(f"{label}: no such file")
    suffix = _choice("the suffix of a data file", _suffix(path.name) or path.name, READERS)
    return READERS[suffix](path, label)


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)


def _read_json(path: Path, label: str) -> Iterator[tuple[Origin, Any]]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        # errors: bytes that are not UTF-8 become lone surrogates here and fail row by row, so that the row can be named
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            yield from _json_array(file, label) if is_array else _json_lines(file, label)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{label}: damaged or truncated gzip file ({error})") from error


def _json_lines(file: TextIO, label: str) -> Iterator[tuple[Origin, Any]]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        origin = Origin(label, number)
        try:
            line.encode()
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _unreadable(origin, error) from error
        yield origin, row


def _json_array(file: TextIO, label: str) -> Iterator[tuple[Origin, Any]]:
    """The elements of one array, each decoded from a window on the text, which grows until it holds a whole element."""
    decode, window, at, number = json.JSONDecoder().raw_decode, file.read(CHUNK).lstrip()[1:], 0, 1
    while not (end := ARRAY_END.match(window, at)):
        origin, start = Origin(label, number), (FIRST_START if number == 1 else NEXT_START).match(window, at)
        try:
            if start is None:
                raise json.JSONDecodeError("Expecting an object in the array", window, at)
            row, stop = decode(window, start.end())
            window[at:stop].encode()
        except (ValueError, RecursionError) as error:
            more = "" if len(window) - at > MAX_ELEMENT else file.read(max(CHUNK, len(window) - at))
            if not more or isinstance(error, UnicodeEncodeError):
                raise _unreadable(origin, error) from error
            window, at = window[at:] + more, 0
            continue
        yield origin, row
        at, number = stop, number + 1
    if (window[end.end() :] + file.read(CHUNK)).strip():
        raise ValueError(f"{label}: text after the end of the array")


def _unreadable(origin: Origin, error: Exception) -> ValueError:
    what = "UTF-8" if isinstance(error, UnicodeEncodeError) else "JSON"
    return ValueError(f"{origin}: invalid {what} ({getattr(error, 'msg', error)})")


def _read_parquet(path: Path, label: str) -> Iterator[tuple[Origin, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(label, number), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{label}: damaged or truncated parquet file after row {number} ({reason})") from error


READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
}
