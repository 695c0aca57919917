"""The proofs of losses and modifiers notice every mutant, and the page that says so is what the script prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.filterwarnings("ignore")
def test_no_mutant_of_a_loss_survives_and_the_committed_page_tells_it():
    spec = importlib.util.spec_from_file_location("mutate_losses", HERE / "mutate_losses.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text, survivors = script.report()
    assert survivors == []
    assert (HERE.parent / "docs" / "losses_checks.md").read_text(encoding="utf-8") == text
