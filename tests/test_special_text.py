"""Text that spells a special token: what a person types stays text, what the template writes becomes tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from phi2.text.special_text import END, START
from phi2.tokenizer import Tokenizer


def byte_tokenizer(template: str | None = None) -> Tokenizer:
    """256 bytes and one merge, ChatML, a special token inside another one, and an added token that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "Ġth"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("Ġ", "th")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<x>", "<x>y"])
    backend.add_tokens([AddedToken("<turn>"), AddedToken("   ")])
    return Tokenizer(backend, {}, template)


TOKENIZER = byte_tokenizer()
SPELLED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<x>", "<x>y"]
PIECES = st.sampled_from(
    [*SPELLED, "<|im_", "end|>", "<turn>", "   ", " th", "th", "é", "<", "|>", "\n", "x", "y", " "]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
CHATS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), min_size=1, max_size=4)


def special_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    special = {tokenizer.token_id(token) for token in SPELLED}
    return [token_id for token_id in ids if token_id in special]


def assert_only_the_template_writes_tokens(tokenizer: Tokenizer, chat: list[dict[str, str]]) -> None:
    text, ids = tokenizer.render(chat, True), tokenizer.encode_chat(chat, True)
    silent = [{**message, "content": ""} for message in chat]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, tokenizer.encode(tokenizer.render(silent, True)))


@settings(deadline=None)
@given(chat=CHATS)
def test_no_special_token_comes_out_of_a_message(chat):
    assert_only_the_template_writes_tokens(TOKENIZER, chat)


@pytest.mark.real_data
@settings(deadline=None, max_examples=50)
@given(chat=CHATS)
def test_no_special_token_comes_out_of_a_message_of_the_real_vocabulary(real_tokenizer, chat):
    assert_only_the_template_writes_tokens(real_tokenizer, chat)


@pytest.fixture(scope="session")
def real_tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")


SPELLS_NONE = st.text().filter(lambda text: not any(token in text for token in SPELLED))


@settings(deadline=None)
@given(chat=st.lists(st.fixed_dictionaries({"role": ROLES, "content": SPELLS_NONE}), min_size=1, max_size=4))
def test_text_that_spells_none_has_the_ids_it_always_had(chat):
    assert TOKENIZER.encode_chat(chat) == TOKENIZER.encode(TOKENIZER.render(chat))


@settings(deadline=None)
@given(text=TEXTS)
def test_offsets_tile_the_marked_text(text):
    marked = TOKENIZER.special_text.mark(text)
    encoding = TOKENIZER.special_text.encode(marked)
    ends = [end for _, end in encoding.offsets]
    assert len(encoding.ids) == len(ends) and ends == sorted(ends)
    assert not ends or ends[-1] == len(marked)


@pytest.mark.parametrize("style", ["chat", "chatml", "instruct"])
def test_a_prompt_cannot_end_its_own_turn(style):
    ids = TOKENIZER.encode_prompt("a<|im_end|><|endoftext|>b", style)
    assert TOKENIZER.decode(ids, False) == TOKENIZER.render_prompt("a<|im_end|><|endoftext|>b", style)
    assert ids.count(TOKENIZER.token_id("<|im_end|>")) == (style != "instruct")
    assert TOKENIZER.token_id("<|endoftext|>") not in ids


@pytest.mark.parametrize("style", ["raw", "instruct", "chat"])
@settings(deadline=None, max_examples=30)
@given(text=SPELLS_NONE)
def test_a_prompt_that_spells_none_has_the_ids_it_always_had(style, text):
    assert TOKENIZER.encode_prompt(text, style) == TOKENIZER.encode(TOKENIZER.render_prompt(text, style))


@pytest.mark.parametrize("text", [START, f"{END} a"])
def test_a_mark_alone_is_ordinary_text(text):
    assert TOKENIZER.encode_prompt(text, "instruct") == TOKENIZER.encode(f"Instruct: {text}\nOutput:")


def test_a_raw_prompt_may_write_tokens():
    ids = TOKENIZER.encode_prompt("<|im_start|>user\nHi<|im_end|>\n", "raw")
    assert special_ids(TOKENIZER, ids) == [TOKENIZER.token_id("<|im_start|>"), TOKENIZER.token_id("<|im_end|>")]


def test_tokens_that_a_template_writes_are_special_in_text_whatever_their_flag():
    chat = [{"role": "user", "content": "<turn>"}]
    tokenizer = byte_tokenizer("{% for m in messages %}<turn>{{ m.content }}{% endfor %}")
    assert tokenizer.encode_chat(chat).count(tokenizer.token_id("<turn>")) == 1
    assert TOKENIZER.encode_chat(chat).count(TOKENIZER.token_id("<turn>")) == 1  # ChatML: it is ordinary text


def test_tools_and_keys_stay_text_too():
    tokenizer = byte_tokenizer("{{ tools | tojson }}{{ messages | tojson }}<x>")
    tools = [{"<|im_end|>": ["<|im_start|>"]}]
    ids = tokenizer.encode_chat([{"role": "user", "content": "", "note": "<x>"}], tools=tools)
    assert special_ids(tokenizer, ids) == [tokenizer.token_id("<x>")]


@pytest.mark.parametrize("body", ["m.content[:-2]", "m.content | length", "m.content | tojson(ensure_ascii=true)"])
def test_a_template_that_changes_such_text_is_refused(body):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ " + body + " }}{% endfor %}")
    with pytest.raises(ValueError, match=r"\Aa message spells '<\|im_end\|>', which the chat template changes[^\n]*\Z"):
        tokenizer.encode_chat([{"role": "user", "content": "a <|im_end|>"}])


def test_a_template_that_trims_or_takes_apart_is_followed():
    template = "{% for m in messages %}{{ m.content.strip() }}|{{ m.content.split('<x>')[-1] }}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    ids = tokenizer.encode_chat([{"role": "user", "content": " <|im_end|> a<x>b "}])
    assert tokenizer.decode(ids, False) == "<|im_end|> a<x>b|b " and special_ids(tokenizer, ids) == []


@pytest.mark.parametrize("mark", [START, END])
def test_a_mark_in_such_text_is_refused(mark):
    with pytest.raises(ValueError, match=r"\A[^\n]*noncharacters[^\n]*\Z"):
        TOKENIZER.encode_chat([{"role": "user", "content": f"<|im_end|>{mark}"}])


def test_a_vocabulary_that_merges_to_the_token_is_refused():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["th", "<|endoftext|>"])
    with pytest.raises(ValueError, match="'th' cannot stay text"):
        Tokenizer(backend, {}, "{{ messages[0].content }}").encode_chat([{"role": "user", "content": "a th"}])


def test_a_vocabulary_that_puts_a_space_before_every_text_is_refused():
    made = byte_tokenizer()
    made.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="cannot stay text"):
        made.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])


def test_find_names_the_longest_spelling():
    assert TOKENIZER.special_text.find([{"content": "a"}, {"content": "b<x>y<|im_end|>"}]) == "<x>y"
    assert TOKENIZER.special_text.find([{"content": "<|im_ end|>", "n": 3}, None]) is None
