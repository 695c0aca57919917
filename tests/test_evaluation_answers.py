"""Answers of an evaluation in a file: found again, by the same model only, and whole after a kill."""

from __future__ import annotations

import pytest

from phi2.checkpoints.weights import load
from phi2.evaluation.answers import Answers, fingerprint
from phi2.lora import attach
from phi2.lora_config import LoraConfig

ASKED = ("loglikelihood", ("context", " yes"))


def kept(folder, model: str = "m", rank: int = 0) -> Answers:
    return Answers(folder, model, rank)


def test_what_was_answered_is_found_again_exactly(tmp_path):
    kept(tmp_path).add(*ASKED, (-1.1000000238418579, True))
    assert kept(tmp_path).get(*ASKED) == [-1.1000000238418579, True]


@pytest.mark.parametrize(
    ("model", "kind", "args"),
    [("other", *ASKED), ("m", "generate_until", ASKED[1]), ("m", "loglikelihood", ("context", " no"))],
)
def test_another_model_kind_or_request_has_no_answer_yet(tmp_path, model, kind, args):
    kept(tmp_path).add(*ASKED, (-1.0, True))
    assert kept(tmp_path, model).get(kind, args) is None


def test_a_line_that_a_kill_left_torn_is_dropped_and_the_file_goes_on(tmp_path):
    kept(tmp_path).add(*ASKED, (-1.0, True))
    path = tmp_path / "0.jsonl"
    path.write_text(path.read_text() + '{"request": "abc", "ans')
    kept(tmp_path).add("generate_until", ("x", {}), "text")
    again = kept(tmp_path)
    assert again.get(*ASKED) == [-1.0, True] and again.get("generate_until", ("x", {})) == "text"


def test_the_answers_of_all_processes_are_found(tmp_path):
    kept(tmp_path, rank=1).add(*ASKED, (-1.0, True))
    assert kept(tmp_path, rank=0).get(*ASKED) == [-1.0, True]


def test_what_is_drawn_is_drawn_anew(tmp_path):
    args = ("x", {"do_sample": True})
    kept(tmp_path).add("generate_until", args, "text")
    assert kept(tmp_path).get("generate_until", args) is None


def test_a_fingerprint_tells_models_apart_and_knows_the_same_one(tiny_phi, make_phi):
    model, tokenizer = load(tiny_phi, "cpu", "float32")
    first = fingerprint(model, tokenizer)
    assert first == fingerprint(*load(tiny_phi, "cpu", "float32"))
    others = [load(make_phi(seed=1), "cpu", "float32"), load(tiny_phi, "cpu", "bfloat16"), (model, tokenizer)]
    attach(model, LoraConfig(r=2, target_modules=("q_proj",)), seed=0)
    assert len({first, *(fingerprint(*other) for other in others)}) == 4
