"""The data of the card's tasks from files on this machine, found by their names.

A file may be JSON lines or one JSON list, with the columns of the task's set on the hub; TruthfulQA's own file, where
the answers are the keys of a mapping, is read too.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from phi2.evaluation.published import CARD
from phi2.files import one_line


def local_files(folder: Path, task: str) -> dict[str, str]:
    """For each split that a task reads, the .jsonl or .json file below `folder` whose path has the words of both.

    Raises:
        FileNotFoundError: when there is no such folder, or no such file in it.
        ValueError: when several files fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl"))
    return {split: str(_only(folder, paths, words)) for split, words in CARD[task].data.items()}


def _only(folder: Path, paths: list[Path], words: tuple[str, ...]) -> Path:
    fitting = [path for path in paths if all(word in str(path.relative_to(folder)).lower() for word in words)]
    if not fitting:
        raise FileNotFoundError(f"{folder}: no .jsonl or .json file with {' and '.join(words)} in its path")
    if len(fitting) > 1:
        several = ", ".join(str(path.relative_to(folder)) for path in fitting)
        raise ValueError(f"{folder}: {' and '.join(words)} name several files, keep one of {several}")
    return fitting[0]


@lru_cache(maxsize=16)
def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        ValueError: naming the file, and the line, that is not JSON.
    """
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        lines = {"": text}
    else:
        lines = {f" line {number}": line for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    rows: list[dict[str, Any]] = []
    for where, line in lines.items():
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}{where}: not valid JSON ({one_line(error)})") from error
        rows += row if isinstance(row, list) else [row]
    return rows


def subjects_of(path: str) -> set[str]:
    return {str(row.get("subject")) for row in read_rows(path)}


def local_dataset(task_name: str, files: dict[str, str], subject: str | None = None, **_: Any) -> dict[str, Any]:
    """What `datasets.load_dataset` would give: a data set for each split. The harness calls it by its name.

    Args:
        subject: of MMLU; rows of others are left out.
    """
    from datasets import Dataset

    rows_of = {split: read_rows(path) for split, path in files.items()}
    if subject is not None:
        rows_of = {split: [row for row in rows if row["subject"] == subject] for split, rows in rows_of.items()}
    if task_name == "truthfulqa_mc2":
        rows_of = {split: [_with_choices(row) for row in rows] for split, rows in rows_of.items()}
    return {split: Dataset.from_list(rows) for split, rows in rows_of.items()}


def _with_choices(row: dict[str, Any]) -> dict[str, Any]:
    """A row of TruthfulQA with {"choices", "labels"} in place of {answer: label}."""
    return row | {
        name: {"choices": [*targets], "labels": [*targets.values()]}
        for name, targets in row.items()
        if name in ("mc1_targets", "mc2_targets") and "choices" not in targets
    }
