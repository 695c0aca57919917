"""Reading JSON and YAML, and the one safe write.

What is written has a temporary name beside its place, reaches the disk, and is then renamed: whoever looks, also after
a kill or on a full disk, finds what was there before or the whole of what is new.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

CHUNK = 2**22  # bytes that are read at once


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: one line naming the file, when it is not UTF-8, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line. A last one without its end is left out: it is still being written, or
    whoever wrote it was killed.

    Raises:
        ValueError: one line naming the file, and the row that is not JSON or not an object.
    """
    values = []
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")  # not splitlines: it cuts inside of texts, too
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from error
    for row, line in enumerate([*lines, last] if last.endswith("}") else lines, start=1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {row}: not valid JSON ({one_line(error)})") from error
        if not isinstance(values[-1], dict):
            raise ValueError(f"{path} line {row}: must hold a JSON object, got {type(values[-1]).__name__}")
    return values


class _EachKeyOnce(yaml.SafeLoader):
    """PyYAML takes the last of several values for a key, and says nothing of the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} gives {key.value!r} again")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`.

    Raises:
        ValueError: one line naming the file, when it is not UTF-8, not YAML or not a mapping, or when a key stands in a
            mapping twice.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = one_line(error).replace('in "<unicode string>", ', "at ")
        raise ValueError(f"{path}: not valid YAML ({told})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a mapping, got {'nothing' if value is None else type(value).__name__}")
    return value


def crc_of(path: Path, start: int = 0, stop: int | None = None) -> int:
    """Of the bytes of a file. They are read: of a map, what was looked at counts as memory of the process."""
    crc = 0
    with path.open("rb") as file:
        left = (os.fstat(file.fileno()).st_size if stop is None else stop) - start
        file.seek(start)
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def require_folder(output: Path) -> None:
    """Refuses an output that is a file, or below one."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"output {output}: {path} is a file; give a folder")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is either the old one or the whole new one."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which takes its place when the block ends well and vanishes when it does not."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))  # not that of the unfinished file
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # processes side by side may write the same file
    try:
        yield unfinished
        _flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder; one that is there already is replaced with all it holds."""
    unfinished, old = (folder.with_name(f".{folder.name}.{word}") for word in ("unfinished", "old"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        unfinished.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until the file is on the disk: a rename may otherwise outlive what it renamed."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that cannot be asked to
                raise
