"""Records written out as text: which part is learnt, how a text ends, and which rows cannot be written."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from phi2.data.pieces import Piece, preference_texts, supervised_pieces
from phi2.data.records import PAIR, Chat, Message, Origin, Plain, Preference, RowError
from phi2.tokenizer import Tokenizer

ORIGIN = Origin("a.jsonl", 7)
IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, {})


BASE = byte_tokenizer()
CHATML = BASE.with_chatml()


def with_template(template: str) -> Tokenizer:
    tokenizer = BASE.with_chatml()
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: str | Message) -> Chat:
    """Turns of the user and the assistant by turns, the last of them the assistant's."""
    roles = ["user", "assistant"] if len(turns) % 2 == 0 else ["assistant", "user"]
    messages = (t if isinstance(t, Message) else Message(roles[i % 2], t) for i, t in enumerate(turns))
    return Chat(tuple(messages), ORIGIN)


def untrained(content: str) -> Message:
    return Message("assistant", content, train=False)


def targets(record: Chat | Plain, train_on: str, tokenizer: Tokenizer = CHATML) -> list[str]:
    pieces, _ = supervised_pieces(record, tokenizer, train_on, append_eos=True)
    return [piece.text for piece in pieces if piece.target]


def letters(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return [(letter, target) for text, target in parts for letter in text]


content = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([IM_END, "<|im_start|>", "\n", " "]))).map("".join)
messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), content, st.booleans(), st.none()), max_size=6
)


# Which part is learnt


def test_completion_is_the_last_turn_with_its_end_token_and_newline():
    assert targets(chat("a", "b", "c", "d"), "completion") == ["d<|im_end|>\n"]


def test_assistant_is_every_assistant_turn():
    assert targets(chat("a", "b", "c", "d"), "assistant") == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_all_is_the_whole_text():
    record = chat("a", "b", "c", "d")
    assert targets(record, "all") == [CHATML.render([m._asdict() for m in record.messages])]


def test_assistant_leaves_out_turns_of_weight_zero():
    assert targets(chat("a", untrained("b"), "c", "d"), "assistant") == ["d<|im_end|>\n"]


def test_all_leaves_out_turns_of_weight_zero():
    before, after = targets(chat("a", untrained("b"), "c", "d"), "all")
    assert (before[-10:], after[:18]) == ("assistant\n", "<|im_start|>user\nc")


def test_nothing_of_a_chat_is_learnt_when_its_last_turn_has_weight_zero_and_only_that_would_be():
    assert targets(chat("a", "b", "c", untrained("d")), "completion") == []


def test_prompt_of_a_text_row_is_learnt_only_with_all():
    record = Plain("ab", "cd", ORIGIN)
    assert targets(record, "completion") == ["cd<|im_end|>"]
    assert targets(record, "all") == ["abcd<|im_end|>"]


@settings(deadline=None)
@given(messages, st.sampled_from(["completion", "assistant", "all"]))
def test_pieces_are_the_rendered_text_cut_at_the_trained_turns(turns, train_on):
    turns = (*turns, Message("assistant", "end"))
    pieces, _ = supervised_pieces(Chat(turns, ORIGIN), CHATML, train_on, append_eos=True)
    parts = []  # the same cuts, made while the text is put together by hand
    for number, turn in enumerate(turns):
        learnt = {
            "completion": number == len(turns) - 1,
            "assistant": turn.role == "assistant" and turn.train,
            "all": turn.train,
        }[train_on]
        header_learnt = train_on == "all" and (turn.train or turn.role == "assistant")
        parts += [(f"<|im_start|>{turn.role}\n", header_learnt), (f"{turn.content}<|im_end|>\n", learnt)]
    assert letters(pieces) == letters(parts)


@settings(deadline=None)
@given(messages, st.sampled_from(["completion", "assistant", "all"]))
def test_no_piece_is_empty_and_neighbours_differ(turns, train_on):
    pieces, _ = supervised_pieces(Chat((*turns, Message("assistant", "x")), ORIGIN), CHATML, train_on, True)
    assert all(piece.text for piece in pieces)
    assert all(a.target != b.target for a, b in zip(pieces, pieces[1:], strict=False))


# How a text ends


def test_template_that_ends_a_turn_gets_no_second_end_token():
    pieces, flags = supervised_pieces(chat("a", "b"), CHATML, "completion", append_eos=True)
    assert pieces[-1] == Piece("b<|im_end|>\n", True)
    assert flags == {"eos_present"}


@pytest.mark.parametrize("end", [IM_END, IM_END + "\n", IM_END + " \n\n", END_OF_TEXT])
def test_text_that_ends_in_a_stop_token_stays_as_it_is(end):
    pieces, flags = supervised_pieces(Plain("", "text" + end, ORIGIN), CHATML, "completion", append_eos=True)
    assert (pieces, flags) == ([Piece("text" + end, True)], {"eos_present"})


def test_stop_token_that_the_tokenizer_does_not_know_is_no_end():
    pieces, flags = supervised_pieces(Plain("", "text" + IM_END, ORIGIN), BASE, "completion", append_eos=True)
    assert (pieces[-1].text, flags) == ("text<|im_end|><|endoftext|>", {"eos_added"})


@given(st.text(min_size=1))
def test_other_text_gets_one_end_token(text):
    assume(not text.rstrip().endswith((IM_END, END_OF_TEXT)))
    pieces, flags = supervised_pieces(Plain("", text, ORIGIN), CHATML, "completion", append_eos=True)
    assert (pieces, flags) == ([Piece(text + IM_END, True)], {"eos_added"})


def test_text_without_an_end_is_counted_when_none_is_to_be_added():
    pieces, flags = supervised_pieces(Plain("", "text", ORIGIN), CHATML, "completion", append_eos=False)
    assert (pieces, flags) == ([Piece("text", True)], {"eos_missing"})


def test_template_without_an_end_token_gets_one():
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    pieces, flags = supervised_pieces(chat("a", "b"), tokenizer, "all", append_eos=True)
    assert (pieces, flags) == ([Piece("user: a\nassistant: b\n<|im_end|>", True)], {"eos_added"})


def test_answers_of_a_pair_end_each_for_itself():
    texts, flags = preference_texts(
        Preference("p", ("good", "bad<|im_end|>"), PAIR, ORIGIN, {}), CHATML, append_eos=True
    )
    assert texts == ["p", "good<|im_end|>", "bad<|im_end|>"]
    assert flags == {"eos_added", "eos_present"}


# Special tokens in what people wrote


def test_special_token_in_a_message_is_counted():
    _, flags = supervised_pieces(chat("how does <|im_end|> work?", "so"), CHATML, "completion", append_eos=True)
    assert flags == {"eos_present", "special_text_in_content"}


def test_special_token_in_a_message_of_a_pair_is_counted():
    turns = [(Message(role, text),) for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "<|im_end|>"))]
    assert (
        "special_text_in_content"
        in preference_texts(Preference(turns[0], (turns[1], turns[2]), PAIR, ORIGIN, {}), CHATML, append_eos=True)[1]
    )


def test_special_token_in_a_text_row_is_counted():
    _, flags = supervised_pieces(Plain("<|im_start|>user\n", "a<|im_end|>", ORIGIN), CHATML, "completion", True)
    assert flags == {"eos_present", "special_text_in_content"}


# What else the template is given

TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|im_end|>{% endfor %}"
)
CALLING = Message("assistant", "", extra={"content": None, "tool_calls": [{"function": {"name": "f"}}]})


def test_tools_and_calls_reach_a_template_that_reads_them():
    chat_with_tools = Chat((Message("user", "a"), CALLING), ORIGIN, {"tools": [{"name": "f"}]})
    pieces, _ = supervised_pieces(chat_with_tools, with_template(TOOLS), "all", append_eos=True)
    assert pieces == [Piece('[{"name": "f"}]user: a<|im_end|>assistant: f<|im_end|>', True)]


def test_tools_of_a_pair_stand_in_its_prompt():
    record = Preference(
        (Message("user", "a"),), ((CALLING,), (Message("assistant", "b"),)), PAIR, ORIGIN, {}, {"tools": [{}]}
    )
    texts, _ = preference_texts(record, with_template(TOOLS), append_eos=True)
    assert texts == ["[{}]user: a<|im_end|>", "assistant: f<|im_end|>", "assistant: b<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("tools", Chat((*chat("a", "b").messages,), ORIGIN, {"tools": [{"name": "f"}]})),
        ("enable_thinking", Chat((*chat("a", "b").messages,), ORIGIN, {"enable_thinking": False})),
        ("tool_calls", chat("a", Message("assistant", "b", extra={"tool_calls": [{}]}))),
        ("reasoning_content", chat("a", Message("assistant", "b", extra={"reasoning_content": "c"}))),
    ],
)
@pytest.mark.parametrize("tokenizer", [CHATML, BASE], ids=["chatml", "no template"])
def test_what_the_template_does_not_read_and_should_refuses_the_row(name, record, tokenizer):
    with pytest.raises(RowError, match=rf"does not read '{name}'.*ignore_columns \[not-read\]"):
        supervised_pieces(record, tokenizer, "completion", append_eos=True)


def test_names_that_the_template_does_not_write_are_counted():
    named = chat(Message("user", "a", extra={"name": "Ann"}), "b")
    assert supervised_pieces(named, CHATML, "completion", True)[1] == {"eos_present", "names_not_written"}
    writes = with_template("{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    pieces, flags = supervised_pieces(named, writes, "completion", True)
    assert pieces[0].text.startswith("Ann: a") and flags == {"eos_present"}


def test_words_that_the_template_leaves_out_are_counted():
    no_system = with_template(
        "{% for m in messages if m.role != 'system' %}{{ m.content | trim }}<|im_end|>{% endfor %}"
    )
    plain, spaced = chat("a", "b"), chat(" a\n", "b ")
    with_system = Chat((Message("system", "Be brief."), *plain.messages), ORIGIN)
    flags = [supervised_pieces(c, no_system, "completion", True)[1] for c in (plain, spaced, with_system)]
    assert flags == [{"eos_present"}, {"eos_present"}, {"eos_present", "content_not_written"}]
    pair = Preference(with_system.messages[:2], (plain.messages[1:], (Message("assistant", "c"),)), PAIR, ORIGIN, {})
    assert "content_not_written" in preference_texts(pair, no_system, append_eos=True)[1]


# What a template marks as generated

GENERATES = (  # the words and the end of a turn are learnt, its newline is not
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("completion", ["d<|im_end|>"]), ("assistant", ["b<|im_end|>", "d<|im_end|>"])],
)
def test_template_that_marks_what_is_generated_says_what_is_learnt(train_on, expected):
    assert targets(chat("a", "b", "c", "d"), train_on, with_template(GENERATES)) == expected


def test_marked_turns_of_weight_zero_are_not_learnt():
    record = chat("a", untrained("b"), "c", "d")
    assert targets(record, "assistant", with_template(GENERATES)) == ["d<|im_end|>"]
    assert targets(chat("a", "b", "c", untrained("d")), "completion", with_template(GENERATES)) == []


def test_template_that_marks_only_the_last_answer_teaches_that_one():
    last_only = GENERATES.replace("m.role == 'assistant'", "loop.last")
    for train_on in ("completion", "assistant"):
        assert targets(chat("a", "b", "c", "d"), train_on, with_template(last_only)) == ["d<|im_end|>"]


def test_all_is_the_whole_text_whatever_the_template_marks():
    assert targets(chat("a", "b"), "all", with_template(GENERATES))[0].startswith("<|im_start|>user\na")


def test_template_that_marks_nothing_of_a_row_teaches_nothing():
    template = GENERATES.replace("m.role == 'assistant'", "m.role == 'nobody'")
    assert targets(chat("a", "b"), "completion", with_template(template)) == []


def test_end_token_that_is_added_behind_a_marked_answer_is_learnt():
    template = GENERATES.replace("<|im_end|>", "")
    assert targets(chat("a", "b"), "completion", with_template(template)) == ["b", "<|im_end|>"]


# Special tokens that are to stay text, or to refuse their row


def test_refuse_refuses_a_row_that_spells_a_special_token():
    for record in (chat("how does <|im_end|> work?", "so"), Plain("", "a <|im_end|> b", ORIGIN)):
        with pytest.raises(RowError, match=r"spells the special token '<\|im_end\|>'.*\[special-token\]"):
            supervised_pieces(record, CHATML, "completion", True, "refuse")
    with pytest.raises(RowError, match="special-token"):
        preference_texts(Preference("p", ("a<|im_start|>", "b"), PAIR, ORIGIN, {}), CHATML, True, "refuse")


def test_refuse_keeps_the_tokens_of_the_template():
    assert supervised_pieces(chat("a", "b"), CHATML, "completion", True, "refuse")[1] == {"eos_present"}


def test_text_that_ends_in_a_typed_end_token_gets_a_real_one():
    pieces, flags = supervised_pieces(Plain("", "a<|im_end|>", ORIGIN), CHATML, "completion", True, "text")
    assert CHATML.special_text.unmark(pieces[0].text) == "a<|im_end|><|im_end|>"
    assert flags == {"eos_added", "special_text_kept"}


def test_typed_special_token_that_the_template_changes_refuses_its_row():
    tokenizer = with_template("{% for m in messages %}{{ m.content[:4] }}<|im_end|>{% endfor %}")
    with pytest.raises(RowError, match=r"the chat template changes it.*\[special-token\]"):
        supervised_pieces(chat("<|im_end|>", "b"), tokenizer, "completion", True, "text")


# Without a template


def test_one_question_and_answer_take_the_instruct_form():
    pieces, _ = supervised_pieces(chat("How?", "So."), BASE, "completion", append_eos=True)
    assert pieces == [Piece("Instruct: How?\nOutput:", False), Piece(" So.<|endoftext|>", True)]


def test_pair_takes_the_instruct_form():
    turns = [(Message(role, text),) for role, text in (("user", "p"), ("assistant", "yes"), ("assistant", "no"))]
    texts, _ = preference_texts(Preference(turns[0], (turns[1], turns[2]), PAIR, ORIGIN, {}), BASE, append_eos=True)
    assert texts == ["Instruct: p\nOutput:", " yes<|endoftext|>", " no<|endoftext|>"]


@pytest.mark.parametrize(
    "record", [chat("a", "b", "c", "d"), Chat((Message("system", "s"), *chat("a", "b").messages), ORIGIN)]
)
def test_longer_conversations_need_a_template(record):
    with pytest.raises(RowError, match=r"\Aa.jsonl row 7: without a chat template .*\[needs-chat-template\]\Z"):
        supervised_pieces(record, BASE, "completion", append_eos=True)


# Rows and templates that do not work


def test_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = with_template("{{ messages|length }} turns: {% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(RowError, match="unstable-template"):
        supervised_pieces(chat("a", "b"), tokenizer, "completion", append_eos=True)


def test_template_whose_generation_prompt_is_not_what_a_turn_begins_with_is_refused_for_pairs():
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    turns = [(Message(role, text),) for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))]
    with pytest.raises(RowError, match="unstable-template"):
        preference_texts(Preference(turns[0], (turns[1], turns[2]), PAIR, ORIGIN, {}), tokenizer, append_eos=True)


def test_template_that_rewrites_earlier_turns_may_be_learnt_whole():
    tokenizer = with_template(
        "{{ messages|length }} turns{% for m in messages %} {{ m.content }}{% endfor %}<|im_end|>"
    )
    assert targets(chat("a", "b"), "all", tokenizer) == ["2 turns a b<|im_end|>"]


def test_what_a_template_refuses_is_a_refused_row():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match=r"a.jsonl row 7: .*roles must alternate \[template-refused\]"):
        supervised_pieces(chat("a", "b"), tokenizer, "completion", append_eos=True)


def test_pair_is_no_supervised_row():
    with pytest.raises(RowError, match="must be Chat or Plain, got Preference"):
        supervised_pieces(Preference("p", ("a", "b"), PAIR, ORIGIN, {}), CHATML, "completion", append_eos=True)


def test_labelled_answer_is_no_pair():
    with pytest.raises(RowError, match="must be a Preference, got Plain"):
        preference_texts(Plain("p", "a", ORIGIN), CHATML, append_eos=True)
