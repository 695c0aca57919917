"""A second start has the rows and audits of the first and reads no data, unless something that matters changed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi2.checkpoints.weights import load_tokenizer
from phi2.data import store
from phi2.data.audit import Audit
from phi2.data.flat import digests, flat_rows
from phi2.data.records import Origin
from phi2.training import session
from phi2.training.session import start


@pytest.fixture
def entries(cache) -> Callable[[], list[Path]]:
    """The entries of the store, newest first."""

    def found() -> list[Path]:
        return sorted((cache / "rows").glob("*.arrow"), key=lambda path: -path.stat().st_mtime_ns)

    return found


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Gets the name of each data set that is read."""
    seen, load = [], session.load_records
    monkeypatch.setattr(session, "load_records", lambda data, *rest: seen.append(str(data)) or load(data, *rest))
    return seen


@pytest.fixture
def told(plain) -> Callable[..., list]:
    """All that the rows of a session are."""

    def tell(rows: session.Rows) -> list:
        audits = {name: (audit.to_dict(), audit.table()) for name, audit in rows.audits.items()}
        return [*([plain(row) for row in each] for each in rows[:2]), audits, digests(rows.train)]

    return tell


def lines_about_rows(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "encoded" in line]


def without_lines_about_rows(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "encoded" not in line]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {}),
        ("sft", {"train_on": "assistant", "max_length": 12}),
        ("dpo", {"max_length": 14}),
        ("dpo", {"test_fraction": 0.3}),
        ("dpo", {"ignore_columns": ["weight"]}),
        ("dpo", {"data": [{"source": "toy-dpo", "rows": 9, "shuffle_seed": 1}]}),
    ],
)
def test_a_second_start_reads_no_data_and_has_the_same(told, kind, changes, reads, request, capsys):
    config = request.getfixturevalue(f"{kind}_config")(**changes)
    first = told(start(config).rows)
    printed = without_lines_about_rows(capsys.readouterr().out)
    assert len(reads) == 1 and "data_audit.json" in printed
    assert told(start(config).rows) == first
    assert len(reads) == 1
    assert without_lines_about_rows(capsys.readouterr().out) == printed


def test_evaluation_data_of_their_own_do_not_encode_the_others_again(dpo_config, pair_data, tmp_path, reads):
    start(dpo_config()).rows  # noqa: B018
    other = shutil.copy(pair_data, tmp_path / "eval.jsonl")
    start(dpo_config(eval_data=str(other))).rows  # noqa: B018
    assert reads == [pair_data, str(other)]


# ---- what a name is made of ----


def edit_unseen(path: Path) -> None:
    """A change that neither the size nor the time of the last writing shows."""
    before = path.stat()
    path.write_text(path.read_text().replace("the", "thy"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def edit_template(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template += " "
    tokenizer.save(folder)


def edit_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))


EDITS = {
    "a word of the data": ("data", edit_unseen),
    "one row more": ("data", lambda path: path.write_text(path.read_text() + '{"prompt": "a", "completion": "b"}\n')),
    "the template": ("model", edit_template),
    "the end token": ("model", edit_eos),
}


@pytest.mark.parametrize("settled", [0, 60], ids=["remembered", "just written"])
@pytest.mark.parametrize("edit", EDITS)
def test_another_content_is_encoded_anew(
    told, sft_config, sft_data, tiny_phi, tmp_path, reads, monkeypatch, edit, settled
):
    monkeypatch.setattr(store, "SETTLED", settled)
    own = {"data": shutil.copy(sft_data, tmp_path / "rows.jsonl"), "model": shutil.copytree(tiny_phi, tmp_path / "phi")}
    config = sft_config(data=str(own["data"]), model=str(own["model"]))
    start(config).rows  # noqa: B018
    name, change = EDITS[edit]
    change(own[name])
    kept = start(config).rows
    assert len(reads) == 2
    monkeypatch.setenv(store.LIMIT, "0")
    assert told(kept) == told(start(config).rows)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 30},
        {"train_on": "all"},
        {"boundary": "split"},
        {"append_eos": False},
        {"test_fraction": 0.5},
        {"data": [{"source": "DATA", "rows": 3}]},
        {"chat_template": "chatml"},  # nano's own is written in other words
    ],
    ids=str,
)
def test_other_settings_are_another_entry(sft_config, sft_data, entries, reads, tmp_path, change):
    config = sft_config(model="nano", data=sft_data)
    start(config).rows  # noqa: B018
    if "data" in change:
        change = {"data": [{**change["data"][0], "source": sft_data}]}
    rows = start(dataclasses.replace(config, **change)).rows
    assert len(reads) == 2
    assert len(entries()) == 2 + bool(rows.evaluation)


def test_settings_that_rows_do_not_depend_on_share_an_entry(sft_config, reads):
    for change in ({}, {"seed": 5, "learning_rate": 0.5, "packing": "best_fit", "packing_length": 256}):
        start(sft_config(**change)).rows  # noqa: B018
    assert len(reads) == 1


def test_another_path_to_the_same_file_has_origins_of_its_own(sft_config, sft_data, tmp_path):
    start(sft_config()).rows  # noqa: B018
    copy = shutil.copy(sft_data, tmp_path / "copy.jsonl")
    assert start(sft_config(data=str(copy))).rows.train[0].origin.file == str(copy)


def test_other_code_is_another_entry(sft_config, reads, monkeypatch):
    for code in ("a", "b"):
        monkeypatch.setattr(store, "_code", lambda code=code: code)
        start(sft_config()).rows  # noqa: B018
    assert len(reads) == 2


def test_rows_of_a_file_that_changes_while_it_is_read_are_not_kept(
    sft_config, sft_data, tmp_path, entries, monkeypatch
):
    path, load = Path(shutil.copy(sft_data, tmp_path / "rows.jsonl")), session.load_records

    def load_and_change(*given):
        loaded = load(*given)
        edit_unseen(path)
        return loaded

    monkeypatch.setattr(session, "load_records", load_and_change)
    assert len(start(sft_config(data=str(path))).rows.train) == 11
    assert not entries()


def test_rows_from_python_are_not_kept(sft_config, entries):
    assert len(start(sft_config(data=[{"text": "the end"}])).rows.train) == 1
    assert not entries()


@pytest.mark.parametrize("changing", ["{{ strftime_now('%H') }}", "{{ [1, 2] | random }}"])
def test_rows_of_a_template_that_writes_another_text_the_next_time_are_not_kept(
    sft_config, tmp_path, entries, changing
):
    template = tmp_path / "changing.jinja"
    template.write_text(changing + "{% for m in messages %}{{ m.content }}{% endfor %}")
    start(sft_config(chat_template=str(template))).rows  # noqa: B018
    assert not entries()


def test_data_that_are_not_there_are_told_as_without_a_store(sft_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jsonl: no such file$"):
        start(sft_config(data=str(tmp_path / "missing.jsonl"))).rows  # noqa: B018


# ---- a store that fails ----


def test_a_full_disk_is_told_and_the_rows_are_there(told, sft_config, entries, full_disk, capsys):
    expected = told(start(sft_config()).rows)
    (entry,) = entries()
    entry.unlink()
    capsys.readouterr()
    with full_disk(500):
        assert told(start(sft_config()).rows) == expected
    (line,) = lines_about_rows(capsys.readouterr().out)
    assert line.startswith(f"encoded rows are not kept: {entry.parent} cannot be written (") and "too large" in line
    assert not [*entry.parent.glob(".*")] and not entries()


def test_a_folder_that_cannot_be_made_is_told_and_the_rows_are_there(sft_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "file"))
    assert len(start(sft_config()).rows.train) == 11
    (line,) = lines_about_rows(capsys.readouterr().out)
    assert line.startswith(f"encoded rows are not kept: {tmp_path / 'file' / 'rows'} cannot be written (")


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "something else": lambda content: b"no entry" * 100,
    "another number in the middle": lambda content: flipped(content, len(content) // 2),
    "another bound of a row": lambda content: flipped(content, len(content) // 3),
    "another last byte": lambda content: flipped(content, len(content) - 1),
    "without its description": lambda content: content.replace(b'"kind"', b'"xind"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_told_and_made_anew(told, sft_config, entries, reads, capsys, damage):
    expected = told(start(sft_config()).rows)
    (entry,) = entries()
    whole = entry.read_bytes()
    entry.unlink()  # other processes may have its pages in their memory
    entry.write_bytes(DAMAGE[damage](whole))
    capsys.readouterr()
    assert told(start(sft_config()).rows) == expected
    about, kept = lines_about_rows(capsys.readouterr().out)
    assert about.startswith(f"{entry}: cannot be read (") and about.endswith("); the rows are encoded anew")
    assert kept.startswith(f"encoded rows kept in {entry}: ") and entry.read_bytes() == whole


def test_an_entry_that_can_be_neither_read_nor_written_is_told_and_the_rows_are_there(sft_config, entries, capsys):
    start(sft_config()).rows  # noqa: B018
    (entry,) = entries()
    entry.unlink()
    entry.mkdir()
    capsys.readouterr()
    assert len(start(sft_config()).rows.train) == 11
    read, written = lines_about_rows(capsys.readouterr().out)
    assert read.startswith(f"{entry}: cannot be read (") and read.endswith("; the rows are encoded anew")
    assert written.startswith(f"encoded rows are not kept: {entry.parent} cannot be written (")


def keep_often(name: str, kept: store.Kept) -> None:
    for _ in range(20):
        store.keep(name, kept)
        assert store.find(name)


def test_processes_that_keep_the_same_rows_do_not_disturb_each_other(plain, sft_config, entries, cache):
    rows = start(sft_config()).rows
    kept, fork = store.Kept(rows.train, rows.audits["data_audit.json"]), multiprocessing.get_context("fork")
    processes = [fork.Process(target=keep_often, args=("same", kept)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [plain(row) for row in store.find("same").rows] == [plain(row) for row in rows.train]
    assert len(entries()) == 2 and not [*(cache / "rows").glob(".*")]


# ---- its bounds ----


def entry_of(megabytes: float) -> store.Kept:
    rows = flat_rows(
        [session.EncodedSequence(np.zeros(10, dtype=np.int32), np.ones(10, dtype=bool), Origin("f", 1))], "supervised"
    )
    return store.Kept(dataclasses.replace(rows, mask=np.zeros(int(megabytes * 2**20), dtype=np.uint8)), Audit())


def test_what_was_used_longest_ago_goes_first(entries, monkeypatch, capsys):
    monkeypatch.setenv(store.LIMIT, str(2.5 / 1024))
    for age, name in ((300, "a"), (200, "b")):
        store.keep(name, entry_of(1))
        path = next(path for path in entries() if path.stem == name)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    store.find("a")
    capsys.readouterr()
    store.keep("c", entry_of(1))
    assert sorted(path.stem for path in entries()) == ["a", "c"]
    assert capsys.readouterr().out.endswith("c.arrow: 1.0 MiB, all together 2.0 MiB; 1 used longest ago removed\n")


def test_rows_beyond_the_bound_are_told_and_not_kept(entries, monkeypatch, capsys):
    monkeypatch.setenv(store.LIMIT, str(2.5 / 1024))
    store.keep("small", entry_of(1))
    store.keep("large", entry_of(3))
    assert [path.stem for path in entries()] == ["small"]
    assert capsys.readouterr().out.endswith(
        "encoded rows are not kept: their 3.0 MiB are more than PHI2_CACHE_GIB allows\n"
    )


def test_a_bound_of_zero_keeps_nothing(sft_config, cache, monkeypatch):
    monkeypatch.setenv(store.LIMIT, "0")
    assert len(start(sft_config()).rows.train) == 11
    assert not cache.exists()


@pytest.mark.parametrize("wrong", ["many", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(sft_config, monkeypatch, reads, wrong):
    monkeypatch.setenv(store.LIMIT, wrong)
    message = f"^the environment variable PHI2_CACHE_GIB must be a number of GiB, 0 or more, got '{wrong}'$"
    with pytest.raises(ValueError, match=message):
        start(sft_config()).rows  # noqa: B018
    assert not reads


def test_what_a_killed_process_left_is_removed(cache, entries):
    left, fresh = cache / "rows" / ".a.arrow.1", cache / "rows" / ".b.arrow.2"
    left.parent.mkdir(parents=True)
    for path in (left, fresh):
        path.write_bytes(b"x")
    os.utime(left, (0, 0))
    store.keep("a", entry_of(0.1))
    assert not left.exists() and fresh.exists()
