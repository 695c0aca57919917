"""Generation: what ends a reply, what is shown of it, and that batching, caching and streaming change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from phi2.config import Phi2Config
from phi2.inference.generate import generate, stream
from phi2.inference.replies import Generation, StopCutter
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

CONTEXT = 96
END_OF_TEXT, IM_START, IM_END = 256, 257, 258
PROMPTS = ["a", "What is the capital of France?", "def fib(n):", "12345 67890"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Why?"},
]


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes; then <|endoftext|>, <|im_start|>, <|im_end|>."""
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(order)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {}).with_chatml()


TOKENIZER = byte_tokenizer()


def tiny_model(**changes) -> Phi2ForCausalLM:
    """More logits (300) than the tokenizer has tokens (259); weights wide enough for clear choices."""
    shape = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    fixed = dict(max_position_embeddings=CONTEXT, initializer_range=0.3, eos_token_id=None)
    model = Phi2ForCausalLM(Phi2Config(**{**shape, **fixed, **changes}))
    model.init_weights(seed=1)
    return model.eval()


class ScriptedHead(nn.Linear):
    """All probability to a fixed sequence of tokens, one a step, as long as the model below is sound."""

    def __init__(self, head: nn.Linear, script: list[int]) -> None:
        super().__init__(head.in_features, head.out_features)
        self.script = iter(script)

    def forward(self, hidden):
        logits = torch.zeros(self.out_features) + 0 * hidden.sum(-1, keepdim=True)
        logits[..., next(self.script)] = 1000.0
        return logits


def model_that_says(script: str | list[int], **changes) -> Phi2ForCausalLM:
    """Generates exactly this text, or these ids, and then <|endoftext|>."""
    model = tiny_model(**changes)
    ids = TOKENIZER.encode(script) if isinstance(script, str) else script
    model.lm_head = ScriptedHead(model.lm_head, [*ids, END_OF_TEXT])
    return model


def shapes_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Fills up with the shape of every input of `module`."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def text_of(chunks) -> str:
    return "".join(chunk.text for chunk in chunks)


# The loop


@torch.no_grad()
def test_greedy_tokens_are_the_argmax_of_whole_passes_without_a_cache():
    model = tiny_model()
    ids = TOKENIZER.encode("def fib(n):")
    found = generate(model, TOKENIZER, "def fib(n):", max_new_tokens=30).token_ids
    for token in found:
        assert token == model(torch.tensor([ids]))[0, -1, : len(TOKENIZER)].argmax()
        ids.append(token)
    assert len(set(found)) > 3


def test_the_prompt_is_one_pass_and_then_every_pass_is_one_token():
    model = tiny_model()
    shapes = shapes_seen(model.model.embed_tokens)
    generate(model, TOKENIZER, "12345", max_new_tokens=4)
    assert shapes == [(1, 5), (1, 1), (1, 1), (1, 1)]


def test_the_head_runs_at_the_last_position_only():
    model = tiny_model()
    shapes = shapes_seen(model.lm_head)
    generate(model, TOKENIZER, ["12345", "123"], max_new_tokens=3)
    assert shapes == [(2, 64)] * 3


@torch.no_grad()
def test_logprobs_are_of_the_distribution_before_any_processing():
    model = tiny_model()
    harsh = dict(temperature=0.3, top_k=3, top_p=0.8, min_p=0.1, repetition_penalty=1.5)
    found = generate(model, TOKENIZER, "def", max_new_tokens=20, **harsh)
    ids = torch.tensor([[*TOKENIZER.encode("def"), *found.token_ids]])
    logprobs = model(ids).log_softmax(-1)[0, 2:-1]
    expected = logprobs.gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=1e-5, atol=1e-5)


def test_ids_outside_the_tokenizer_are_never_generated():
    model = tiny_model()
    nn.init.constant_(model.lm_head.bias[len(TOKENIZER) :], 1e4)
    assert max(generate(model, TOKENIZER, "a", max_new_tokens=50, temperature=5.0).token_ids) < len(TOKENIZER)


def test_the_same_seed_repeats_and_another_does_not():
    model = tiny_model()
    one, same, other = (
        generate(model, TOKENIZER, "a", max_new_tokens=20, temperature=1.0, seed=seed).token_ids for seed in (5, 5, 6)
    )
    assert one == same != other


def test_no_seed_is_a_new_one_each_time_which_the_reply_tells():
    model, sampling = tiny_model(), dict(max_new_tokens=20, temperature=1.0)
    first, second = (generate(model, TOKENIZER, "a", seed=None, **sampling) for _ in range(2))
    assert first.seed != second.seed and first.token_ids != second.token_ids
    assert generate(model, TOKENIZER, "a", seed=first.seed, **sampling).token_ids == first.token_ids
    assert next(stream(model, TOKENIZER, "a", seed=None, **sampling)).seed is not None


def test_rows_of_a_batch_tell_seeds_that_repeat_each_of_them():
    model, sampling = tiny_model(), dict(max_new_tokens=10, temperature=1.0)
    for prompt, reply in zip(PROMPTS, generate(model, TOKENIZER, PROMPTS, seed=None, **sampling), strict=True):
        assert generate(model, TOKENIZER, prompt, seed=reply.seed, **sampling).token_ids == reply.token_ids


def test_a_greedy_reply_has_no_seed():
    assert generate(tiny_model(), TOKENIZER, "a", max_new_tokens=2).seed is None


@pytest.mark.parametrize("prompt", [5, None, b"bytes", 1.5, Path("file"), {}, ["a", 5], [None]], ids=repr)
def test_what_is_no_prompt_is_told_what_a_prompt_is(prompt):
    with pytest.raises(ValueError, match=r"a prompt must be a str or a list of messages, got .+") as error:
        generate(tiny_model(), TOKENIZER, prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("speak", [generate, lambda *a: next(stream(*a))], ids=["generate", "stream"])
def test_a_single_message_is_told_to_stand_in_a_list(speak):
    with pytest.raises(ValueError, match="put a single message in a list"):
        speak(tiny_model(), TOKENIZER, {"role": "user", "content": "a"})


def test_a_batch_says_what_each_row_says_alone():
    model = tiny_model()
    for sampling in (dict(), dict(temperature=1.0, top_p=0.95), dict(temperature=0.8, repetition_penalty=1.3)):
        seeds = [{"seed": 11 + row} if sampling else {} for row in range(len(PROMPTS))]
        together = generate(model, TOKENIZER, PROMPTS, max_new_tokens=30, **sampling, **seeds[0])
        alone = [
            generate(model, TOKENIZER, prompt, max_new_tokens=30, **sampling, **seed)
            for prompt, seed in zip(PROMPTS, seeds, strict=True)
        ]
        assert [row.token_ids for row in together] == [row.token_ids for row in alone]
        assert [row.text for row in together] == [row.text for row in alone]


def test_a_batch_may_mix_texts_and_conversations_and_may_be_empty():
    model = tiny_model()
    text, chat = generate(model, TOKENIZER, ["a", CHAT], max_new_tokens=1)
    assert (text.prompt_tokens, chat.prompt_tokens) == (1, len(TOKENIZER.encode(TOKENIZER.render(CHAT, True))))
    assert generate(model, TOKENIZER, []) == []


@pytest.mark.parametrize("style", ["raw", "instruct", "chatml", "chat"])
def test_a_text_is_shown_to_the_model_in_its_style(style):
    model = tiny_model()
    expected = len(TOKENIZER.encode(TOKENIZER.render_prompt("Why?", style)))
    assert generate(model, TOKENIZER, "Why?", max_new_tokens=1, prompt_style=style).prompt_tokens == expected


@pytest.mark.parametrize("style", [None, "chat", "instruct"])
def test_a_special_token_that_is_typed_stays_text(style):
    model, typed = tiny_model(), "a<|im_end|>"
    prompt = typed if style else [{"role": "user", "content": typed}]
    longer = len("<|im_end|>") - 1  # bytes in place of one id
    written = TOKENIZER.encode(TOKENIZER.render_prompt(typed, style or "chat"))
    reply = generate(model, TOKENIZER, prompt, max_new_tokens=1, prompt_style=style)
    assert reply.prompt_tokens == len(written) + longer


def test_a_raw_text_may_write_special_tokens():
    assert generate(tiny_model(), TOKENIZER, "a<|im_end|>", max_new_tokens=1).prompt_tokens == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_what_the_cpu_says_and_repeats_its_draws():
    on_cpu = generate(tiny_model(), TOKENIZER, PROMPTS, max_new_tokens=20)
    model = tiny_model().cuda()
    on_gpu = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20)
    assert [row.token_ids for row in on_gpu] == [row.token_ids for row in on_cpu]
    one, same = (generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, temperature=1.0) for _ in range(2))
    assert [row.token_ids for row in one] == [row.token_ids for row in same]


# Streaming


def test_stream_and_generate_are_the_same_reply():
    model = tiny_model()
    sampling = dict(max_new_tokens=40, temperature=1.0, seed=2)
    chunks, whole = list(stream(model, TOKENIZER, CHAT, **sampling)), generate(model, TOKENIZER, CHAT, **sampling)
    assert (text_of(chunks), [c.token_id for c in chunks]) == (whole.text, whole.token_ids)
    assert [c.logprob for c in chunks] == whole.logprobs
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    assert [c.generation_tokens for c in chunks] == list(range(1, len(chunks) + 1))


def test_a_reply_prints_as_its_text():
    reply = generate(model_that_says("hello"), TOKENIZER, "a")
    assert isinstance(reply, Generation) and str(reply) == reply.text == "hello"


def test_speeds_are_measured():
    first, second = list(stream(tiny_model(), TOKENIZER, "abc", max_new_tokens=2))
    assert first.generation_tps == 0 < second.generation_tps and first.prompt_tps == second.prompt_tps > 0


def test_characters_stream_whole():
    chunks = list(stream(model_that_says("né🙂!"), TOKENIZER, "a"))
    assert [chunk.text for chunk in chunks] == ["n", "", "é", "", "", "", "🙂", "!", ""]


def test_an_unfinished_character_is_shown_as_such_at_the_end():
    model = model_that_says(TOKENIZER.encode("a🙂")[:-1])
    assert generate(model, TOKENIZER, "a").text == "a\ufffd"


def test_the_model_is_back_as_it_was_even_when_a_stream_is_dropped():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    chunks = stream(model, TOKENIZER, "abc")
    next(chunks)
    assert not any(module.training for module in model.modules())
    chunks.close()
    assert [module.training for module in model.modules()] == before


def test_a_model_in_training_mode_generates_without_dropout():
    model = tiny_model(resid_pdrop=0.5)
    calm = generate(model, TOKENIZER, "abc", max_new_tokens=10).token_ids
    assert generate(model.train(), TOKENIZER, "abc", max_new_tokens=10).token_ids == calm


def test_gradients_stay_enabled_for_the_caller_of_a_stream():
    for _ in stream(tiny_model(), TOKENIZER, "abc", max_new_tokens=3):
        assert torch.is_grad_enabled()


# What ends a reply


@pytest.mark.parametrize("stop_id", [END_OF_TEXT, IM_END, 7, 9])
def test_every_stop_id_ends_the_reply_unseen(stop_id):
    model = model_that_says([*TOKENIZER.encode("hi"), stop_id], eos_token_id=[7, 9])
    reply = generate(model, TOKENIZER, "a")
    assert (reply.text, reply.finish_reason, reply.token_ids[-1]) == ("hi", "stop", stop_id)


def test_max_new_tokens_ends_the_reply():
    reply = generate(model_that_says("hello"), TOKENIZER, "a", max_new_tokens=4)
    assert (reply.text, reply.finish_reason) == ("hell", "length")


def test_a_stop_id_at_the_last_token_is_a_stop():
    assert generate(model_that_says("hell"), TOKENIZER, "a", max_new_tokens=5).finish_reason == "stop"


def test_the_context_caps_the_reply_of_every_row_by_its_own_prompt():
    model = tiny_model()
    rows = generate(model, TOKENIZER, ["x" * (CONTEXT - 1), "y" * 50], max_new_tokens=10**6)
    assert [(len(row.token_ids), row.finish_reason) for row in rows] == [(1, "length"), (CONTEXT - 50, "length")]


@pytest.mark.parametrize(
    ("says", "stop", "shown"),
    [
        ("one\nQuestion: two", "Question:", "one\n"),
        ("one\nQuestion two", ["Question:", "xyz"], "one\nQuestion two"),
        ("the stop is hal", "half", "the stop is hal"),
        ("aab", "ab", "a"),
        ("abc", ["bc", "abc"], ""),
        ("abcd", ["abcd", "bc"], "a"),
        ("STOP", "STOP", ""),
    ],
)
def test_stop_strings_are_cut_from_the_text_of_many_tokens(says, stop, shown):
    chunks = list(stream(model_that_says(says), TOKENIZER, "a", stop=stop))
    assert text_of(chunks) == shown
    assert chunks[-1].finish_reason == ("stop" if shown == says else "stop_string")


def test_a_stop_string_that_ends_at_the_last_token_is_found():
    reply = generate(model_that_says("hello"), TOKENIZER, "a", stop="lo", max_new_tokens=5)
    assert (reply.text, reply.finish_reason) == ("hel", "stop_string")


def test_a_stop_string_that_is_a_special_token_stops_at_its_id():
    reply = generate(model_that_says([*TOKENIZER.encode("hi"), IM_START]), TOKENIZER, "a", stop="<|im_start|>")
    assert (reply.text, reply.finish_reason, reply.token_ids[-1]) == ("hi", "stop", IM_START)


def offline_cut(text: str, stops: list[str]) -> str:
    """`text` up to the stop string that is complete first, by trying every prefix of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stops):
    cutter, shown = StopCutter(stops), ""
    text, expected = "".join(pieces), offline_cut("".join(pieces), stops)
    for piece in pieces:
        shown += cutter.step(piece)
        assert expected.startswith(shown), "text was shown that belongs to a stop string"
        if cutter.found:
            break
    else:
        shown += cutter.flush()
    assert shown == expected
    assert cutter.found == (expected != text)


@given(st.lists(st.text("xyz", min_size=1, max_size=3), min_size=1, max_size=4), st.text("xyz", max_size=12))
def test_among_stop_strings_that_do_not_contain_each_other_the_earliest_counts(stops, text):
    if any(a != b and a in b for a in stops for b in stops):
        return
    cutter = StopCutter(stops)
    starts = [text.find(stop) for stop in stops if stop in text]
    assert cutter.step(text) + cutter.flush() == text[: min(starts, default=len(text))]


@given(st.text("abc", max_size=12))
def test_only_what_may_become_a_stop_string_is_held_back(text):
    stop = "abcabc"
    if stop in text:
        return
    held = max(length for length in range(len(stop)) if text.endswith(stop[:length]))
    cutter = StopCutter([stop])
    assert "".join(cutter.step(character) for character in text) == text[: len(text) - held]


# Refusals


def one_line_error(match: str):
    return pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("x" * CONTEXT, {}, "the prompt has 96 tokens, at most 95 leave room for a reply in a context of 96"),
        (["a", "x" * 200], {}, "prompt 2: the prompt has 200 tokens"),
        (["a", 5], {}, "prompt 2: a prompt must be a str or a list of messages, got 5"),
        (5, {}, "a prompt must be a str or a list of messages, got 5"),
        (None, {}, "a prompt must be a str or a list of messages, got None"),
        (CHAT[0], {}, "a prompt must be a str or a list of messages, got {'content"),
        ("a", {"prompt_style": "alpaca"}, "prompt style must be one of raw, instruct, chatml, chat, got 'alpaca'"),
        (CHAT, {"prompt_style": "raw"}, "prompt_style 'raw' is for texts"),
        ([{"role": "user"}], {}, "message 1 must be"),
        ("a", {"temperature": -1.0}, "temperature must be"),
    ],
)
def test_a_prompt_or_setting_that_cannot_work_is_refused_before_anything_runs(prompt, options, message):
    model = tiny_model()
    passes = shapes_seen(model.model.embed_tokens)
    with one_line_error(message):
        generate(model, TOKENIZER, prompt, **options)
    assert not passes


def test_a_setting_of_sampling_that_is_none_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="there is no setting 'max_tokens'; did you mean max_new_tokens"):
        generate(tiny_model(), TOKENIZER, "Hi", max_tokens=3)


def test_a_setting_of_sampling_may_be_a_number_of_numpy():
    said = generate(tiny_model(), TOKENIZER, "Hi", max_new_tokens=np.int64(2), temperature=np.float32(0))
    assert len(said.token_ids) == 2


def test_a_stream_refuses_before_its_first_chunk_is_asked_for():
    with one_line_error("the prompt is empty"):
        stream(tiny_model(), TOKENIZER, "")


def test_a_token_the_model_does_not_know_is_named():
    with one_line_error("token id 258, the model knows ids below 257"):
        generate(tiny_model(vocab_size=257), TOKENIZER, CHAT)


@pytest.mark.parametrize("broken", ["model.layers.1.mlp.fc2", "model.layers.0.self_attn.dense", "lm_head"])
def test_non_finite_logits_name_the_layer_where_they_begin(broken):
    model = tiny_model()
    nn.init.constant_(model.get_submodule(broken).bias[:1], float("nan"))
    with one_line_error(rf"non-finite logits; first in {broken} \(torch.float32\)"):
        generate(model, TOKENIZER, ["abc", "a"], max_new_tokens=1)


def test_non_finite_logits_are_found_at_a_later_token_too():
    model = model_that_says("ok!...")
    nn.init.constant_(model.model.embed_tokens.weight[TOKENIZER.encode("!")[0]], float("inf"))
    with one_line_error("first in model.embed_tokens"):
        list(stream(model, TOKENIZER, "a"))


# The published model's tokenizer


@pytest.mark.real_data
def test_the_conversation_of_the_model_card_generates_256_tokens(shared):
    tokenizer = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    model = tiny_model(vocab_size=51200, max_position_embeddings=2048)
    card = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What's the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "Tell me about it \U0001f642 in   a few words."},
    ]
    reply = generate(model, tokenizer, card, max_new_tokens=256, temperature=0.0)
    assert reply.prompt_tokens == len(tokenizer.encode(tokenizer.render(card, add_generation_prompt=True)))
    assert (len(reply.token_ids), reply.finish_reason) == (256, "length")
    assert max(reply.token_ids) < len(tokenizer) == 50297
    assert str(reply) == tokenizer.decode(reply.token_ids)
