"""Local data of the card's tasks: which file is whose, and what its rows become."""

from __future__ import annotations

import json

import pytest

from phi2.evaluation.local_data import local_dataset, local_files, read_rows


def write(folder, name: str, rows: list[dict]):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_found_by_the_words_of_task_and_split(tmp_path):
    test, train = write(tmp_path, "gsm8k/Test.jsonl", [{}]), write(tmp_path, "gsm8k/train.jsonl", [{}])
    write(tmp_path, "mmlu_test.jsonl", [{}])
    assert local_files(tmp_path, "gsm8k") == {"test": test, "train": train}


def test_a_missing_file_says_what_its_path_must_have(tmp_path):
    write(tmp_path, "gsm8k_test.jsonl", [{}])
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl or \.json file with gsm8k and train in its path"):
        local_files(tmp_path, "gsm8k")


def test_several_files_for_one_split_are_not_chosen_from(tmp_path):
    for name in ("winogrande_dev.jsonl", "winogrande_train_s.jsonl", "winogrande_train_xl.jsonl"):
        write(tmp_path, name, [{}])
    with pytest.raises(ValueError, match="keep one of winogrande_train_s.jsonl, winogrande_train_xl.jsonl"):
        local_files(tmp_path, "winogrande")


def test_a_list_and_lines_hold_the_same_rows(tmp_path):
    rows = [{"question": "a"}, {"question": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert read_rows(str(tmp_path / "list.json")) == rows == read_rows(write(tmp_path, "lines.jsonl", rows))


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2: not valid JSON"):
        read_rows(str(tmp_path / "bad.jsonl"))


def test_truthfulqas_own_answers_become_choices_and_labels(tmp_path):
    row = {"question": "q", "mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"choices": ["x"], "labels": [1]}}
    files = {"validation": write(tmp_path, "mc.jsonl", [row])}
    assert local_dataset("truthfulqa_mc2", files)["validation"][0] == {
        "question": "q",
        "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["x"], "labels": [1]},
    }


def test_a_subject_has_its_own_rows_only(tmp_path):
    rows = [{"subject": "anatomy", "n": 1}, {"subject": "law", "n": 2}, {"subject": "anatomy", "n": 3}]
    found = local_dataset("mmlu_anatomy", {"test": write(tmp_path, "t.jsonl", rows)}, "anatomy")
    assert found["test"]["n"] == [1, 3]
