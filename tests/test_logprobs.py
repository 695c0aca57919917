"""Log-probabilities of given answers: those of a forward pass each, and those that a preference run sees."""

from __future__ import annotations

import pytest
import torch

import phi2

PROMPT, ANSWERS = "the boat", [" sank then", "s are there", "!"]


@pytest.fixture(scope="module")
def loaded(tiny_phi):
    return phi2.load(tiny_phi, "cpu", "float32")


@torch.no_grad()
def test_every_answer_has_the_log_probs_of_a_pass_of_its_own(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.encode(PROMPT)
    for text, found in zip(ANSWERS, phi2.logprobs(model, tokenizer, PROMPT, ANSWERS), strict=True):
        ids = tokenizer.encode(text)
        logps = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        alone = logps[torch.arange(len(ids)), torch.tensor(ids)]
        assert (found.text, found.token_ids) == (text, ids)
        assert found.logprobs == pytest.approx(alone.numpy(), abs=2e-5)
        assert found.total == pytest.approx(alone.sum().item(), abs=1e-4)
        assert found.per_token == pytest.approx(alone.mean().item(), abs=2e-5)


def test_one_answer_gives_one_result(loaded):
    one, (same,) = phi2.logprobs(*loaded, PROMPT, " sank"), phi2.logprobs(*loaded, PROMPT, [" sank"])
    assert one.logprobs.tolist() == same.logprobs.tolist()


def test_a_conversation_and_an_answer_with_its_end_are_what_a_preference_run_sees(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "the boat?"}]
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("it sank", "it is there"))
    rows, _ = phi2.load_data(tokenizer, [{"prompt": messages, "chosen": [chosen], "rejected": [rejected]}])
    pairs = phi2.score_rows(model, rows).pairs
    answers = phi2.logprobs(model, tokenizer, messages, ["it sank<|im_end|>\n", "it is there<|im_end|>\n"])
    seen = [pairs.policy_chosen.item(), pairs.policy_rejected.item()]
    assert [answer.total for answer in answers] == pytest.approx(seen, abs=1e-4)


def test_the_table_has_a_line_for_each_token_and_their_sum(loaded):
    lines = str(phi2.logprobs(*loaded, PROMPT, "th\n<|im_end|>")).splitlines()
    assert [line.split("  ")[-1] for line in lines[:-1]] == ["'th'", "'\\n'", "'<|im_end|>'"]
    assert lines[-1].endswith("nats, 3 tokens")


def test_an_adapter_counts_as_far_as_it_is_on(loaded, tiny_phi):
    model, tokenizer = phi2.load(tiny_phi, "cpu", "float32")
    phi2.attach(model, phi2.LoraConfig(r=2, target_modules=("lm_head",)))
    with torch.no_grad():
        model.lm_head.lora_B.weight[tokenizer.encode("!")] = 3.0
    assert abs(phi2.logprobs(model, tokenizer, PROMPT, "!").total - phi2.logprobs(*loaded, PROMPT, "!").total) > 1e-3


@pytest.mark.parametrize(
    "prompt, answers, told",
    [
        (PROMPT, "", "answer 1 must be a text of at least one token, got ''"),
        (PROMPT, ["a", ""], "answer 2 must be a text of at least one token, got ''"),
        (PROMPT, None, "answers must be a text or a list of texts, got None"),
        (PROMPT, [7], "answer 1 must be a text of at least one token, got 7"),
        ("", "a", "the prompt is empty; start from"),
        ([], "a", "the prompt is empty: a conversation needs a message"),
        ("x" * 300, "a", "the prompt has 300 tokens, at most 255 leave room"),
        ("x" * 200, ["a", "y" * 90], "answer 2 has 90 tokens behind a prompt of 200, the context holds 256"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(loaded, prompt, answers, told):
    with pytest.raises(ValueError) as caught:
        phi2.logprobs(*loaded, prompt, answers)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_what_phi2_load_did_not_give_is_refused_in_one_line(loaded):
    model, tokenizer = loaded
    for ask in (phi2.logprobs, phi2.generate, phi2.stream):
        with pytest.raises(ValueError, match="^model must be one that phi2.load gives, got Tokenizer$"):
            ask(tokenizer, model, PROMPT, "a") if ask is phi2.logprobs else ask(tokenizer, model, PROMPT)
    with pytest.raises(ValueError, match="^tokenizer must be one that phi2.load gives, got str$"):
        phi2.logprobs(model, "phi-2", PROMPT, "a")
