"""Encoded rows kept from one run to the next, under a name made of all that decides what they are.

That is the content of the data files, what is taken of them, the settings of the encoding, the tokenizer with its
template, and the code and libraries that read, write out and tokenise. An entry is one Arrow file with a CRC behind it,
which is mapped into memory: a million rows are there at once, and processes share them. The folder is
`$PHI2_CACHE/rows` (PHI2_CACHE is ~/.cache/phi2 unless set); beyond `$PHI2_CACHE_GIB` (10 unless set, 0 keeps nothing)
what was used longest ago goes.

Not kept are rows that come from Python, since looking at all of them would be most of reading them, and an iterator
can be read only once; and those of a template that asks for the time or for chance. A store that cannot be read or
written never stops a run: the rows are encoded anew, and a line says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from phi2.data.audit import Audit, Dropped
from phi2.data.config import DataSpec, EncodeConfig
from phi2.data.flat import Digests, FlatPreferences, FlatRows, FlatSequences
from phi2.data.sources import TOYS, files_of, specs_of
from phi2.files import crc_of, one_line, read_json, whole_file, write_whole
from phi2.tokenizer import Tokenizer

FOLDER, LIMIT, DEFAULT_GIB = "PHI2_CACHE", "PHI2_CACHE_GIB", 10.0
KINDS: dict[str, Any] = {"supervised": FlatSequences, "preference": FlatPreferences}
PACKAGE = Path(__file__).parents[1]
CHANGING = re.compile(r"\b(strftime_now|random)\b")  # what makes a template write another text the next time
SETTLED = 2  # seconds without a change after which a file's times tell the next one
CRC = 4  # bytes behind an entry that tell of damage
LEFT_OVER = 24 * 3600  # seconds after which an unfinished file is one of a process that was killed


class Kept(NamedTuple):
    """What an entry holds."""

    rows: FlatRows
    audit: Audit


def folder() -> Path:
    return Path(os.environ.get(FOLDER) or "~/.cache/phi2").expanduser() / "rows"


def limit() -> int:
    """Bytes that all entries may have.

    Raises:
        ValueError: when the environment says no number.
    """
    given = os.environ.get(LIMIT) or str(DEFAULT_GIB)
    try:
        gib = float(given)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise ValueError(f"the environment variable {LIMIT} must be a number of GiB, 0 or more, got {given!r}")
    return int(gib * 2**30)


# ---- names ----


def name_of(data: Any, kind: str, tokenizer: Tokenizer, options: EncodeConfig, split: tuple | None = None) -> str:
    """The name of these rows; "" for rows that are not kept.

    Args:
        data, kind: as for `load_records`.
        split: which part of the rows, with all that decides it.
    Raises:
        FileNotFoundError, ValueError: for data that are not there, or an environment that says no limit.
    """
    if not limit() or CHANGING.search(tokenizer.chat_template or ""):
        return ""
    parts = [_content(spec, kind) for spec in specs_of(data)]
    if None in parts:
        return ""
    settings = {field.name: getattr(options, field.name) for field in fields(EncodeConfig)}
    told = [_code(), kind, settings, split, tokenizer.fingerprint, parts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _content(spec: DataSpec, kind: str) -> dict[str, Any] | None:
    """What is taken, and of which files; None where nothing can be said of them."""
    if not isinstance(spec.source, str):
        return None
    files = [] if spec.label in TOYS else files_of(spec, kind)
    if not all(path.is_file() for path, _ in files):
        return None  # who reads them says so
    taken = {field.name: getattr(spec, field.name) for field in fields(DataSpec)}
    subsample = spec.subsample and asdict(spec.subsample)
    return {**taken, "subsample": subsample, "files": [(label, _digest(path)) for path, label in files]}


@lru_cache(maxsize=1)
def _code() -> str:
    """SHA-256 of the code that makes rows, and the versions of the libraries it calls."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.glob("data/**/*.py"), *PACKAGE.glob("text/*.py"), PACKAGE / "tokenizer.py"]):
        digest.update(path.read_bytes())
    for library in ("tokenizers", "jinja2", "pyarrow", "numpy"):
        digest.update(f"{library} {version(library)}\n".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered for as long as the file is untouched.

    A file is the same while its size and times are: nothing sets back the time of its last change but the clock. One
    that was changed a moment ago is read again, since a second change within a tick of the clock would show nowhere.
    """
    status = path.stat()
    seen = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = folder() / f"{hashlib.sha256(repr(seen).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError):  # a note that cannot be read is no note
        return read_json(note)["sha256"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - status.st_ctime > SETTLED:
        with suppress(OSError):  # `keep` tells of a folder that cannot be written
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps({"file": seen, "sha256": digest}))
    return digest


# ---- entries ----


def find(name: str) -> Kept | None:
    """The rows of this name, mapped; None where there are none."""
    if not name:
        return None
    path = folder() / f"{name}.arrow"
    try:
        kept = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        print(f"{path}: cannot be read ({one_line(error)}); the rows are encoded anew")
        return None
    with suppress(OSError):  # of a folder that may only be read
        os.utime(path)
    print(f"encoded rows from {path}")
    return kept


def keep(name: str, kept: Kept) -> Kept:
    """Writes rows down, and takes out what is too much; returns them, mapped where that went well."""
    if not name:
        return kept
    path = folder() / f"{name}.arrow"
    size = sum(array.nbytes for array in _arrays(kept.rows).values())
    if size > limit():
        print(f"encoded rows are not kept: their {_told_size(size)} are more than {LIMIT} allows")
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            _write(unfinished, kept)
        mapped = _read(path)
        held, removed = _remove_oldest(path)
    except (OSError, ValueError) as error:
        print(f"encoded rows are not kept: {path.parent} cannot be written ({one_line(error)})")
        return kept
    gone = f"; {removed} used longest ago removed" if removed else ""
    print(f"encoded rows kept in {path}: {_told_size(path.stat().st_size)}, all together {_told_size(held)}{gone}")
    return mapped


def _remove_oldest(newest: Path) -> tuple[int, int]:
    """Removes entries beyond the limit, and what killed processes left; returns bytes held and entries removed."""
    for path, status in _files(".*"):
        if time.time() - status.st_mtime > LEFT_OVER:
            path.unlink(missing_ok=True)
    entries = sorted(_files("*.arrow"), key=lambda entry: (entry[0] != newest, -entry[1].st_mtime))
    held = np.cumsum([status.st_size for _, status in entries])
    kept = max(1, int((held <= limit()).sum()))  # the newest in any case
    for path, _ in entries[kept:]:
        path.unlink(missing_ok=True)
    return int(held[kept - 1]), len(entries) - kept


def _files(pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """What is there; another process may remove some meanwhile."""
    for path in folder().glob(pattern):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _told_size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


# ---- files ----


def _arrays(rows: FlatRows) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(rows).items() if isinstance(value, np.ndarray)}


def _write(path: Path, kept: Kept) -> None:
    """One record batch of one row, in which every array is a list: of any length, and mapped as it lies."""
    rows = kept.rows
    lists = {name: array.view(np.uint8) if array.dtype.names else array for name, array in _arrays(rows).items()}
    columns = {name: _one_list(pa.array(array)) for name, array in lists.items()}
    if isinstance(rows, FlatPreferences):
        columns["texts"] = _one_list(pa.array(rows.texts, pa.large_string()))
    layouts = rows.layouts if isinstance(rows, FlatPreferences) else []
    told = {
        "kind": next(kind for kind, of in KINDS.items() if isinstance(rows, of)),
        "files": rows.files,
        "flag_sets": [sorted(flags) for flags in rows.flag_sets],
        "digests": rows.digests,
        "layouts": layouts,
        "audit": _told(kept.audit),
    }
    batch = pa.record_batch([*columns.values()], names=[*columns]).replace_schema_metadata({"phi2": json.dumps(told)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    crc = crc_of(path)
    with path.open("ab") as file:
        file.write(crc.to_bytes(CRC, "little"))


def _mapped(path: Path) -> pa.Buffer:
    """An entry without the CRC behind it, when its bytes are those that were written."""
    size = path.stat().st_size - CRC
    with path.open("rb") as file:
        file.seek(max(0, size))
        written = int.from_bytes(file.read(), "little")
    if size < 0 or written != crc_of(path, stop=size):
        raise ValueError("it is not what was written")
    return pa.memory_map(str(path)).read_buffer(size)


def _one_list(values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def _read(path: Path) -> Kept:
    """Raises pyarrow's, Python's or our own error for a file that is not an entry."""
    batch = pa.ipc.open_file(_mapped(path)).get_batch(0)
    told = json.loads(batch.schema.metadata[b"phi2"])
    lists = {name: column.values for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    texts = {"texts": Texts(lists.pop("texts"))} if "texts" in lists else {}
    arrays = {name: values.to_numpy(zero_copy_only=True) for name, values in lists.items()}
    rows_of = KINDS[told["kind"]]
    arrays["table"] = arrays["table"].view(rows_of.FIELDS)
    layouts = [tuple((column, is_text) for column, is_text in layout) for layout in told["layouts"]]
    rows = rows_of(
        **arrays,
        **texts,
        **({"layouts": layouts} if texts else {}),
        files=told["files"],
        flag_sets=[frozenset(flags) for flags in told["flag_sets"]],
        digests=Digests(*told["digests"]),
    )
    if rows.bounds[-1] != len(rows.ids):
        raise ValueError("it holds other tokens than it says")
    return Kept(rows, _audit(told["audit"]))


def _told(audit: Audit) -> dict[str, Any]:
    """An audit in JSON's types."""
    dropped = {rule: vars(rows) for rule, rows in audit.dropped.items()}
    return vars(audit) | {"dropped": dropped, "lengths": [*audit.lengths.items()]}


def _audit(told: dict[str, Any]) -> Audit:
    return Audit(
        **told
        | {
            "dropped": {rule: Dropped(**dropped) for rule, dropped in told["dropped"].items()},
            "flags": Counter(told["flags"]),
            "lengths": Counter(dict(map(tuple, told["lengths"]))),
            "columns": {status: Counter(names) for status, names in told["columns"].items()},
        }
    )


class Texts(Sequence[str]):
    """The texts of an Arrow array, each read when it is asked for."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: Any) -> Any:
        return self.values[place].as_py()
