"""Our model in lm-evaluation-harness, where it needs no oracle: settings, templates, caches. Parity is tests/parity."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from phi2.checkpoints.weights import load
from phi2.evaluation.answers import Answers
from phi2.evaluation.harness import Phi2LM
from phi2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def phi(tiny_phi) -> Phi2LM:
    return Phi2LM(*load(tiny_phi, "cpu", "float32"))


def requests(kind: str, *args: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(args)]


def with_template(phi: Phi2LM, source: str) -> Phi2LM:
    tokenizer = Tokenizer(phi.tokenizer.backend, {}, source)
    return Phi2LM(phi.model, tokenizer)


def test_it_is_a_model_of_the_harness_by_name(tiny_phi):
    made = get_model("phi2").create_from_arg_string(f"pretrained={tiny_phi},dtype=float32", {"device": "cpu"})
    assert isinstance(made, Phi2LM) and made.max_length == 256


def test_transformers_is_not_loaded():
    code = "import sys, phi2.evaluation.harness, phi2.evaluation.tasks, lm_eval.evaluator; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"transformers", "accelerate", "peft"}.isdisjoint(done.stdout.split())


def test_a_text_ends_before_the_first_stop_string(phi):
    (whole,) = phi.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 12})), disable_tqdm=True)
    stop = whole[4:6]
    (cut,) = phi.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 12, "until": [stop]})), True)
    assert len(whole) > 6 and cut == whole.split(stop)[0]


def test_requests_of_different_settings_keep_their_order(phi):
    asked = [("ab", {"max_gen_toks": 2}), ("th", {"max_gen_toks": 9}), ("abc", {"max_gen_toks": 2})]
    together = phi.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert together == [phi.generate_until(requests("generate_until", one), disable_tqdm=True)[0] for one in asked]


def test_drawn_texts_follow_temperature(phi):
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    drawn, greedy = (
        phi.generate_until(requests("generate_until", ("ab", one)), disable_tqdm=True)
        for one in (settings, {"max_gen_toks": 8})
    )
    assert drawn != greedy


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 4}, "generation settings must be of until, .*, got num_beams"),
        ({"max_gen_toks": 256}, "256 new tokens are asked for, more than the model's context of 256 has room for"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(phi, settings, reason):
    with pytest.raises(ValueError, match=reason):
        phi.generate_until(requests("generate_until", ("a", settings)), disable_tqdm=True)


def test_an_open_turn_ends_where_its_words_do_also_under_a_template_that_trims(phi):
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answer is "}]
    plain = with_template(phi, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    trims = with_template(phi, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert plain.apply_chat_template(chat, add_generation_prompt=False) == "[Q][The answer is "
    assert trims.apply_chat_template(chat, add_generation_prompt=False) == "[Q][The answer is"


def test_a_template_without_system_messages_goes_without_and_says_so(phi):
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = with_template(phi, strict + "[{{ m.content }}]{% endfor %}")
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    with pytest.warns(UserWarning, match="system messages are left out: .*no system"):
        assert model.apply_chat_template(chat) == "[Q]"


def test_the_harnesss_cache_and_our_answers_hear_of_every_answer(phi, tmp_path):
    heard = []
    model = Phi2LM(phi.model, phi.tokenizer, answers=Answers(tmp_path, "m"))
    model.cache_hook.add_partial = lambda kind, args, answer: heard.append((kind, args, answer))
    asked = {
        "loglikelihood": [("ab", " c"), ("ab", " d"), ("", "the")],
        "loglikelihood_rolling": [("the end",)],
        "generate_until": [("ab", {"max_gen_toks": 3})],
    }
    for kind, args in asked.items():
        found = getattr(model, kind)(requests(kind, *args), disable_tqdm=True)
        assert {repr(one[:2]): one[2] for one in heard if one[0] == kind} == {
            repr((kind, one)): answer for one, answer in zip(args, found, strict=True)
        }
        kept = [model.answers.get(kind, one) for one in args]
        assert [tuple(one) if isinstance(one, list) else one for one in kept] == found


def test_what_was_answered_is_not_asked_again(phi, tmp_path, monkeypatch):
    asked = [("ab", " c"), ("ab", " d")]
    first = Phi2LM(phi.model, phi.tokenizer, answers=Answers(tmp_path, "m"))
    before = first.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    again = Phi2LM(phi.model, phi.tokenizer, answers=Answers(tmp_path, "m"))
    seen = []
    monkeypatch.setattr("phi2.evaluation.harness.score", lambda model, some: seen.extend(some) or iter(()))
    with pytest.MonkeyPatch.context():
        after = again.loglikelihood(requests("loglikelihood", asked[1], asked[0]), disable_tqdm=True)
    assert after == before[::-1] and not seen
