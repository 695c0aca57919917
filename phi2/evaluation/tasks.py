"""From names of tasks to tasks of lm-evaluation-harness, with their data from the hub or from a folder.

The harness reads every one of its 14000 task files to find one, which takes a quarter of a minute. The five tasks of
phi-2-instruct's model card are known here by their folders; only another name makes it read them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lm_eval import tasks as harness
from lm_eval.tasks import TaskManager

from phi2.evaluation.local_data import local_files, subjects_of
from phi2.evaluation.published import CARD
from phi2.files import one_line

HERE = Path(harness.__file__).parent


@dataclass(frozen=True)
class Loaded:
    """What the harness evaluates.

    Attributes:
        tasks: as `lm_eval.evaluate` takes them.
        samples_of: for each name that was asked for, the tasks whose samples count.
        shots: for each name.
        files: local ones, by task and split.
        notes: what a reader must know of them.
    """

    tasks: dict[str, Any]
    samples_of: dict[str, list[str]]
    shots: dict[str, int]
    files: dict[str, str]
    notes: list[str]

    @property
    def card(self) -> list[str]:
        """Those of the names that the model card has."""
        return [name for name in self.samples_of if name in CARD]


def load_tasks(names: Sequence[str], data_dir: str | None = None, num_fewshot: int | None = None) -> Loaded:
    """The tasks of these names, each with the shots of the model card, else its own, unless `num_fewshot` says another.

    Args:
        data_dir: a folder of local files in place of the hub, for the tasks of the card.
    Raises:
        FileNotFoundError: when the folder or a file in it is missing.
        ValueError: for a name that the harness does not have, with the nearest, and for data that cannot be reached.
    """
    files: dict[str, str] = {}
    notes: list[str] = []
    with _manager(names, data_dir, files, notes) as manager:
        known = set(manager.all_tasks)
        for name in names:
            if name not in known:
                near = get_close_matches(name, [*known, "toy"], 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"no task is called {name!r}{hint} The card's are {', '.join(CARD)}")
        loaded = {name: _load(manager, name) for name in names}
    if "ifeval" in loaded:
        _require_sentences()
    for name, parts in loaded.items():
        shots = CARD[name].shots if num_fewshot is None and name in CARD else num_fewshot
        for task in parts["tasks"].values():
            _set_shots(task, shots)
    tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for parts in loaded.values():
        for kind in tasks:
            tasks[kind] |= parts[kind]
    parts_of = {name: [*parts["tasks"]] for name, parts in loaded.items()}
    shots_of = {name: max(tasks["tasks"][part].get_config("num_fewshot") for part in parts_of[name]) for name in names}
    return Loaded(tasks, parts_of, shots_of, files, notes)


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except OSError as error:  # of a data set: not there, not reachable, HF_HUB_OFFLINE
        raise ValueError(
            f"{name}: its data cannot be had ({one_line(error)}); give a data_dir of local files"
        ) from error


def _require_sentences() -> None:
    """What IFEval counts sentences with is downloaded when its task is loaded, and missed when it grades."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        hint = "set NLTK_DATA to a folder with tokenizers/punkt_tab"
        raise ValueError(f"ifeval: nltk's punkt_tab is not here and cannot be downloaded; {hint}") from error


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness does: a task that says it has none keeps none."""
    if shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


@contextmanager
def _manager(
    names: Sequence[str], data_dir: str | None, files: dict[str, str], notes: list[str]
) -> Iterator[TaskManager]:
    """Knows at least the named tasks."""
    if data_dir is not None:
        with TemporaryDirectory(prefix="phi2-tasks-") as folder:
            for name in names:
                found = _write_local_task(name, Path(data_dir), Path(folder), notes)
                files |= {f"{name}, {split}": path for split, path in found.items()}
            yield TaskManager(include_path=folder, include_defaults=False)
    elif all(name in CARD for name in names):
        yield _manager_of(names)
    else:
        yield TaskManager()


def _manager_of(names: Sequence[str]) -> TaskManager:
    return TaskManager(include_path=[HERE / CARD[name].folder for name in names], include_defaults=False)


def _write_local_task(name: str, data_dir: Path, folder: Path, notes: list[str]) -> dict[str, str]:
    """Task files that include the harness's own and read local data, which is returned; groups hold what has some."""
    if name not in CARD:
        raise ValueError(f"data_dir serves the tasks {', '.join(CARD)}, got {name!r}")
    files, entries = local_files(data_dir, name), _manager_of([name]).task_index
    if name == "mmlu":
        _write_subjects(entries, files, folder, notes)
    else:
        _write(folder, name, _local(entries[name], files))
    return files


def _write_subjects(entries: dict[str, Any], files: dict[str, str], folder: Path, notes: list[str]) -> None:
    """MMLU: a task for each subject that the files have rows of, in the groups that the harness puts them in."""
    subjects = subjects_of(files["test"]) & subjects_of(files["dev"])
    tasks = {name: entry for name, entry in entries.items() if entry.kind.name == "TASK"}
    chosen = {name: entry for name, entry in tasks.items() if entry.cfg["dataset_name"] in subjects}
    if not chosen:
        raise ValueError(f"{files['test']}: no row has one of MMLU's subjects in its column subject")
    if len(chosen) < len(tasks):
        notes.append(f"mmlu: {len(chosen)} of its {len(tasks)} subjects")
    for name, entry in chosen.items():
        _write(folder, name, _local(entry, files, entry.cfg["dataset_name"]))
    tags = {entry.cfg["tag"] for entry in chosen.values()}
    parts = {name: entry.cfg for name, entry in entries.items() if entry.kind.name == "GROUP" and name != "mmlu"}
    kept = {name: cfg for name, cfg in parts.items() if not tags.isdisjoint(cfg["task"])}
    for name, cfg in {**kept, "mmlu": {**entries["mmlu"].cfg, "task": [*kept]}}.items():
        _write(folder, name, cfg)


def _local(entry: Any, files: dict[str, str], subject: str | None = None) -> dict[str, Any]:
    return {
        "include": str(entry.yaml_path),
        "task": entry.name,
        "custom_dataset": LocalFunction("phi2.evaluation.local_data.local_dataset"),
        "dataset_kwargs": {"task_name": entry.name, "files": files, "subject": subject},
    }


class LocalFunction(str):
    """The dotted name of a function, which the harness imports."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(LocalFunction, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _write(folder: Path, name: str, config: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.dump(config, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
