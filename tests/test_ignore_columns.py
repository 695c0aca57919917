"""What a run is told to ignore, through its settings: flags, YAML, training and evaluation data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi2.cli.commands import main
from phi2.data.sources import DataSpec
from phi2.training.session import start
from phi2.training.sft import SFTConfig

PLAIN = {"question": "Is 7 prime?", "answer": "Yes."}
SEEN = {**PLAIN, "images": ["7.png"], "id": 1}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, **options) -> tuple[dict, dict]:
    """Both audits of a run."""
    config = SFTConfig(model="nano", output=str(tmp_path), **options)
    start(config).keep_audits(tmp_path)
    return tuple(json.loads((tmp_path / f"{part}_audit.json").read_text()) for part in ("data", "eval"))


def test_rows_that_the_reader_refused_are_in_the_audit_of_their_part(tmp_path):
    data, held = write(tmp_path / "a.jsonl", PLAIN, SEEN), write(tmp_path / "b.jsonl", SEEN, SEEN, {**PLAIN, "id": 2})
    audits = load(tmp_path, data=data, eval_data=held)
    assert [audit["dropped"]["not-read"]["rows"] for audit in audits] == [1, 2]
    assert [audit["columns"]["not read"] for audit in audits] == [{}, {"id": 1}]


def test_what_is_ignored_may_be_in_one_of_the_parts_only(tmp_path):
    data, held = write(tmp_path / "a.jsonl", PLAIN), write(tmp_path / "b.jsonl", SEEN)
    audits = load(tmp_path, data=data, eval_data=held, ignore_columns=["images"])
    assert [audit["columns"]["ignored as asked"] for audit in audits] == [{}, {"images": 1}]


def test_a_name_that_no_part_has_is_refused(tmp_path):
    data = write(tmp_path / "a.jsonl", PLAIN)
    with pytest.raises(ValueError, match="ignore_columns: no row has anything in 'images'"):
        load(tmp_path, data=data, ignore_columns=["images"])


def test_a_part_of_the_data_says_for_itself_what_is_ignored(tmp_path):
    data, held = write(tmp_path / "a.jsonl", SEEN), write(tmp_path / "b.jsonl", PLAIN)
    spec = DataSpec(data, ignore_columns=["images"])
    assert load(tmp_path, data=[spec], eval_data=held)[0]["columns"]["ignored as asked"] == {"images": 1}


def test_the_flag_is_given_once_for_each_column(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {**SEEN, "video": "7.mp4"})
    flags = ["--ignore_columns", "images", "--ignore_columns", "video"]
    assert main(["inspect", "--model", "nano", "--data", data, *flags]) == 0
    assert "columns ignored as asked: images 1, video 1" in capsys.readouterr().out
