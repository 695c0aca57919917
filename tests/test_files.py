"""The one safe write, for files and folders, and JSON that is none."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from phi2.files import read_json, require_folder, whole_file, whole_folder, write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "[" * 100_000])
def test_json_that_is_no_object_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: ") as raised:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["new é", b"\x00new"])
def test_a_file_is_replaced_whole(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text("old and longer than the new")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names_in(tmp_path) == ["a.json"]


def test_a_file_whose_writing_fails_is_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and names_in(tmp_path) == ["a.json"]


def test_two_files_change_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with pytest.raises(ZeroDivisionError), whole_file(first) as a, whole_file(second) as b:
        a.write_text("new")
        b.write_text("new")
        raise ZeroDivisionError
    assert names_in(tmp_path) == []


def test_a_folder_takes_the_place_of_the_old_one_with_all_it_held(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as unfinished:
        (unfinished / "old").write_text("1")
    with whole_folder(folder) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "new").write_text("2")
        assert (folder / "old").exists()
    assert names_in(tmp_path) == ["deep", "model", "new"]


@pytest.fixture
def flushed(monkeypatch) -> list[str]:
    """Contents of the files that were waited for."""
    contents: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: contents.append(os.pread(file, 100, 0).decode()))
    return contents


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, flushed):
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("new")
        assert flushed == []
    assert flushed == ["new"]


def test_all_files_of_a_folder_are(tmp_path, flushed):
    with whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "b").mkdir()
        for place in ("c", "b/d"):
            (unfinished / place).write_text(place)
    assert sorted(flushed) == ["b/d", "c"]


@pytest.mark.parametrize("error, is_refused", [(errno.EIO, True), (errno.EINVAL, False), (errno.ENOTSUP, False)])
def test_a_disk_that_fails_is_told_and_one_that_cannot_be_asked_is_not(tmp_path, monkeypatch, error, is_refused):
    def fails(file: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError) if is_refused else nullcontext():
        write_whole(tmp_path / "a", "new")
    assert names_in(tmp_path) == ([] if is_refused else ["a"])


def test_a_folder_whose_writing_fails_is_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as unfinished:
        (unfinished / "old").write_text("1")
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as unfinished:
        raise ZeroDivisionError
    assert names_in(tmp_path) == ["model", "old"]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "file.json"
    write_whole(path, "old")
    with full_disk(100), pytest.raises(OSError):
        write_whole(path, "new" * 100)
    assert path.read_text() == "old" and names_in(tmp_path) == ["file.json"]


def test_a_file_in_a_folder_that_is_not_there_is_told_by_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*gone/a.json'$"):
        write_whole(tmp_path / "gone" / "a.json", "{}")


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_an_output_that_is_a_file_or_below_one_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match=f"^output .*: {tmp_path / 'file'} is a file; give a folder$"):
        require_folder(tmp_path / "file" / below)
    require_folder(tmp_path)
    require_folder(tmp_path / "new" / "folder")
