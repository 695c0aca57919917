"""Rows out of files: JSON lines, JSON arrays, gzip and parquet, streamed one by one, each with where it came from.

A file that cannot be read on is an error that names the row; a row that can be read but not used is left to
`phi2.data.records`, which refuses it alone.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from phi2.data.records import Origin

CHUNK = 1 << 20  # characters read at a time from a JSON array
MAX_ELEMENT = 64 << 20  # characters one row of a JSON array may have: broken JSON is found out before memory is full
FIRST_START, NEXT_START, ARRAY_END = re.compile(r"\s*(?={)"), re.compile(r"\s*,\s*(?={)"), re.compile(r"\s*]")


def folder_files(folder: Path, split: str | None, label: str) -> list[tuple[Path, str]]:
    """The data files of one split, each with what to call it in origins."""
    paths = _files_of_split(folder, split, label)
    return [(path, f"{label}/{path.relative_to(folder).as_posix()}") for path in paths]


def _files_of_split(folder: Path, split: str | None, label: str) -> list[Path]:
    """The data files of one split: in a folder of that name, or named after it ("train.jsonl", "train-00000-of-3")."""
    files = sorted(path for path in folder.rglob("*") if suffix_of(path.name) and path.is_file())
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


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
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
    suffix = one_of("the suffix of a data file", suffix_of(path.name) or path.name, READERS)
    return READERS[suffix](path, label)


def suffix_of(name: str) -> str | None:
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
