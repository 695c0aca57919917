"""What the endpoint answers, asked by OpenAI's own client and by lm-eval."""

from __future__ import annotations

import re

import pytest
import torch

from phi2.checkpoints.weights import load

HI = [{"role": "user", "content": "hi"}]


def test_models_are_the_base_and_its_adapters(client, base, adapter_folders):
    assert [model.id for model in client.models.list()] == [base, *adapter_folders]
    assert client.models.retrieve("left").id == "left"


def test_each_name_is_answered_by_its_own_adapter(client, alone, base, adapter_folders):
    texts = {
        name: client.completions.create(model=name, prompt="The boat", max_tokens=12, temperature=0).choices[0].text
        for name in (base, *adapter_folders)
    }
    assert texts == {name: alone(name, "The boat", max_new_tokens=12) for name in texts}
    assert len(set(texts.values())) == 3


def test_a_chat_is_answered_by_the_template(client, alone, base):
    answer = client.chat.completions.create(model=base, messages=HI, max_completion_tokens=9, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone(base, HI, max_new_tokens=9))
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 9


def test_text_parts_and_the_developers_role_are_read_as_text_of_the_system(client, base):
    messages = [{"role": "system", "content": "be kind"}, *HI]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]}, *HI]
    asked = dict(model=base, max_tokens=8, temperature=0)
    answers = [client.chat.completions.create(messages=given, **asked) for given in (messages, parts)]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1]


def test_a_streamed_chat_is_the_whole_one_in_pieces(client, base):
    asked = dict(model=base, messages=HI, max_tokens=12, seed=3, n=2, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content for c in deltas) == choice.message.content
        assert [c.delta.role for c in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
        assert [t.token for c in deltas for t in c.logprobs.content] == [t.token for t in choice.logprobs.content]
        assert deltas[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


def test_a_streamed_completion_is_the_whole_one_in_pieces(client, base):
    asked = dict(model=base, prompt=["ab", "The end"], max_tokens=10, temperature=0, echo=True, logprobs=1)
    whole = client.completions.create(**asked)
    choices = [choice for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    for choice in whole.choices:
        own = [c for c in choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [token for c in own for token in c.logprobs.tokens] == choice.logprobs.tokens
        assert [offset for c in own for offset in c.logprobs.text_offset] == choice.logprobs.text_offset


def test_choice_i_draws_from_seed_plus_i(client, alone, base):
    answer = client.completions.create(model=base, prompt="The", max_tokens=12, temperature=0.8, seed=5, n=3)
    expected = [alone(base, "The", max_new_tokens=12, temperature=0.8, seed=5 + row) for row in range(3)]
    assert [choice.text for choice in answer.choices] == expected


def test_the_settings_of_this_library_go_in_the_body_too(client, alone, base):
    own = dict(top_k=3, min_p=0.01, repetition_penalty=1.2)
    asked = dict(max_tokens=12, temperature=1.5, seed=2, extra_body=own)
    text = client.completions.create(model=base, prompt="The", **asked).choices[0].text
    assert text == alone(base, "The", max_new_tokens=12, temperature=1.5, seed=2, **own)


def test_a_stop_string_ends_the_text_before_it(client, alone, base):
    text = alone(base, "The", max_new_tokens=40)
    stop = text[10:12]
    choice = client.completions.create(model=base, prompt="The", max_tokens=40, temperature=0, stop=[stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_text_its_ids_and_lists_of_them_are_one_prompt(client, base, plain):
    ids = plain[1].encode("The boat")
    asked = dict(model=base, max_tokens=8, temperature=0)
    texts = [
        choice.text
        for prompt in ("The boat", ids, ["The boat"], [ids])
        for choice in client.completions.create(prompt=prompt, **asked).choices
    ]
    assert len(texts) == 4 and len(set(texts)) == 1


def test_bytes_of_tokens_put_together_are_the_text(client, base):
    asked = dict(model=base, messages=HI, max_tokens=30, temperature=2.0, seed=1, logprobs=True)
    (choice,) = client.chat.completions.create(**asked).choices
    said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert re.sub(r"<\|\w+\|>", "", said.decode(errors="replace")) == choice.message.content
    assert any(token.token == "\ufffd" for token in choice.logprobs.content)  # a part of a character was among them


# ---- scores ----


def scores_of(plain, ids: list[int]) -> torch.Tensor:
    """(len(ids) - 1, V) log-probs of each next token, by one direct pass."""
    with torch.no_grad():
        return plain[0](torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)


def test_echo_without_new_tokens_scores_the_prompt(client, base, plain):
    ids = plain[1].encode("The boat sank, and then the end.")
    asked = dict(model=base, prompt=[ids], max_tokens=0, echo=True, logprobs=2)
    (choice,) = client.completions.create(**asked).choices
    logps = scores_of(plain, ids)
    expected = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice.text == "The boat sank, and then the end."
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-5)
    best = [sorted(top.values(), reverse=True) for top in choice.logprobs.top_logprobs[1:]]
    assert torch.tensor(best).numpy() == pytest.approx(logps.topk(2).values.numpy(), abs=2e-5)
    assert "".join(choice.logprobs.tokens) == choice.text


def test_an_adapter_scores_as_itself(client, served, base, plain, adapter_folders, tiny_phi):
    adapted = load(tiny_phi, "cpu", adapter=adapter_folders["right"])
    ids = plain[1].encode("The boat sank.")
    (choice,) = client.completions.create(model="right", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices
    expected = scores_of(adapted, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("concurrent", [1, 4])
def test_lm_eval_scores_over_the_endpoint_as_direct_passes_do(running, base, plain, concurrent, monkeypatch):
    pytest.importorskip("tenacity")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm = completions.LocalCompletionsAPI(
        base_url=f"{running.url}/completions",
        model=base,
        tokenizer=base,
        tokenizer_backend="huggingface",
        num_concurrent=concurrent,
        batch_size=2,
        max_length=256,
    )
    pairs = [("The boat", " sank"), ("Q: why?\nA:", " the wind"), ("one two", " three four"), ("x", " y")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        ids, behind = plain[1].encode(context + continuation), len(plain[1].encode(context))
        logps = scores_of(plain, ids)[behind - 1 :]
        wanted = torch.tensor(ids[behind:])
        assert total == pytest.approx(logps.gather(1, wanted[:, None]).sum().item(), abs=1e-4)
        assert is_greedy == bool((logps.argmax(dim=-1) == wanted).all())
