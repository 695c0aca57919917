"""Our model in lm-evaluation-harness against its own `hf`: the same log-likelihoods and texts, sample by sample."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi2.checkpoints.weights import save_pretrained
from phi2.config import Phi2Config
from phi2.evaluation.harness import Phi2LM
from phi2.evaluation.published import CARD
from phi2.evaluation.tasks import load_tasks
from phi2.hub import resolve
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

pytestmark = pytest.mark.real_data
logging.getLogger("lm_eval").setLevel(logging.ERROR)
ROWS, NEW_TOKENS = 2, 12


@pytest.fixture(scope="module")
def random_phi(shared, tmp_path_factory) -> Path:
    """A random Phi of 30 M parameters with the tokenizer, the template and the context of phi-2-instruct."""
    tokenizer = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    ends = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    config = Phi2Config(**shape, **ends, partial_rotary_factor=0.5, initializer_range=0.1)
    model = Phi2ForCausalLM(config)
    model.init_weights(0)
    with torch.no_grad():  # neither says ids without a token
        model.lm_head.bias[len(tokenizer) :] = -1e4
    folder = tmp_path_factory.mktemp("random")
    save_pretrained(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def both(shared, random_phi):
    """both(name) -> our model and theirs, in float32; both(name, chat) -> the samples of both."""
    folders = {"nano": resolve("nano"), "random": random_phi}

    @cache
    def models(name: str) -> tuple[Phi2LM, HFLM]:
        folder = folders[name]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return (
            Phi2LM(str(folder), device="cpu", dtype="float32"),
            HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, device="cpu"),
        )

    @cache
    def samples(name: str, chat: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        ours, theirs = (_samples(model, shared, chat, 1 if name == "random" else ROWS) for model in models(name))
        return [pair for task in ours for pair in zip(ours[task], theirs[task], strict=True)]

    models.samples = samples
    return models


def _samples(model: Any, shared: Path, chat: bool, rows: int) -> dict[str, list[dict[str, Any]]]:
    loaded = load_tasks([*CARD], str(shared / "data" / "eval"))
    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(1234)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": NEW_TOKENS}, update=True)
    result = lm_eval.evaluate(model, loaded.tasks, rows, bootstrap_iters=0, apply_chat_template=chat)
    return result["samples"]


CASES = [("nano", False), ("nano", True), ("random", True)]


@pytest.fixture(autouse=True, scope="module")
def nltk_data(shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLTK_DATA", str(shared / "data" / "nltk_data"))
        yield


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_log_likelihoods_are_those_of_the_hf_backend(both, name, chat):
    compared = 0
    for ours, theirs in both.samples(name, chat):
        assert ours["arguments"] == theirs["arguments"]
        for (mine,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
            if isinstance(mine, tuple):
                compared += 1
                assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]
    assert compared >= 15


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_texts_are_those_of_the_hf_backend(both, name, chat):
    texts = [
        (mine, other)
        for ours, theirs in both.samples(name, chat)
        for (mine,), (other,) in zip(ours["resps"], theirs["resps"], strict=True)
        if isinstance(mine, str)
    ]
    assert len({mine for mine, _ in texts}) > 1 and all(mine == other for mine, other in texts)


def answers(models: tuple[Phi2LM, HFLM], kind: str, *requests: tuple) -> list[list[Any]]:
    """What both answer to requests of one kind."""
    made = [Instance(kind, {}, args, index) for index, args in enumerate(requests)]
    return [getattr(model, kind)(made, disable_tqdm=True) for model in models]


def test_what_is_too_long_is_cut_from_the_left_as_the_hf_backend_does(both):
    text = "one two three " * 300
    ours, theirs = answers(both("nano"), "loglikelihood", (text, " four"), (text, " five six"), ("", text[:99]))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)


def test_a_whole_text_is_scored_in_the_windows_of_the_hf_backend(both):
    ours, theirs = answers(both("nano"), "loglikelihood_rolling", ("a b c " * 700,), ("short",))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_long_prompts_leave_room_for_the_answer_as_the_hf_backend_does(both):
    settings = {"until": ["\n\n"], "max_gen_toks": 20}
    ours, theirs = answers(both("nano"), "generate_until", ("one two three " * 300, settings), ("Hello", settings))
    assert ours == theirs


def test_an_open_last_turn_is_rendered_as_the_hf_backend_does(both):
    chat = [{"role": "user", "content": "Say A. "}, {"role": "assistant", "content": "The answer is "}]
    for name in ("nano", "random"):
        ours, theirs = (model.apply_chat_template(chat, add_generation_prompt=False) for model in both(name))
        assert ours == theirs and ours.endswith("The answer is ")
