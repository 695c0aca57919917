"""Answers that are streamed side by side, their pieces, their scores, and what ends them."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from torch import nn

from phi2.inference.config import SamplingParams
from phi2.inference.generate import generate
from phi2.serve.policies import Policy, loaded_policies
from phi2.serve.side_by_side import LONGEST, ask, scored, spans, stream
from phi2.tokenizer import Tokenizer

SHORT = SamplingParams(max_new_tokens=12)


def turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def two(make_phi):
    """Two random models, so long as the tests of this file run."""
    with loaded_policies([f"a={make_phi(1)}", f"b={make_phi(2)}"], device="cpu") as policies:
        yield policies


def answered(policies, text="Hello", params=SHORT):
    answers = [ask(policy, [turn(text)], params) for policy in policies]
    list(stream(answers))
    return answers


def without_chatml(policy: Policy) -> Policy:
    """It calls a token otherwise, and so has no template."""
    backend = policy.tokenizer.backend
    renamed = type(backend).from_str(backend.to_str().replace("<|im_start|>", "<|im_begin|>"))
    return policy._replace(tokenizer=Tokenizer(renamed, {}))


def test_each_says_what_it_would_say_alone(two):
    answers = answered(two, params=SamplingParams(max_new_tokens=12, temperature=1.0, seed=3))
    alone = [
        generate(p.model, p.tokenizer, [turn("Hello")], max_new_tokens=12, temperature=1.0, seed=3).text for p in two
    ]
    assert [answer.text for answer in answers] == alone


def test_whoever_leaves_frees_the_engine(two):
    endless = SamplingParams(max_new_tokens=200)
    with closing(stream([ask(policy, [turn("Hello")], endless) for policy in two])) as arrivals:
        next(arrivals)
    for policy in two:
        assert policy.worker.run(lambda _, worker=policy.worker: worker._engine.is_idle).result()


def test_the_pieces_are_the_text_and_have_every_token_once(two):
    (answer,) = answered(two[:1], params=SamplingParams(max_new_tokens=40, temperature=1.0))  # broken characters too
    pieces = [span for span in spans(answer) if not span.ends_turn]
    assert "".join(span.text for span in pieces) == answer.text
    assert [token for span in spans(answer) for token in range(span.start, span.end)] == list(range(len(answer.chunks)))


def test_the_token_that_ends_an_answer_is_a_piece_too(two):
    model = two[0].model
    bias = model.lm_head.bias.detach().clone()
    with torch.no_grad():
        model.lm_head.bias[two[0].tokenizer.turn_end_id] += 1e4
    (answer,) = answered(two[:1])
    with torch.no_grad():
        model.lm_head.bias.copy_(bias)
    assert [(span.text, span.ends_turn) for span in spans(answer)] == [("<|im_end|>", True)]


def test_scores_are_those_of_the_answer_itself_and_of_the_other(two):
    answers = answered(two)
    told = scored(answers, two)
    for answer, of_one in zip(answers, told, strict=True):
        drawn = [chunk.logprob for chunk in answer.chunks]
        assert of_one[answer.policy.name] == pytest.approx(drawn, abs=1e-4)
    other = two[1].model
    ids = torch.tensor([[*answers[0].request.ids, *(chunk.token_id for chunk in answers[0].chunks)]])
    start = len(answers[0].request.ids)
    logps = other(ids).log_softmax(-1)[0, start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
    assert told[0]["b"] == pytest.approx(logps.tolist(), abs=1e-4)


def test_who_reads_other_tokens_has_no_score(two):
    (told,) = scored(answered(two[:1]), [two[0], without_chatml(two[1])])
    assert set(told) == {"a"}


def test_old_turns_are_left_out_and_that_is_told(two):
    past = [turn("x" * 150), {"role": "assistant", "content": "y"}]
    answer = ask(two[0], [*past, turn("Why?")], SamplingParams(max_new_tokens=100))
    assert answer.notice == "the 2 oldest messages no longer fit the context of 256 tokens"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x" * (LONGEST + 1), "a message has 100,001 characters, at most 100,000 are read"),
        ("x" * 300, "at most 255 leave room for a reply"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_in_words(two, text, told):
    with pytest.raises(ValueError, match=told):
        ask(two[0], [turn(text)], SHORT)


def test_a_model_without_a_chat_template_says_so(two):
    with pytest.raises(ValueError, match="a has no chat template, so it cannot chat"):
        ask(without_chatml(two[0]), [turn("Hello")], SHORT)


def test_one_that_fails_does_not_take_the_other_along(two, make_phi):
    broken: Policy = two[0]
    bias = broken.model.lm_head.bias.detach().clone()
    nn.init.constant_(broken.model.lm_head.bias, float("nan"))
    answers = answered(two)
    with torch.no_grad():
        broken.model.lm_head.bias.copy_(bias)
    assert "non-finite logits; first in lm_head" in answers[0].error and answers[1].error is None
    assert answered(two)[0].error is None
