"""Row layouts in, canonical rows out: every format, every rule that refuses a row, and no other error for any dict."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data.columns import REFUSED_COLUMNS, TEMPLATE_KEYS
from phi2.data.formats import FORMATS, detect_format, parse_row
from phi2.data.records import KINDS, PAIR, Chat, Message, Origin, Plain, Preference, RowError

ORIGIN = Origin("data.jsonl", 17)
ASK, YES, NO = Message("user", "Is 7 prime?"), Message("assistant", "Yes."), Message("assistant", "No.")


def openai(*messages: Message) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def sharegpt(*messages: Message) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m.role, m.role), "value": m.content} for m in messages]


def refusal(row: dict, **options) -> RowError:
    with pytest.raises(RowError) as caught:
        parse_row(row, ORIGIN, **options)
    return caught.value


SAME_CHAT = {
    "messages": {"messages": openai(ASK, YES)},
    "conversations": {"conversations": sharegpt(ASK, YES)},
    "prompt-completion": {"prompt": openai(ASK), "completion": openai(YES)},
    "alpaca": {"instruction": ASK.content, "input": "", "output": YES.content},
    "gpteacher": {"instruction": ASK.content, "input": None, "response": YES.content},
    "qa": {"question": ASK.content, "answer": YES.content},
}
SAME_PAIR = {
    "prompt-pair": {"prompt": openai(ASK), "chosen": openai(YES), "rejected": openai(NO)},
    "sharegpt-pair": {"conversations": sharegpt(ASK), "chosen": sharegpt(YES)[0], "rejected": sharegpt(NO)[0]},
    "alpaca-pair": {"instruction": ASK.content, "input": "", "chosen": YES.content, "rejected": NO.content},
    "math-pair": {"instruction": ASK.content, "chosen_response": YES.content, "rejected_response": NO.content},
    "orca-pair": {"system": "", "input": ASK.content, "chosen": YES.content, "rejected": NO.content},
    "qa-pair": {"question": ASK.content, "chosen": YES.content, "rejected": NO.content},
    "openai-pair": {
        "input": {"messages": openai(ASK)},
        "preferred_output": openai(YES),
        "non_preferred_output": openai(NO),
    },
    "messages-pair": {"messages": openai(ASK), "chosen": openai(YES)[0], "rejected": openai(NO)},
    "bare-pair": {"chosen": openai(ASK, YES), "rejected": openai(ASK, NO)},
}
ONE_ROW_EACH = {
    **SAME_CHAT,
    **SAME_PAIR,
    "text": {"text": "Once upon a time."},
    "messages-label": {"messages": openai(ASK, YES), "label": True},
    "messages-kto": {"messages": openai(ASK, YES), "kto_tag": True},
    "sharegpt-kto": {"conversations": sharegpt(ASK, YES), "kto_tag": True},
    "alpaca-kto": {"instruction": ASK.content, "input": "", "output": YES.content, "kto_tag": True},
    "prompt-completion-label": {"prompt": "Is 7 prime?", "completion": " Yes.", "label": False},
    "gold-pair": {**SAME_PAIR["prompt-pair"], "reference": "Certainly."},
    "scored-answers": {"prompt": ASK.content, "completions": [NO.content, YES.content], "scores": [1, 4.5]},
    "ranked-answers": {"prompt": openai(ASK), "completions": [openai(NO), openai(YES)], "ranks": [2, 1]},
    "rated-answers": {
        "instruction": ASK.content,
        "completions": [{"response": NO.content, "overall_score": 2}, {"response": YES.content, "overall_score": 7.5}],
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_the_table_is_detected_from_its_columns(name):
    assert detect_format(ONE_ROW_EACH[name]) == name


@pytest.mark.parametrize("name", SAME_CHAT)
def test_one_conversation_is_the_same_chat_in_every_format(name):
    assert parse_row(SAME_CHAT[name], ORIGIN) == Chat((ASK, YES), ORIGIN)


@pytest.mark.parametrize("name", SAME_PAIR)
def test_one_preference_is_the_same_pair_in_every_format(name):
    assert parse_row(SAME_PAIR[name], ORIGIN) == Preference((ASK,), ((YES,), (NO,)), PAIR, ORIGIN, {})


turn_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: re.sub(r"<\|(im_end|endoftext)\|>", "", text).strip()  # an end marker alone says nothing
)


@given(st.lists(st.tuples(turn_text, turn_text), min_size=1, max_size=4), st.none() | turn_text)
def test_any_conversation_survives_openai_and_sharegpt_spelling(turns, system):
    messages = (Message("system", system),) if system else ()
    for ask, answer in turns:
        messages += Message("user", ask), Message("assistant", answer)
    expected = Chat(messages, ORIGIN)
    assert parse_row({"messages": openai(*messages)}, ORIGIN) == expected
    assert parse_row({"conversations": sharegpt(*messages)}, ORIGIN) == expected


def test_a_label_may_be_one_of_numpy():
    row = {"prompt": "7 is", "completion": " prime.", "label": np.bool_(True)}
    assert parse_row(row, ORIGIN) == parse_row({**row, "label": True}, ORIGIN)


def test_input_follows_the_instruction_after_an_empty_line_and_system_stands_before():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."}
    assert parse_row(row, ORIGIN).messages == (
        Message("system", "Be brief."),
        Message("user", "Add.\n\n1 and 2"),
        Message("assistant", "3"),
    )


def test_two_texts_stay_texts():
    assert parse_row({"prompt": "1 + 1 =", "completion": " 2"}, ORIGIN) == Plain("1 + 1 =", " 2", ORIGIN)
    assert parse_row({"text": "All of it."}, ORIGIN) == Plain("", "All of it.", ORIGIN)


def test_assistant_turns_of_a_prompt_are_context_and_those_of_the_completion_are_targets():
    chat = parse_row({"prompt": openai(ASK, NO, ASK), "completion": openai(YES)}, ORIGIN)
    assert [turn.train for turn in chat.messages] == [True, False, True, True]


def test_weight_zero_keeps_a_turn_out_of_the_loss():
    turns = sharegpt(ASK, NO, ASK, YES)
    turns[1]["weight"], turns[3]["weight"] = 0.0, None
    assert [turn.train for turn in parse_row({"conversations": turns}, ORIGIN).messages] == [True, False, True, True]


def test_an_empty_answer_outside_the_loss_is_accepted():
    turns = [{"from": "gpt", "value": "", "weight": 0}, *sharegpt(ASK, YES)]
    assert parse_row({"conversations": turns}, ORIGIN).messages[0] == Message("assistant", "", False)


def test_two_turns_of_one_role_in_a_row_are_accepted():
    results = Message("tool", "7"), Message("tool", "8")
    assert parse_row({"messages": openai(ASK, *results, NO, YES)}, ORIGIN).messages == (ASK, *results, NO, YES)


def test_a_column_without_a_value_does_not_count():
    assert detect_format({"messages": None, "conversations": sharegpt(ASK, YES), "text": None}) == "conversations"


def test_kind_decides_how_a_row_of_two_kinds_is_read():
    both = {**SAME_PAIR["prompt-pair"], "messages": openai(ASK, YES)}
    assert detect_format(both) == "prompt-pair"
    assert detect_format(both, kind="supervised") == "messages"


def test_an_unknown_layout_is_told_with_its_columns_and_the_known_formats():
    with pytest.raises(
        ValueError, match="'body', 'title'.*prompt-pair: prompt.chosen.rejected;.*; text: text"
    ) as caught:
        detect_format({"title": 1, "body": 2})
    assert "\n" not in str(caught.value)


def test_the_wrong_kind_of_data_is_named():
    error = refusal(SAME_CHAT["alpaca"], kind="preference")
    assert "they make supervised data, alpaca" in str(error)


def test_an_unknown_format_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="must be one of gold-pair, prompt-pair, .*got 'json'"):
        parse_row({}, ORIGIN, format="json")


# --- preference


def test_a_prompt_text_that_the_message_lists_repeat_is_the_prompt_once():
    row = {"prompt": "Is 7 prime?", "chosen": openai(ASK, YES), "rejected": openai(ASK, NO)}
    assert parse_row(row, ORIGIN) == Preference((ASK,), ((YES,), (NO,)), PAIR, ORIGIN, {})


def test_turns_that_both_answers_share_belong_to_the_prompt():
    row = {"prompt": openai(ASK), "chosen": openai(NO, ASK, YES), "rejected": openai(NO, ASK, NO)}
    assert parse_row(row, ORIGIN) == Preference((ASK, NO, ASK), ((YES,), (NO,)), PAIR, ORIGIN, {})


def test_a_system_turn_in_front_of_both_answers_is_part_of_the_prompt():
    system = Message("system", "Be brief.")
    row = {"prompt": "Is 7 prime?", "chosen": openai(system, ASK, YES), "rejected": openai(system, ASK, NO)}
    assert parse_row(row, ORIGIN).prompt == (system, ASK)


def test_templated_texts_stay_as_they_are():
    prompt, chosen, rejected = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>",
        "<|im_end|>No",
    )
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source_dataset": "orca"}
    assert parse_row(row, ORIGIN) == Preference(prompt, (chosen, rejected), PAIR, ORIGIN, {"source_dataset": "orca"})


def test_numbers_and_labels_of_a_pair_reach_its_columns():
    about = {"score_chosen": 8.5, "chosen_rating": 4, "in_gsm8k_train": False, "source_dataset": "orca"}
    other = {"rationale": "word " * 30, "order": ["a"], "nothing": None, "nan": float("nan"), "huge": 10**400}
    pair = parse_row({**SAME_PAIR["prompt-pair"], **about, **other}, ORIGIN)
    assert pair.columns == {"score_chosen": 8.5, "chosen_rating": 4.0, "in_gsm8k_train": 0.0, "source_dataset": "orca"}


# --- answers with a label


def test_the_last_turn_of_a_labelled_conversation_is_the_completion():
    row = {"messages": openai(ASK, NO, ASK, YES), "label": False}
    assert parse_row(row, ORIGIN) == Preference((ASK, NO, ASK), ((YES,),), (0.0,), ORIGIN, {})


def test_labelled_texts_stay_texts():
    row = {"prompt": "1 + 1 =", "completion": " 2", "label": True}
    assert parse_row(row, ORIGIN) == Preference("1 + 1 =", (" 2",), (1.0,), ORIGIN, {})


def test_a_labelled_answer_keeps_the_other_columns():
    row = {"prompt": "1 + 1 =", "completion": " 2", "label": True, "source": "sums", "weight": 0.5}
    assert parse_row(row, ORIGIN).columns == {"source": "sums", "weight": 0.5}


# --- several answers


@pytest.mark.parametrize(
    ("name", "scores"),
    [("scored-answers", (4.5, 1.0)), ("ranked-answers", (-1.0, -2.0)), ("rated-answers", (7.5, 2.0))],
)
def test_the_best_of_several_answers_comes_first(name, scores):
    record = parse_row(ONE_ROW_EACH[name], ORIGIN)
    words = [answer if isinstance(answer, str) else answer[0].content for answer in record.answers]
    assert (words, record.scores) == ([YES.content, NO.content], scores)


def test_answers_of_equal_score_stay_in_their_order():
    row = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 2, 1]}
    assert parse_row(row, ORIGIN).answers == ("c", "b", "d")


def test_an_answer_to_imitate_stands_behind_the_pair():
    record = parse_row(ONE_ROW_EACH["gold-pair"], ORIGIN)
    assert record.answers == ((YES,), (NO,), (Message("assistant", "Certainly."),)) and record.has_gold


def test_what_a_rating_says_besides_its_score_is_counted():
    rated, status = {"response": "b", "overall_score": 1, "critique": "short"}, {}
    parse_row({"instruction": "a", "completions": [rated, {**rated, "overall_score": 2}]}, ORIGIN, column_status=status)
    assert status == {"completions.critique": "not read"}


# --- rules

REFUSED = [
    ("one-answer", {"prompt": "a", "completions": ["b"], "scores": [1]}),
    ("equal-scores", {"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}),
    ("bad-scores", {"prompt": "a", "completions": ["b", "c"], "scores": [1]}),
    ("bad-scores", {"prompt": "a", "completions": ["b", "c"], "ranks": [1, True]}),
    ("bad-scores", {"prompt": "a", "completions": ["b", "c"], "scores": [1, float("nan")]}),
    ("bad-scores", {"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]}),
    ("not-a-list", {"prompt": "a", "completions": "b", "scores": [1]}),
    ("not-a-list", {"instruction": "a", "completions": ["b", "c"]}),
    ("no-prompt", {"prompt": "", "completions": ["b", "c"], "scores": [1, 2]}),
    (
        "prompt-mismatch",
        {"prompt": openai(ASK), "chosen": openai(NO, ASK, YES), "rejected": openai(NO, ASK, NO), "reference": "d"},
    ),
    ("unknown-format", {"title": "x"}),
    ("not-a-list", {"messages": "hello"}),
    ("no-messages", {"messages": []}),
    ("not-a-message", {"messages": ["hello"]}),
    ("unknown-role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("unknown-role", {"conversations": [{"from": ["gpt"], "value": "x"}]}),
    ("not-text", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}),
    ("not-text", {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}),
    ("not-text", {"messages": [{"role": "user", "content": []}]}),
    ("not-text", {"question": "x", "answer": 3}),
    ("bad-unicode", {"text": "\ud800"}),
    ("bad-weight", {"conversations": [{"from": "gpt", "value": "x", "weight": 0.5}]}),
    ("no-assistant", {"messages": openai(ASK)}),
    ("last-role", {"messages": openai(ASK, YES, ASK)}),
    ("nothing-to-train", {"messages": [{"role": "assistant", "content": "x", "weight": 0}]}),
    ("empty-answer", {"messages": openai(ASK, Message("assistant", " \n"))}),
    ("empty-answer", {"text": ""}),
    ("empty-answer", {"prompt": "x", "chosen": "y<|im_end|>", "rejected": " <|im_end|>"}),
    ("empty-answer", {**SAME_PAIR["qa-pair"], "chosen": ""}),
    ("same-answers", {"prompt": "x", "chosen": "y", "rejected": "y"}),
    ("same-answers", {"chosen": openai(ASK, YES), "rejected": openai(ASK, YES)}),
    ("no-prompt", {"chosen": "Human: x Assistant: y", "rejected": "Human: x Assistant: z"}),
    ("no-prompt", {"prompt": "", "chosen": "y", "rejected": "z"}),
    ("no-prompt", {"chosen": openai(ASK, YES), "rejected": openai(Message("user", "What?"), NO)}),
    ("no-prompt", {"messages": openai(YES), "label": True}),
    ("prompt-repeated", {"prompt": "x", "chosen": "x y", "rejected": "x z"}),
    ("prompt-repeated", {"prompt": "x\n", "chosen": " x y", "rejected": "x\n\nz"}),
    ("prompt-mismatch", {"prompt": "What?", "chosen": openai(ASK, YES), "rejected": openai(ASK, NO)}),
    ("answer-is-prefix", {"prompt": openai(ASK), "chosen": openai(YES, NO), "rejected": openai(YES)}),
    ("mixed-answer", {"prompt": openai(ASK), "chosen": openai(YES, ASK, YES), "rejected": openai(NO, ASK, YES)}),
    ("bad-label", {"messages": openai(ASK, YES), "label": 1}),
    ("bad-train", {"messages": [{"role": "assistant", "content": "x", "train": "no"}]}),
    ("untrained-answer", {"prompt": "x", "chosen": openai(YES), "rejected": {**openai(NO)[0], "weight": 0}}),
    ("bad-tool-calls", {"messages": [{"role": "assistant", "content": None, "tool_calls": "f(x)"}]}),
    ("bad-tools", {"messages": openai(ASK, YES), "tools": [3]}),
    ("bad-chat-template-kwargs", {"messages": openai(ASK, YES), "chat_template_kwargs": [3]}),
    ("bad-unicode", {"messages": openai(ASK, YES), "tools": [{"name": "\ud800"}]}),
    ("bad-history", {**SAME_CHAT["alpaca"], "history": [["only a question"]]}),
    ("bad-history", {**SAME_CHAT["alpaca"], "history": "earlier"}),
    ("not-a-request", {"input": "x", "preferred_output": openai(YES), "non_preferred_output": openai(NO)}),
    ("two-systems", {"messages": openai(ASK, YES), "system": "a", "system_prompt": "b"}),
    ("two-systems", {"messages": openai(Message("system", "a"), ASK, YES), "system": "b"}),
]


@pytest.mark.parametrize(("rule", "row"), REFUSED, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(REFUSED)])
def test_a_row_that_breaks_a_rule_is_refused_in_one_line_with_its_place(rule, row):
    error = refusal(row)
    assert (error.rule, error.origin) == (rule, ORIGIN)
    assert str(error).startswith("data.jsonl row 17: ") and "\n" not in str(error)


def test_a_text_pair_without_a_prompt_column_is_told_to_add_one():
    assert "a column 'prompt' is needed" in str(refusal({"chosen": "a b", "rejected": "a c"}))


def test_a_row_without_a_column_of_the_format_asked_for_is_refused():
    assert refusal({"text": "x"}, format="messages").rule == "missing-column"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
turns = st.fixed_dictionaries(
    {},
    optional={key: st.sampled_from(["user", "gpt", "system", ""]) | json_values for key in ("role", "from")}
    | {key: st.sampled_from(["x", "y", " "]) | json_values for key in ("content", "value", "weight")}
    | {key: json_values for key in ("train", *TEMPLATE_KEYS, "id")},
)
column_values = st.sampled_from(["x", "xy"]) | json_values | turns | st.lists(turns, max_size=3)
COLUMNS = sorted({column for layout in FORMATS.values() for column in layout.required} | {*REFUSED_COLUMNS, "score"})


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=3), column_values, max_size=6),
    st.sampled_from([None, *FORMATS]),
    st.sampled_from([None, *KINDS]),
)
def test_any_row_becomes_a_record_or_a_row_error(row, format, kind):
    try:
        record = parse_row(row, ORIGIN, format, kind)
    except RowError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(record, Chat | Plain | Preference) and record.origin == ORIGIN
