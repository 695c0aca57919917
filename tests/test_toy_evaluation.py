"""Grading a model on the toy skills: the interval, and that grades come from what the model says."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi2.checkpoints.weights import load
from phi2.data.toy.skills import SKILLS, grade, items
from phi2.evaluation import toy as evaluation
from phi2.evaluation.toy import Score, evaluate, wilson
from phi2.inference.generate import generate
from phi2.inference.replies import Generation


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def test_the_interval_is_wilsons():
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_the_interval_are_z_standard_errors_of_their_own_away(case):
    successes, n = case
    for end in wilson(successes, n):
        if 1e-6 < end < 1 - 1e-6:
            error = math.sqrt(end * (1 - end) / n)
            assert abs(successes / n - end) == pytest.approx(evaluation.Z_95 * error, abs=1e-9)


@pytest.mark.parametrize("successes", [0, 20])
def test_the_interval_has_a_width_where_all_answers_agree(successes):
    low, high = Score(successes, 20).interval
    assert 0 <= low < high <= 1 and high - low > 0.1


def test_a_score_prints_its_share_with_the_interval():
    assert str(Score(5, 10)) == "50.0% [23.7%, 76.3%]"


def answering(answer):
    """A stand-in for `generate_batch` that answers each conversation with `answer(question)`."""

    def generate(model, tokenizer, prompts, **sampling):
        texts = [answer(messages[-1]["content"]) for messages in prompts]
        return [Generation(text, [], [], "stop", 1, 1.0, 1.0) for text in texts]

    return generate


def test_every_answer_is_graded_against_its_own_question(monkeypatch):
    right = {item.messages[-1].content: item.answer for skill in SKILLS for item in items(skill, "test", 70, 3)}
    monkeypatch.setattr(evaluation, "generate_batch", answering(right.get))
    assert {skill: score.rate for skill, score in evaluate(None, None, 70, 3).items()} == dict.fromkeys(SKILLS, 1.0)


def test_wrong_answers_are_counted_as_wrong(monkeypatch):
    asked = [item for skill in SKILLS for item in items(skill, "test", 40, 3)]
    draw = random.Random(0)
    said = {item.messages[-1].content: draw.choice((item.answer, item.wrong[0])) for item in asked}
    monkeypatch.setattr(evaluation, "generate_batch", answering(said.get))
    scores = evaluate(None, None, 40, 3)
    for skill in SKILLS:
        asked = items(skill, "test", 40, 3)
        assert scores[skill].successes == sum(grade(item, said[item.messages[-1].content]) for item in asked)


def test_transcripts_hold_what_was_asked_said_and_right(monkeypatch):
    monkeypatch.setattr(evaluation, "generate_batch", answering(lambda question: " nothing "))
    first = evaluate(None, None, 5, 0)["quiz"].transcripts[0]
    item = items("quiz", "test", 5, 0)[0]
    assert first == evaluation.Transcript(item.messages[-1].content, "nothing", item.answer, False)


def test_a_batch_is_graded_as_its_questions_one_by_one(nano):
    model, tokenizer = nano
    together = evaluate(model, tokenizer, 2, seed=1)
    item = items("truthful", "test", 2, 1)[1]
    alone = generate(model, tokenizer, [m._asdict() for m in item.messages], max_new_tokens=evaluation.MAX_NEW_TOKENS)
    assert together["truthful"].transcripts[1].answer == alone.text.strip()


def test_the_longest_right_answer_fits_the_tokens_allowed(nano):
    _, tokenizer = nano
    answers = [item.answer for skill in SKILLS for item in items(skill, "test", 400)]
    assert max(len(tokenizer.encode(answer)) for answer in answers) < evaluation.MAX_NEW_TOKENS


def test_the_model_is_left_in_the_mode_it_was_in(nano):
    model, tokenizer = nano
    model.train()
    evaluate(model, tokenizer, 1)
    assert model.training
    model.eval()


def test_fewer_than_one_question_is_refused():
    with pytest.raises(ValueError, match="questions must be at least 1, got 0"):
        evaluate(None, None, 0)


def test_the_same_seed_gives_the_same_grades(nano):
    torch.manual_seed(0)
    first = evaluate(*nano, 3, seed=5)
    torch.manual_seed(1)
    assert evaluate(*nano, 3, seed=5) == first
