"""A file of answers that grows row by row, in the order of the prompts, and can be gone on with wherever it was cut.

Rows are appended, each in one piece and unbuffered: after a kill all are whole but the last, after a full disk all are.
Beside the file stands what it depends on, NAME.inputs.json, by which a resumed run names what has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi2.files import read_json, write_whole
from phi2.runs.inputs import Inputs, require_same


def json_line(row: Mapping[str, Any], name: object) -> bytes:
    """A row as a line of JSON. Half of a surrogate pair is written as its escape, which JSON has and UTF-8 has not.

    Raises:
        ValueError: for a value that JSON cannot hold; `name` says which row it is.
    """
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    except TypeError as error:
        raise ValueError(f"{name}: {error}: leave that column out of the file") from error


class AnswersFile:
    """The output of a run over many prompts.

    Args:
        path: of the file; its folder is made.
        resume: whether to go on with what is there; else it must not exist.

    Attributes:
        rows: how many are there.
        before: what the run that is gone on with began with; None for a new one.

    Raises:
        ValueError: when the file is there and is not to be gone on with, or is not one of these.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self._inputs = path, path.with_name(f"{path.name}.inputs.json")
        self.rows, self._end = 0, 0
        self.before: Inputs | None = None
        if not path.exists():
            return
        if not resume:
            raise ValueError(f"{path} exists already; give another output, or resume: true to go on with it")
        if not self._inputs.is_file():
            raise ValueError(f"{path}: without {self._inputs.name} beside it, it cannot be gone on with")
        self.before = read_json(self._inputs)
        self.rows, self._end = whole_rows(path)

    def begin(self, inputs: Inputs) -> None:
        """Cuts off what is no whole row, once the inputs have been compared.

        Raises:
            ValueError: naming what has changed.
        """
        if self.before is not None:
            require_same(self.path, self.before, inputs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._inputs, json.dumps(inputs, indent=1))
        with self.path.open("ab") as file:
            file.truncate(self._end)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row.

        Raises:
            OSError: when it does not fit on the disk; those before it are whole.
        """
        line = json_line(row, f"{self.path} row {self.rows + 1}")
        with self.path.open("ab", buffering=0) as file:
            try:
                _write(file, line)
            except OSError as error:
                file.truncate(self._end)
                raise OSError(f"{self.path}: {error.strerror}; {self.rows} whole rows are in it") from error
        self.rows, self._end = self.rows + 1, self._end + len(line)

    def read(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            yield from map(json.loads, file)


def _write(file: Any, line: bytes) -> None:
    """All of it: a file without a buffer may take a part."""
    while line:
        line = line[file.write(line) :]


def whole_rows(path: Path) -> tuple[int, int]:
    """How many rows are whole, and the byte behind them.

    Raises:
        ValueError: for a line that is not the row of its place, as no cut can leave one.
    """
    rows, end = 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if _index(line) != rows:
                raise ValueError(f"{path} row {rows + 1}: is not what was written there; it cannot be gone on with")
            rows, end = rows + 1, end + len(line)
    return rows, end


def _index(line: bytes) -> int | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("index") if isinstance(row, dict) else None
