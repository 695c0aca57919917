"""Scores and paired differences, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phi2.evaluation.results import MEAN, Evaluation, ModelResult, scores_of
from phi2.evaluation.samples import Sample, samples_of, shares


def graded(task: str, *values, metric: str = "acc,none") -> list[Sample]:
    return [Sample(task, i, f"q{i}", "a", "a", scores={metric: value}) for i, value in enumerate(values)]


def side_by_side(**models: list[Sample]) -> Evaluation:
    return Evaluation({name: ModelResult(scores_of("t", s), s) for name, s in models.items()}, [])


def test_a_share_has_the_standard_error_of_a_mean():
    (score,) = scores_of("t", graded("t", 1.0, 1.0, 0.0, 1.0))
    assert score.value == 0.75 and score.stderr == pytest.approx(0.25)  # sqrt(0.75 / 3 / 4) = sqrt(0.0625)
    assert str(score) == "75.00 ± 25.00"


def test_samples_with_parts_weigh_by_their_parts():
    # 2 of 2 and 1 of 4: r = 3/6, mean(m) = 3; contributions 1/2 + (2 - 1)/3 and 1/2 + (1 - 2)/3.
    assert shares(graded("t", [1.0, 1.0], [1.0, 0.0, 0.0, 0.0]), "acc,none") == pytest.approx([5 / 6, 1 / 6])


def test_a_value_that_is_no_mean_of_its_samples_is_the_harnesss_and_is_not_compared():
    reported = {"acc,none": 0.4, "acc_stderr,none": 0.1, "alias": "t"}
    (score,) = scores_of("t", graded("t", 1.0, 0.0), reported)
    assert (score.value, score.stderr, score.values) == (0.4, 0.1, None)


def test_a_task_of_the_card_begins_with_the_mean_of_its_metrics():
    samples = [
        Sample("gsm8k", i, "q", "a", "a", scores={"m,a": a, "m,b": b}) for i, (a, b) in enumerate([(1, 1), (0, 1)])
    ]
    scores = scores_of("gsm8k", samples)
    assert [(score.metric, score.value) for score in scores] == [(MEAN, 0.75), ("m,a", 0.5), ("m,b", 1.0)]


def test_a_difference_is_paired():
    (difference,) = side_by_side(base=graded("t", 0.0, 1.0, 0.0, 1.0), dpo=graded("t", 1.0, 1.0, 0.0, 1.0)).differences
    # Differences 1, 0, 0, 0: mean 1/4, variance 1/4, standard error 1/4.
    half = 1.959964 / 4
    assert (difference.model, difference.value) == ("dpo", 0.25)
    assert (difference.low, difference.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_pairing_is_narrower_than_two_samples_where_models_agree():
    draw = np.random.default_rng(0)
    base = draw.integers(0, 2, 400).astype(float)
    other = np.where(draw.random(400) < 0.05, 1.0, base)
    evaluation = side_by_side(base=graded("t", *base), other=graded("t", *other))
    a, b = (model.scores[0].stderr for model in evaluation.models.values())
    (difference,) = evaluation.differences
    assert difference.high - difference.low < 0.5 * 2 * 1.959964 * math.hypot(a, b)


def test_the_table_has_a_line_for_each_metric_and_published_values_once_a_task():
    samples = [Sample("gsm8k", 0, "q", "a", "a", scores={"m,a": 1.0, "m,none": 0.0})]
    evaluation = Evaluation({"m": ModelResult(scores_of("gsm8k", samples), samples)}, ["a note"])
    lines = str(evaluation).splitlines()
    assert len(lines) == 5 and lines[-1] == "a note"
    assert lines[1].split() == ["gsm8k", "mean", "of", "its", "metrics", "1", "50.00", "56.44", "56.75"]
    assert lines[2].split() == ["m,", "a", "1", "100.00"] and lines[3].split() == ["m", "1", "0.00"]


def entry(**changes) -> dict:
    plain = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0, "target": 1}
    return plain | {"arguments": [("Q", " no"), ("Q", " yes")], "resps": [[(-2.0, False)], [(-1.0, True)]]} | changes


def test_a_choice_is_read_as_the_likeliest_option():
    (sample,) = samples_of("t", [entry()])
    assert (sample.prompt, sample.answer, sample.expected) == ("Q", " yes", " yes")
    assert sample.options == {" no": -2.0, " yes": -1.0} and sample.scores == {"acc,none": 1.0}


def test_options_within_the_context_are_told_apart():
    arguments = [("Sarah is", " kind"), ("Sam is", " kind")]
    (sample,) = samples_of("t", [entry(arguments=arguments, target=" kind")])
    assert sample.prompt == "Sa" and sample.options == {"rah is kind": -2.0, "m is kind": -1.0}


def test_filters_of_one_answer_are_metrics_of_one_sample():
    said = dict(arguments=[("Q", {"until": []})], resps=[["text"]], target="right")
    (sample,) = samples_of("t", [entry(**said, filter="strict"), entry(**said, filter="loose", acc=0.0)])
    assert (sample.answer, sample.expected) == ("text", "right")
    assert sample.scores == {"acc,strict": 1.0, "acc,loose": 0.0}
