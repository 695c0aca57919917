"""What stands in docstrings and on docs/python.md is what happens."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file

import phi2

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
NUMBER = re.compile(r"-?\d+\.\d+")
EXAMPLES = [name for name in phi2.__all__ if ">>>" in (inspect.getdoc(getattr(phi2, name)) or "")]


def test_every_new_name_of_a_notebook_has_an_example():
    assert {"load_data", "logprobs", "score_rows"} <= {*EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(phi2, name), name, globs={})
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found).failed == 0


def test_every_public_name_has_a_docstring_of_its_own():
    assert [name for name in phi2.__all__ if not getattr(phi2, name).__doc__] == []


def test_a_block_is_run_and_what_it_prints_stands_below_it_where_there_is_room():
    executed = runpy.run_path(str(ROOT / "docs" / "run.py"))["executed"]
    page = "```python\na = 1\nprint(a)\n```\n\ntext\n\n```python\nprint(a + 1)\n```\n```\nold\n```\n"
    assert executed(page) == page.replace("old", "2")


def test_the_page_prints_what_stands_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    ran = runpy.run_path(str(ROOT / "docs" / "run.py"))["executed"](page)
    assert NUMBER.sub("", ran) == NUMBER.sub("", page)  # else: python docs/run.py docs/python.md
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (ran, page)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.02)  # other machines round otherwise
    trained = load_file(tmp_path / "runs" / "mine" / "adapter_model.safetensors")
    assert all(weight.any() for weight in trained.values())  # B began at zero
