"""`phi2.logprobs` and `phi2.score_rows` against the logits of transformers on the same files."""

from __future__ import annotations

import pytest
import torch
from transformers import PhiForCausalLM

import phi2

PROMPT, ANSWERS = "what is the boat?", [" it sank then", " the end", "?"]


@torch.no_grad()
def theirs(hf, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logps = hf(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.fixture(scope="module")
def both(tiny_phi):
    return (
        *phi2.load(tiny_phi, "cpu", "float32"),
        PhiForCausalLM.from_pretrained(tiny_phi, dtype=torch.float32).eval(),
    )


def test_log_probs_of_answers_are_those_of_transformers(both):
    model, tokenizer, hf = both
    for text, found in zip(ANSWERS, phi2.logprobs(model, tokenizer, PROMPT, ANSWERS), strict=True):
        expected = theirs(hf, tokenizer.encode(PROMPT), tokenizer.encode(text))
        assert found.logprobs == pytest.approx(expected.numpy(), abs=2e-5)


def test_both_answers_of_a_row_are_those_of_transformers(both, pair_data):
    model, tokenizer, hf = both
    rows, _ = phi2.load_data(tokenizer, pair_data)
    answers = phi2.score_rows(model, rows)
    expected = [theirs(hf, row.prompt.tolist(), answer.tolist()).sum() for row in rows for answer in row.answers]
    assert torch.allclose(answers.policy, torch.stack(expected), atol=1e-4)
