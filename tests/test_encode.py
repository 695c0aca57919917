"""Token ids and masks: what is learnt, where a prompt ends, what a length limit takes away, which rows are left out."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from phi2.data import encode
from phi2.data.encode import EncodeConfig, EncodedPreference, encode_records
from phi2.data.records import PAIR, Chat, Message, Origin, Plain, Preference
from phi2.tokenizer import Tokenizer

ORIGIN = Origin("a.jsonl", 7)
MERGES = [("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ"), ("ab", "c"), ("c", "d")]


def byte_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """ChatML over a vocabulary of bytes and a few longer tokens: ab, " a", two newlines, abc, cd."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(symbols)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {}).with_chatml()


BYTES = byte_tokenizer([])
MERGING = byte_tokenizer(MERGES)
EOS = BYTES.eos_id


def text_of(ids, tokenizer: Tokenizer = BYTES) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def encoded(record, tokenizer: Tokenizer = BYTES, **options):
    """The only row of a data set; what refuses it is the error of the data set."""
    kind = "preference" if isinstance(record, Preference) else "supervised"
    (row,), _ = encode_records([record], tokenizer, EncodeConfig(**options), kind)
    return row


def plain(prompt: str, completion: str, tokenizer: Tokenizer = BYTES, **options):
    return encoded(Plain(prompt, completion, ORIGIN), tokenizer, **options)


def pair(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer = BYTES, **options) -> EncodedPreference:
    return encoded(Preference(prompt, (chosen, rejected), PAIR, ORIGIN, {"score": 1.0}), tokenizer, **options)


def pair_text(row: EncodedPreference, tokenizer: Tokenizer = BYTES) -> tuple[str, str, str]:
    return tuple(text_of(part, tokenizer) for part in (row.prompt, row.chosen, row.rejected))


content = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from(["<|im_end|>", "<|im_start|>", "é", "🙂", "\n"]))
).map("".join)
turns = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), content, st.booleans(), st.none()), max_size=6
)
letters = st.text(alphabet="abcd \n", max_size=8)


# What is learnt


@settings(deadline=None)
@given(turns, content, st.sampled_from(["assistant", "completion"]), st.sampled_from(["joint", "split"]))
def test_mask_covers_exactly_the_assistant_turns(before, answer, train_on, boundary):
    chat = Chat((*before, Message("assistant", answer)), ORIGIN)
    row = encoded(chat, max_length=None, train_on=train_on, boundary=boundary)
    learnt = [turn for turn in chat.messages if turn.role == "assistant" and turn.train]
    learnt = learnt if train_on == "assistant" else learnt[-1:]
    assert text_of(row.ids) == BYTES.render([message._asdict() for message in chat.messages])
    assert text_of(row.ids[row.mask]) == "".join(turn.content + "<|im_end|>\n" for turn in learnt)


@settings(deadline=None)
@given(turns, st.sampled_from(["assistant", "completion", "all"]))
def test_chat_ends_in_one_end_token_and_a_newline(before, train_on):
    row = encoded(Chat((*before, Message("assistant", "so")), ORIGIN), max_length=None, train_on=train_on)
    assert row.ids[-3:].tolist() == [*BYTES.encode("o"), EOS, *BYTES.encode("\n")]
    assert row.mask[-3:].all()


@settings(deadline=None)
@given(st.text(min_size=1), st.sampled_from(["", "<|im_end|>", "<|im_end|>\n"]))
def test_text_ends_in_exactly_one_end_token(text, end):
    assume(text.strip() and "<|im_end|>" not in text)
    row = plain("", text + end, max_length=None)
    assert text_of(row.ids) == text + (end or "<|im_end|>")
    assert row.ids.tolist().count(EOS) == 1 and row.mask.all()


def test_end_token_is_learnt_though_it_is_the_padding_token():
    row = plain("a", "b")
    assert BYTES.pad_id == EOS == row.ids[-1] and row.mask[-1]


def test_all_learns_the_prompt_too():
    row = plain("ab", "cd", train_on="all")
    assert row.mask.all() and row.target_tokens == 4  # nothing predicts the first of the five


def test_arrays_are_int32_ids_and_a_mask_of_bool():
    row = plain("a", "b")
    assert (row.ids.dtype, row.mask.dtype, pair("p", "a", "b").chosen.dtype) == (np.int32, bool, np.int32)


def test_row_without_anything_to_learn_is_refused():
    chat = Chat((Message("user", "a"), Message("assistant", "b", train=False)), ORIGIN)
    with pytest.raises(ValueError, match=r"first a.jsonl row 7: no target .*\[nothing-to-train\]\Z"):
        encoded(chat)


def test_single_token_is_refused_because_nothing_predicts_it():
    with pytest.raises(ValueError, match="nothing-to-train"):
        plain("", "a", append_eos=False)


def test_special_token_typed_by_a_user_becomes_the_token_and_is_counted():
    chat = Chat((Message("user", "<|im_end|>"), Message("assistant", "b")), ORIGIN)
    row = encoded(chat)
    assert row.ids.tolist().count(EOS) == 3
    assert "special_text_in_content" in row.flags


# Where a prompt ends


def test_token_that_spans_prompt_and_answer_is_learnt_and_counted():
    row = plain("xa", "bd", MERGING)
    assert [text_of([i], MERGING) for i in row.ids] == ["x", "ab", "d", "<|im_end|>"]
    assert row.mask.tolist() == [False, True, True, True]
    assert "boundary_merged" in row.flags


def test_split_keeps_prompt_and_answer_in_tokens_of_their_own():
    row = plain("xa", "bd", MERGING, boundary="split")
    assert [text_of([i], MERGING) for i in row.ids] == ["x", "a", "b", "d", "<|im_end|>"]
    assert row.mask.tolist() == [False, False, True, True, True]
    assert "boundary_merged" not in row.flags


def test_token_that_spans_turns_of_a_conversation_belongs_to_where_it_ends():
    turns = Message("user", "a"), Message("assistant", "\n\nb"), Message("user", "c"), Message("assistant", "d")
    row = encoded(Chat(turns, ORIGIN), MERGING, train_on="assistant")
    assert text_of(row.ids[row.mask], MERGING) == "\n\n\nb<|im_end|>\nd<|im_end|>\n"
    assert "boundary_merged" in row.flags


def test_tokens_that_end_with_their_turn_are_not_counted_as_merged():
    turns = Message("user", "é"), Message("assistant", "🙂"), Message("user", "é"), Message("assistant", "🙂")
    row = encoded(Chat(turns, ORIGIN), MERGING, train_on="assistant")
    assert "boundary_merged" not in row.flags


@settings(deadline=None)
@given(letters, letters)
def test_joint_and_split_differ_only_in_tokens_that_touch_the_boundary(prompt, answer):
    assume(prompt and answer)
    joint, split = (plain(prompt, answer, MERGING, boundary=b).ids.tolist() for b in ("joint", "split"))
    shorter = range(min(len(joint), len(split)))
    first = next((i for i in shorter if joint[i] != split[i]), len(joint))
    last = next((i for i in shorter if joint[-1 - i] != split[-1 - i]), len(joint))
    assert text_of(joint, MERGING) == text_of(split, MERGING) == prompt + answer + "<|im_end|>"
    if joint != split:
        assert len(text_of(joint[:first], MERGING)) <= len(prompt)
        assert len(text_of(joint[len(joint) - last :], MERGING)) <= len(answer) + len("<|im_end|>")


@settings(deadline=None)
@given(letters, letters)
def test_joint_context_is_the_beginning_of_the_prompt_alone(prompt, answer):
    assume(prompt and answer)
    row = plain(prompt, answer, MERGING)
    context, alone = row.ids[~row.mask].tolist(), MERGING.encode(prompt)
    assert context == alone[: len(context)]
    assert ("boundary_merged" in row.flags) == (len(context) < len(alone))


def test_prompt_of_a_pair_ends_where_the_first_of_its_answers_changes_it():
    row = pair("xa", "bd", "d", MERGING)
    assert pair_text(row, MERGING) == ("x", "abd<|im_end|>", "ad<|im_end|>")
    assert "boundary_merged" in row.flags


def test_split_pair_keeps_the_whole_prompt():
    row = pair("xa", "bd", "d", MERGING, boundary="split")
    assert pair_text(row, MERGING) == ("xa", "bd<|im_end|>", "d<|im_end|>")


def test_pair_without_a_token_before_its_answers_is_refused():
    with pytest.raises(ValueError, match="no-prompt"):
        pair("a", "bc", "d", MERGING)


# What a length limit takes away


def test_keep_start_cuts_the_end_and_says_that_the_end_token_is_gone():
    row = plain("ab", "cdef", max_length=4)
    assert (text_of(row.ids), row.mask.tolist()) == ("abcd", [False, False, True, True])
    assert row.flags == {"eos_added", "eos_lost", "truncated"}


def test_losing_only_what_follows_the_end_token_is_not_losing_it():
    row = plain("ab", "cd<|im_end|>\n", max_length=5)
    assert row.flags == {"eos_present", "truncated"}


def test_row_at_the_limit_is_not_cut():
    assert plain("ab", "cd", max_length=5).flags == {"eos_added"}


def test_drop_refuses_a_row_over_the_limit():
    with pytest.raises(ValueError, match=r"a.jsonl row 7: 5 tokens exceed max_length 4 \[too-long\]"):
        plain("ab", "cd", max_length=4, truncation_mode="drop")


def test_prompt_that_fills_the_limit_is_refused():
    with pytest.raises(ValueError, match="prompt-too-long"):
        plain("abcd", "e", max_length=4)


def test_pair_keep_start_cuts_each_answer_at_the_limit():
    row = pair("pp", "abcdef", "xyz", max_length=5)
    assert pair_text(row) == ("pp", "abc", "xyz")
    assert row.flags == {"eos_added", "eos_lost", "truncated"}


def test_pair_whose_prompt_fills_the_limit_is_refused():
    with pytest.raises(ValueError, match="prompt-too-long"):
        pair("pppp", "a", "b", max_length=4)


@pytest.mark.parametrize(
    ("prompt", "chosen", "expected"),
    [
        ("0123", "abcde", ("0123", "abcde", "x")),  # 10 tokens with the end token: fits
        ("01234", "abcde", ("234", "abcde", "x")),  # the prompt alone is cut
        ("01234", "abcdefg", ("234", "abcdefg", "x")),  # just enough: no answer token has to go
        ("01234", "abcdefgh", ("234", "abcdefg", "x")),  # 7 = max_length - max_prompt_length answer tokens stay
        ("01", "abcdefghi", ("01", "abcdefg", "x")),  # as many though the short prompt leaves room for 8
    ],
)
def test_keep_end_cuts_the_beginning_of_the_prompt_and_then_the_answers(prompt, chosen, expected):
    row = pair(prompt, chosen, "x", max_length=10, max_prompt_length=3, truncation_mode="keep_end")
    assert tuple(text.removesuffix("<|im_end|>") for text in pair_text(row)) == expected


def test_keep_end_keeps_half_of_max_length_for_the_prompt_by_default():
    assert pair_text(pair("0123456789", "a", "b", max_length=8, truncation_mode="keep_end"))[0] == "6789"


def test_answers_that_differ_only_behind_the_limit_are_refused():
    with pytest.raises(ValueError, match="differ only after 4 tokens .*same-answers-cut"):
        pair("pp", "abX", "abY", max_length=4)


def test_answers_of_the_same_tokens_are_refused():
    with pytest.raises(ValueError, match=r"\[same-answers\]"):
        pair("p", "a", "a<|im_end|>")


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "prompt"}, "train_on must be one of completion, assistant, all, got 'prompt'"),
        ({"boundary": "apart"}, "boundary must be one of joint, split, got 'apart'"),
        ({"truncation_mode": "cut"}, "truncation_mode must be one of keep_start, keep_end, drop, got 'cut'"),
        ({"special_tokens_in_text": "keep"}, "special_tokens_in_text must be one of token, text, refuse, got 'keep'"),
        ({"max_length": 1}, "max_length must be at least 2, .*got 1"),
        ({"max_length": None, "truncation_mode": "drop"}, "truncation_mode drop needs a max_length"),
        ({"max_prompt_length": 10}, "max_prompt_length needs truncation_mode keep_end, got keep_start"),
        (
            {"max_length": 9, "truncation_mode": "keep_end", "max_prompt_length": 9},
            r"max_prompt_length must be in \[1, 8\], got 9",
        ),
    ],
)
def test_wrong_setting_is_one_line_that_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        EncodeConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("supervised", {"truncation_mode": "keep_end"}, "must be keep_start or drop for supervised rows"),
        ("preference", {"train_on": "all"}, "train_on must be completion for preference rows"),
        ("unpaired", {}, "kind must be supervised or preference, got 'unpaired'"),
    ],
)
def test_setting_without_effect_on_a_kind_of_row_is_an_error(kind, options, message):
    with pytest.raises(ValueError, match=message):
        encode_records([Plain("", "a", ORIGIN)], BYTES, EncodeConfig(**options), kind)


# Whole data sets


@settings(deadline=None)
@given(st.lists(st.tuples(letters, letters), min_size=1, max_size=8), st.sampled_from(["joint", "split"]))
def test_rows_of_a_data_set_are_the_rows_encoded_one_by_one(texts, boundary):
    records = [Plain(prompt, answer + "!", Origin("a.jsonl", n)) for n, (prompt, answer) in enumerate(texts, start=1)]
    rows, _ = encode_records(records, MERGING, EncodeConfig(boundary=boundary), "supervised")
    alone = [encoded(record, MERGING, boundary=boundary) for record in records]
    assert [(r.ids.tolist(), r.mask.tolist(), r.origin, r.flags) for r in rows] == [
        (r.ids.tolist(), r.mask.tolist(), r.origin, r.flags) for r in alone
    ]


def test_rows_stay_in_order_across_batches(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_ROWS", 3)
    records = [Plain("", f"{number} ", Origin("a.jsonl", number)) for number in range(1, 12)]
    rows, _ = encode_records(records, BYTES, EncodeConfig(), "supervised")
    assert [text_of(row.ids) for row in rows] == [f"{number} <|im_end|>" for number in range(1, 12)]


def test_unusable_rows_are_left_out_and_counted_by_rule():
    texts = ["short", "much too long", "ok", "again too long"]
    records = [Plain("", text, Origin("a.jsonl", number)) for number, text in enumerate(texts, start=1)]
    options = EncodeConfig(max_length=8, truncation_mode="drop")
    rows, audit = encode_records(records, BYTES, options, "supervised")
    assert [row.origin.row for row in rows] == [1, 3]
    assert (audit.rows, audit.kept, audit.tokens, audit.target_tokens) == (4, 2, 6 + 3, 5 + 2)
    assert audit.dropped["too-long"].first == ["a.jsonl row 2", "a.jsonl row 4"]
    assert dict(audit.flags) == {"eos_added": 2}


def test_audit_of_pairs_counts_the_prompt_once():
    records = [Preference("ppp", ("abcd", "xy"), PAIR, ORIGIN, {"score": 2.0})]
    (row,), audit = encode_records(records, BYTES, EncodeConfig(), "preference")
    assert (audit.tokens, audit.target_tokens, audit.percentiles()["max"]) == (3 + 5 + 3, 5 + 3, 3 + 5)
    assert (row.origin, row.columns) == (ORIGIN, {"score": 2.0})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no usable row among 0: the data set is empty"),
        ([Plain("", "too long", ORIGIN)] * 2, r"no usable row among 2: too-long 2x, first a.jsonl row 7: 9 tokens"),
        ([Preference("p", ("a", "b"), PAIR, ORIGIN, {})], "wrong-kind"),
    ],
)
def test_data_set_without_a_usable_row_is_an_error_that_says_why(records, message):
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        encode_records(records, BYTES, EncodeConfig(max_length=8, truncation_mode="drop"), "supervised")


# Text that spells special tokens

SPELLED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<|", "a", "\n", " "]
spelling = st.lists(st.sampled_from(SPELLED), min_size=1, max_size=6).map("".join)
SPECIAL = sorted(BYTES.token_id(token) for token in SPELLED[:3])


def own_tokens(row, tokenizer: Tokenizer = BYTES) -> int:
    return int(np.isin(row, SPECIAL).sum())


@settings(deadline=None)
@given(spelling, spelling, st.sampled_from(["joint", "split"]), st.sampled_from(["completion", "assistant", "all"]))
def test_special_tokens_that_stay_text_are_the_same_text_and_no_tokens(ask, answer, boundary, train_on):
    chat = Chat((Message("user", ask), Message("assistant", answer + ".")), ORIGIN)
    row = encoded(chat, max_length=None, train_on=train_on, boundary=boundary, special_tokens_in_text="text")
    assert text_of(row.ids) == BYTES.render([message._asdict() for message in chat.messages])
    assert own_tokens(row.ids) == 4  # two turns, each with a beginning and an end
    assert train_on == "all" or text_of(row.ids[row.mask]) == answer + ".<|im_end|>\n"
    assert train_on == "all" or own_tokens(row.ids[row.mask]) == 1


@settings(deadline=None)
@given(spelling, spelling, st.sampled_from(["joint", "split"]))
def test_special_tokens_of_a_text_row_that_stay_text_are_the_same_text_and_no_tokens(prompt, answer, boundary):
    options = {"max_length": None, "boundary": boundary, "special_tokens_in_text": "text"}
    find = BYTES.special_text.pattern.findall
    if find(prompt + answer) != find(prompt) + find(answer):
        with pytest.raises(ValueError, match="where the prompt ends"):
            plain(prompt, answer + ".", **options)
        return
    row = plain(prompt, answer + ".", **options)
    assert text_of(row.ids) == prompt + answer + ".<|im_end|>" and own_tokens(row.ids) == 1
    texts = pair_text(pair(prompt, answer + "?", answer + "!", **options))
    assert texts == (prompt, answer + "?<|im_end|>", answer + "!<|im_end|>")


@settings(deadline=None)
@given(content, content)
def test_settings_for_special_tokens_agree_where_a_text_spells_none(ask, answer):
    chat = Chat((Message("user", ask), Message("assistant", answer + ".")), ORIGIN)
    assume(BYTES.special_text.find([ask, answer]) is None)
    rows = [encoded(chat, special_tokens_in_text=way) for way in ("token", "text", "refuse")]
    assert all(row.ids.tolist() == rows[0].ids.tolist() and row.flags == rows[0].flags for row in rows)


def test_special_token_that_prompt_and_answer_spell_together_is_seen():
    row = plain("a <|im_", "end|> b", max_length=None)
    assert "special_text_in_content" in row.flags and own_tokens(row.ids) == 2
    for way in ("text", "refuse"):
        with pytest.raises(ValueError, match="special-token"):
            plain("a <|im_", "end|> b", special_tokens_in_text=way)
        with pytest.raises(ValueError, match="special-token"):
            pair("a <|im_", "b", "end|> b", special_tokens_in_text=way)


def test_rows_that_stay_text_keep_their_place_among_the_others():
    texts = ["one", "a <|im_end|> b", "two", "<|im_start|>", "three"]
    records = [Plain("", text, Origin("a.jsonl", number)) for number, text in enumerate(texts, start=1)]
    rows, audit = encode_records(records, BYTES, EncodeConfig(special_tokens_in_text="text"), "supervised")
    assert [text_of(row.ids) for row in rows] == [text + "<|im_end|>" for text in texts]
    assert audit.flags["special_text_kept"] == 2
    rows, audit = encode_records(records, BYTES, EncodeConfig(special_tokens_in_text="refuse"), "supervised")
    assert (len(rows), audit.dropped["special-token"].rows) == (3, 2)


def test_a_special_token_that_no_other_tokens_spell_refuses_its_row():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"first a.jsonl row 7: .*\[special-token\]\Z"):
        plain("", "a<|endoftext|>a", Tokenizer(backend, {}), special_tokens_in_text="text")
