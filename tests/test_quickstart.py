"""The whole recipe, for a few steps: through the real training, merging, grading and reporting."""

from __future__ import annotations

import json
from unittest import mock

import pytest

from phi2.checkpoints.weights import load
from phi2.demo.quickstart import Budget, quickstart
from phi2.lab.comparison import Comparison

TINY = Budget(sft_steps=2, dpo_steps=2, questions=2, held_out_rows=16, compare_steps=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    fewer = mock.patch("phi2.lab.measure.PROMPTS", 4), mock.patch("phi2.lab.compare_config.TOY_QUESTIONS", 1)
    with mock.patch("phi2.demo.quickstart.SEEDS", 1), fewer[0], fewer[1]:
        return folder, quickstart(str(folder), seed=0, budget=TINY)


def test_it_leaves_two_runs_and_a_report(done):
    folder, report = done
    assert report == folder / "report.html" and report.is_file()
    for run, result in (("sft", "model"), ("dpo", "adapter")):
        assert (folder / run / result).is_dir()
        assert (folder / run / "report.html").is_file()


def test_the_merged_models_load_and_differ_from_each_other(done):
    folder, _ = done
    tuned, aligned = (load(folder / run / "model")[0].state_dict() for run in ("sft", "dpo"))
    name = "model.layers.0.mlp.fc1.weight"
    assert not tuned[name].equal(load("nano")[0].state_dict()[name]) and not tuned[name].equal(aligned[name])


def test_dpo_goes_on_from_the_merged_sft_model(done):
    folder, _ = done
    settings = json.loads((folder / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "sft" / "model")


def test_the_report_compares_the_three_models_on_every_skill(done):
    _, report = done
    text = report.read_text(encoding="utf-8")
    for told in ("base", "SFT", "DPO", "follow", "arithmetic", "quiz", "truthful", "coreference", "among 2,"):
        assert told in text


def test_it_compares_losses_from_the_model_that_sft_left(done):
    folder, _ = done
    comparison = Comparison(folder / "compare")
    assert comparison.variants == ["sigmoid", "ipo", "simpo"] and comparison.metrics["accuracy"].shape == (3, 1)
    assert (comparison / "report.html").is_file()


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        quickstart(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="dpo_steps must be at least 1, got 0"):
        Budget(dpo_steps=0)
