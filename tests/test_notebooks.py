"""The notebooks: they run from top to bottom on nano, are saved with clean outputs, and hold the original's recipe."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from phi2.files import read_yaml
from phi2.keywords import config_of
from phi2.runs.folder import to_plain
from phi2.training.config import DPOConfig, SFTConfig

ROOT = Path(__file__).parents[1]
FEW = {"1_sft": {"STEPS": 2}, "2_dpo": {"STEPS": 2}, "3_evaluation": {"QUESTIONS": 2}, "4_chat": {}}
execute = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["execute"]


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown_by(notebook: nbformat.NotebookNode, kind: str) -> str:
    return "".join(output.get("data", {}).get(kind, "") for output in outputs_of(notebook))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All of them in their order, in one folder; a cell that raises is an error here."""
    folder = tmp_path_factory.mktemp("notebooks")
    return {name: execute(path_of(name), folder, **few) for name, few in FEW.items()}


def test_every_notebook_is_run_here():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(FEW)


def test_all_notebooks_run_from_top_to_bottom_in_their_order(ran):
    for name, notebook in ran.items():
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == [*range(1, len(counts) + 1)], name


def test_a_notebook_warns_of_nothing(ran):
    told = [o.text for notebook in ran.values() for o in outputs_of(notebook) if o.get("name") == "stderr"]
    assert told == []


@pytest.mark.parametrize("name", FEW)
def test_a_saved_notebook_holds_the_outputs_of_one_run(name):
    cells = [cell for cell in nbformat.read(path_of(name), as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(bool(cell.outputs) for cell in cells) >= 3


@pytest.mark.parametrize("name", ["1_sft", "2_dpo"])
def test_a_saved_notebook_of_training_shows_its_loss_curve(name):
    assert 'aria-label="Loss"' in shown_by(nbformat.read(path_of(name), as_version=4), "text/html")


@pytest.mark.parametrize("name", FEW)
def test_a_saved_notebook_holds_no_folder_of_a_machine_no_progress_bar_and_no_warning(name):
    notebook = nbformat.read(path_of(name), as_version=4)
    assert {output.get("name") for output in outputs_of(notebook)} <= {"stdout", None}
    assert not re.search(r"(?<![\w./<])/(tmp|home|root|usr|opt|Users)/|Warning|\d+%\|", str(outputs_of(notebook)))


@pytest.mark.parametrize(
    "name, recipe, kind, elsewhere",
    [
        ("1_sft", "phi2_instruct_sft.yaml", SFTConfig, {"model": "microsoft/phi-2", "output": "runs/sft"}),
        ("2_dpo", "phi2_instruct_dpo.yaml", DPOConfig, {"model": "runs/sft-merged", "output": "runs/dpo"}),
    ],
)
def test_the_other_name_is_the_recipe_of_the_original(name, recipe, kind, elsewhere):
    cells = nbformat.read(path_of(name), as_version=4).cells
    source = next(cell.source for cell in cells if "SETTINGS = {" in cell.source)
    names = {"MODEL": "microsoft/phi-2", "STEPS": 1}
    exec(source, names)
    ours = config_of(kind, {**names["SETTINGS"], **elsewhere})
    theirs = replace(config_of(kind, read_yaml(ROOT / "recipes" / recipe)), **elsewhere)
    assert to_plain(ours) == to_plain(theirs)


def test_a_value_that_a_notebook_does_not_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"4_chat\.ipynb: its first cell does not set STEPS"):
        execute(path_of("4_chat"), tmp_path, STEPS=1)
