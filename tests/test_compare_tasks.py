"""Tasks of `phi2 evaluate` in a comparison: every run is asked them, and their scores stand in its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import phi2
from phi2.evaluation.config import TasksConfig
from phi2.evaluation.results import ModelResult, Score
from phi2.lab import compare
from phi2.lab.compare_config import CompareConfig
from phi2.lab.comparison import Comparison
from phi2.lab.measure import Measure, Tasks, scores_by_task

ASKED = dict(num_fewshot=0, max_gen_toks=4)


@pytest.fixture(scope="module")
def config(compare_config, task_data):
    """A CompareConfig for a run of two updates of each of two losses: config(tasks, **changes)."""

    def make(tasks: list[str], **changes) -> CompareConfig:
        asked = TasksConfig(tasks=tasks, data_dir=task_data, **ASKED)
        few = dict(max_steps=2, gradient_accumulation_steps=1, eval_steps=1, losses="sigmoid,ipo", seeds=1)
        return compare_config(**{**few, "evaluation": asked, **changes})

    return make


@pytest.fixture(scope="module")
def comparison(config) -> Comparison:
    return compare.run(config(["gsm8k", "mmlu"]))


def test_scores_are_those_that_evaluate_gives_the_run(comparison, task_data, tmp_path):
    (run,) = comparison.runs("ipo")
    where = dict(data_dir=task_data, output=str(tmp_path), device="cpu", dtype="float32")
    scores = phi2.evaluate(str(run.path), tasks=["gsm8k", "mmlu"], **where, **ASKED).models[str(run.path)].scores
    expected = {f"{score.task}/{score.metric}": score.value for score in scores}
    found = next(row["metrics"] for row in comparison.rows if row["variant"] == "ipo")
    assert {name: value for name, value in found.items() if "/" in name} == expected and len(expected) > 2
    assert found["mmlu"] == expected["mmlu/acc,none"]


def test_tasks_stand_in_the_table_the_differences_and_the_page(comparison):
    assert comparison.header[:5] == ["variant", "accuracy", "margin", "gsm8k", "mmlu"]
    assert {"gsm8k", "mmlu"} <= {one.metric for one in comparison.differences}
    assert "gsm8k" in comparison.main_differences[0]
    assert "gsm8k, mmlu: the first metric of each" in (comparison / "report.html").read_text()


def test_a_run_keeps_what_was_said(comparison):
    (run,) = comparison.runs("sigmoid")
    assert "What is 1 and 1?" in (run.path / "evaluation" / "report.html").read_text()
    assert json.loads((run.path / "evaluation" / "results.json").read_text())["models"]


def test_at_equal_steps_tasks_are_asked_behind_the_last_update_alone(comparison):
    (run,) = comparison.runs("sigmoid")
    asked = ["gsm8k" in json.loads(line) for line in (run.path / "measures.jsonl").read_text().splitlines()]
    assert asked == [False, True]


def test_at_equal_kl_tasks_are_asked_behind_every_evaluation(config):
    settings = config(["mmlu"], match="kl", losses="sigmoid")
    found = compare.run(settings)
    (run,) = found.runs("sigmoid")
    assert all("mmlu" in json.loads(line) for line in (run.path / "measures.jsonl").read_text().splitlines())
    assert found.tasks == ["mmlu"]


def test_asking_draws_no_random_number(comparison, config):
    asked = config(["mmlu"])
    bench = compare.Bench(asked, compare.variants_of(asked))
    measure = Measure(bench.session, bench.cells[0].config, None, None, False, None)
    with bench.session.policy(bench.cells[0].config) as model:
        before = torch.get_rng_state()
        measure.scores(model.eval(), Tasks(asked.asked, bench.loaded, ()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_task_is_no_resumed_comparison(comparison, config):
    with pytest.raises(ValueError, match="evaluation"):
        compare.run(config(["mmlu"], output=str(comparison.path), resume=True))


@pytest.mark.parametrize(
    ("task", "reason"), [("gsm9k", "serves the tasks ifeval, gsm8k, mmlu"), ("winogrande", "winogrande")]
)
def test_a_task_that_cannot_be_asked_is_refused_before_a_run(config, task, reason):
    asked = config([task])
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        compare.run(asked)
    assert not (Path(asked.output) / "cells").exists()


def test_toy_skills_beside_other_tasks_are_one_mean_and_each_a_score():
    scores = [Score("quiz", "right", 0.5, None, 2), Score("follow", "right", 1.0, None, 2)]
    others = [Score("gsm8k", "mean", 0.25, None, 2), Score("gsm8k", "strict", 0.0, None, 2)]
    assert scores_by_task(ModelResult([*scores, *others], [])) == {
        **{"toy": 0.75, "toy/quiz": 0.5, "toy/follow": 1.0},
        **{"gsm8k": 0.25, "gsm8k/mean": 0.25, "gsm8k/strict": 0.0},
    }
    assert np.isclose(scores_by_task(ModelResult(scores, []))["toy"], 0.75)
