"""Nothing of a row in silence: every column and every key of a message is read, refused by name, or counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data import columns
from phi2.data.columns import COLUMN_STATUSES, IGNORED, KEPT, NOT_READ
from phi2.data.formats import FORMATS, columns_read, document, parse_row
from phi2.data.records import PAIR, Chat, Message, Messages, Origin, Preference, RowError, is_conversational

ORIGIN = Origin("data.jsonl", 17)
ASK, YES, NO = Message("user", "Is 7 prime?"), Message("assistant", "Yes."), Message("assistant", "No.")
CHAT = [{"role": "user", "content": "Is 7 prime?"}, {"role": "assistant", "content": "Yes."}]
TEXT_PAIR = {"prompt": "7 is ", "chosen": "prime", "rejected": "even"}
CALL = {"function": {"name": "is_prime", "arguments": {"n": 7}}}
TOOL = {"type": "function", "function": {"name": "is_prime"}}


def turns(*messages: Message) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


ROWS = {  # one of every format; where texts may stand for messages, one of each
    "prompt-pair": {"prompt": turns(ASK), "chosen": turns(YES), "rejected": turns(NO)},
    "prompt-pair of texts": TEXT_PAIR,
    "sharegpt-pair": {"conversations": turns(ASK), "chosen": turns(YES)[0], "rejected": turns(NO)[0]},
    "alpaca-pair": {"instruction": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."},
    "math-pair": {"instruction": "Is 7 prime?", "chosen_response": "Yes.", "rejected_response": "No."},
    "orca-pair": {"input": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."},
    "qa-pair": {"question": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."},
    "openai-pair": {
        "input": {"messages": turns(ASK)},
        "preferred_output": turns(YES),
        "non_preferred_output": turns(NO),
    },
    "messages-pair": {"messages": turns(ASK), "chosen": turns(YES), "rejected": turns(NO)},
    "bare-pair": {"chosen": turns(ASK, YES), "rejected": turns(ASK, NO)},
    "messages-label": {"messages": CHAT, "label": True},
    "messages-kto": {"messages": CHAT, "kto_tag": False},
    "sharegpt-kto": {"conversations": CHAT, "kto_tag": False},
    "alpaca-kto": {"instruction": "Is 7 prime?", "output": "Yes.", "kto_tag": True},
    "prompt-completion-label": {"prompt": turns(ASK), "completion": turns(YES), "label": True},
    "prompt-completion-label of texts": {"prompt": "7 is ", "completion": "prime", "label": True},
    "gold-pair": {"prompt": turns(ASK), "chosen": turns(YES), "rejected": turns(NO), "reference": turns(YES)},
    "gold-pair of texts": {**TEXT_PAIR, "reference": "prime"},
    "scored-answers": {"prompt": turns(ASK), "completions": [turns(YES), turns(NO)], "scores": [1, 0]},
    "scored-answers of texts": {"prompt": "7 is ", "completions": ["prime", "even"], "scores": [1, 0]},
    "ranked-answers": {"prompt": turns(ASK), "completions": [turns(YES), turns(NO)], "ranks": [1, 2]},
    "ranked-answers of texts": {"prompt": "7 is ", "completions": ["prime", "even"], "ranks": [1, 2]},
    "rated-answers": {
        "instruction": "Is 7 prime?",
        "completions": [{"response": "Yes.", "overall_score": 5}, {"response": "No.", "overall_score": 1}],
    },
    "messages": {"messages": CHAT},
    "conversations": {"conversations": CHAT},
    "prompt-completion": {"prompt": turns(ASK), "completion": turns(YES)},
    "prompt-completion of texts": {"prompt": "7 is ", "completion": "prime"},
    "alpaca": {"instruction": "Is 7 prime?", "output": "Yes."},
    "gpteacher": {"instruction": "Is 7 prime?", "response": "Yes."},
    "qa": {"question": "Is 7 prime?", "answer": "Yes."},
    "text": {"text": "7 is prime"},
}
SET = {  # a value of each column and key that some format reads
    **{name: "Be brief." for name in columns.SYSTEM},
    "history": [["Is 9 prime?", "No."]],
    "context": "7 is odd.",
    "input": "Say why.",
    "tools": [TOOL],
    "documents": [{"title": "Primes"}],
    "chat_template_kwargs": {"enable_thinking": True},
}


def messages_of(record) -> Messages:
    """All turns that a record holds, with its template variables where it has some."""
    if isinstance(record, Chat):
        return record.messages
    return sum(record.answers, record.prompt) if isinstance(record, Preference) else record.prompt + record.completion


def read(row: dict, format: str | None = None, **options):
    column_status: dict[str, str] = {}
    return parse_row(row, ORIGIN, format, column_status=column_status, **options), column_status


def refusal(row: dict, **options) -> RowError:
    with pytest.raises(RowError) as caught:
        parse_row(row, ORIGIN, **options)
    return caught.value


# The tables


def test_rows_of_these_tests_are_of_every_format():
    assert {name.split(" of ")[0] for name in ROWS} == set(FORMATS)


def test_the_committed_table_of_formats_is_what_the_code_reads():
    committed = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert committed == document()  # else: python -m phi2.data.formats > docs/formats.md


def test_the_table_of_formats_names_every_format_column_and_key():
    text = document()
    for name in [
        *FORMATS,
        *columns.REFUSED_COLUMNS,
        *columns.CONTENT_KEYS,
        *columns.TRAIN_KEYS,
        *columns.TEMPLATE_KEYS,
        *columns.REFUSED_KEYS,
    ]:
        assert f"| {name} |" in text
    for layout in FORMATS.values():
        assert ", ".join(layout.required) in text and ", ".join(layout.optional) in text


@pytest.mark.parametrize("name", ROWS)
def test_a_column_is_said_to_be_read_when_and_only_when_it_changes_the_record(name):
    row, format = ROWS[name], name.split(" of ")[0]
    plain = parse_row(row, ORIGIN, format)
    said = columns_read(format, is_conversational(plain))
    for column, value in SET.items():
        if column in row:
            continue
        try:
            changes = parse_row({**row, column: value}, ORIGIN, format)
        except RowError as error:
            assert column not in said and repr(column) in str(error)
        else:
            as_pairs_keep = isinstance(plain, Preference) and column in changes.columns
            assert (changes != plain) == (column in said or as_pairs_keep), column


# Whatever else is in a row

names = st.sampled_from(
    [*columns.REFUSED_COLUMNS, *columns.TEMPLATE_KEYS, *columns.REFUSED_KEYS, *columns.CONTENT_KEYS, "id", "score"]
)
names |= st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "x", "y" * 80])
values = scalars | st.sampled_from([[], {}, ["x"], [["x", "y"]], [{"a": 1}], {"a": 1}])


def messages_in(row: dict) -> list[tuple[str, dict]]:
    """Every message of a row, with the name of its column in counts."""
    found = []
    for column, value in row.items():
        if column == "input" and isinstance(value, dict):
            column, value = "input.messages", value["messages"]
        parts = value if isinstance(value, list) else [value]
        messages = [message for part in parts for message in (part if isinstance(part, list) else [part])]
        found += [(column, message) for message in messages if isinstance(message, Mapping)]
    return found


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ROWS)), names, values, st.booleans())
def test_every_extra_column_is_read_refused_or_counted(name, column, value, ignored):
    row, format = ROWS[name], name.split(" of ")[0]
    if column in row:
        return
    plain, ignore = parse_row(row, ORIGIN, format), frozenset({column} if ignored else ())
    said = columns_read(format, is_conversational(plain))
    try:
        _, column_status = read({**row, column: value}, format, ignore=ignore)
    except RowError as error:
        assert column in str(error) and not ignored
        assert column in said or column in columns.REFUSED_COLUMNS
    else:
        unset = value is None or value in ("", [], {})
        assert unset + (column in said and not ignored and not unset) + (column in column_status) == 1
        assert column not in column_status or (column_status[column] == IGNORED) == ignored


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ROWS)), names, values, st.booleans(), st.data())
def test_every_extra_key_of_a_message_is_read_refused_or_counted(name, key, value, ignored, data):
    row = copy.deepcopy(ROWS[name])
    holders = messages_in(row)
    if not holders:
        return
    holder, drawn = data.draw(st.sampled_from(holders))
    if key in drawn:
        return
    for _, message in holders:  # also where the other answer of a pair repeats it
        if message == drawn and message is not drawn:
            message[key] = value
    drawn[key] = value
    try:
        record, column_status = read(row, name.split(" of ")[0], ignore=frozenset({key} if ignored else ()))
    except RowError as error:
        assert key in str(error) or error.rule in ("nothing-to-train", "untrained-answer", "bad-unicode")
        assert not ignored or key in row
    else:
        unset = value is None or value in ("", [], {})
        carried = any(turn.extra and key in turn.extra for turn in messages_of(record))
        is_turn = "response" not in drawn  # an answer with its rating has no keys of a turn
        learnt = is_turn and key in columns.TRAIN_KEYS and not ignored and not unset
        counted = f"{holder}.{key}" in column_status
        assert unset + carried + learnt + counted == 1
        assert not counted or column_status[f"{holder}.{key}"] == (IGNORED if ignored else NOT_READ)


def test_columns_that_a_pair_keeps_for_the_loss_are_named_as_such():
    _, column_status = read({**TEXT_PAIR, "margin": 1.5, "source": "x", "weight": 2.0, "generations": ["a"]})
    assert column_status == {"margin": KEPT, "source": KEPT, "weight": KEPT, "generations": NOT_READ}


# What is refused, and why


@pytest.mark.parametrize("name", sorted(columns.REFUSED_COLUMNS))
def test_a_column_that_matters_is_refused_by_name_where_a_format_cannot_read_it(name):
    error = refusal({"text": "7 is prime", name: ["something"]})
    assert error.rule == "not-read" and repr(name) in str(error) and "ignore_columns" in str(error)
    assert columns.REFUSED_COLUMNS[name] in str(error)


@pytest.mark.parametrize("name", sorted(columns.REFUSED_KEYS))
def test_a_key_that_matters_is_refused_by_name(name):
    error = refusal({"messages": [CHAT[0] | {name: ["something"]}, CHAT[1]]})
    assert error.rule == "not-read" and repr(name) in str(error)


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": "7 is", "completion": " prime"}, ROWS["alpaca"]])
@pytest.mark.parametrize("name", ["label", "kto_tag", "train"])
def test_an_answer_that_is_called_bad_is_never_learnt(row, name):
    for bad in (False, 0, "false"):
        assert refusal({**row, name: bad}, kind="supervised").rule == "not-read"
    assert parse_row({**row, name: True}, ORIGIN, kind="supervised") == parse_row(row, ORIGIN)


def test_a_system_text_beside_texts_is_refused_with_what_would_read_it():
    assert "'system' (the system turn" in str(refusal({**TEXT_PAIR, "system": "Be brief."}))
    assert "only beside messages" in str(refusal({**TEXT_PAIR, "system": "Be brief."}))


def test_what_is_to_be_ignored_is_as_if_it_were_not_there():
    row = {"messages": [CHAT[0] | {"images": ["a.png"]}, CHAT[1]], "images": ["a.png"], "system": "Be brief."}
    record, column_status = read(row, ignore=frozenset({"images", "system", "nowhere"}))
    assert record == parse_row({"messages": CHAT}, ORIGIN)
    assert column_status == {"images": IGNORED, "system": IGNORED, "messages.images": IGNORED}


def test_nulls_and_empty_values_are_nothing():
    empty = {name: empty for name in columns.REFUSED_COLUMNS for empty in ("", [], {}, None)}
    record, column_status = read({"messages": [message | empty for message in CHAT], **empty})
    assert (record, column_status) == (parse_row({"messages": CHAT}, ORIGIN), {})


# What is read beside a conversation


@pytest.mark.parametrize("column", columns.SYSTEM)
@pytest.mark.parametrize(
    "name", [name for name in ROWS if is_conversational(parse_row(ROWS[name], ORIGIN, name.split(" of ")[0]))]
)
def test_a_system_text_is_the_first_turn_of_every_conversation(name, column):
    record = parse_row({**ROWS[name], column: "Be brief."}, ORIGIN, name)
    assert messages_of(record)[0] == Message("system", "Be brief.")
    assert messages_of(record)[1:] == messages_of(parse_row(ROWS[name], ORIGIN, name))


def test_a_system_text_that_the_conversation_has_already_stands_there_once():
    own = Message("system", "Be brief.")
    row = {"messages": turns(own, ASK, YES), "system": "Be brief.\n", "system_prompt": ""}
    assert parse_row(row, ORIGIN).messages == (own, ASK, YES)


def test_history_is_turns_before_the_question():
    row = {**ROWS["alpaca"], "history": [["Is 9 prime?", "No."]], "system": "Be brief."}
    before = Message("system", "Be brief."), Message("user", "Is 9 prime?"), NO
    assert parse_row(row, ORIGIN).messages == (*before, ASK, YES)
    assert parse_row({**ROWS["qa-pair"], "history": row["history"]}, ORIGIN).prompt == (*before[1:], ASK)


def test_context_stands_before_the_instruction_and_input_behind_it():
    row = {"instruction": "Is it prime?", "context": "Think of 7.", "input": "Say why.", "response": "Yes."}
    assert parse_row(row, ORIGIN).messages[0].content == "Think of 7.\n\nIs it prime?\n\nSay why."


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "is_prime"}}]'])
def test_tools_go_to_the_chat_template_from_a_list_or_json(tools):
    assert parse_row({"messages": CHAT, "tools": tools}, ORIGIN).variables == {"tools": [TOOL]}


def test_variables_of_the_template_are_those_that_are_set():
    row = {"messages": CHAT, "documents": [], "chat_template_kwargs": {"enable_thinking": False, "date": None}}
    assert parse_row(row, ORIGIN).variables == {"enable_thinking": False}


# Messages


def test_calls_of_tools_and_their_results_are_kept_for_the_template():
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    result = {"role": "function", "name": "is_prime", "content": "true", "tool_call_id": "c1"}
    chat = parse_row({"messages": [CHAT[0], calls, result, CHAT[1]]}, ORIGIN)
    assert chat.messages == (
        ASK,
        Message("assistant", "", True, {"content": None, "tool_calls": [CALL]}),
        Message("tool", "true", True, {"name": "is_prime", "tool_call_id": "c1"}),
        YES,
    )


def test_a_call_of_a_tool_is_an_answer_to_learn():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert parse_row({"messages": [CHAT[0], call]}, ORIGIN).messages[-1].extra == {"tool_calls": [CALL]}
    pair = parse_row({"prompt": CHAT[:1], "chosen": call, "rejected": CHAT[1:]}, ORIGIN)
    assert pair.answers[0][0].extra == {"tool_calls": [CALL]}


def test_roles_of_other_libraries_are_known():
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT]}
    assert parse_row(row, ORIGIN).messages[0] == Message("system", "Be brief.")


def test_text_in_parts_is_joined_and_other_keys_of_parts_are_counted():
    parts = [{"type": "text", "text": "Is 7 "}, {"type": "text", "text": "prime?", "cache": True, "image": None}]
    record, column_status = read({"messages": [{"role": "user", "content": parts}, CHAT[1]]})
    assert (record.messages[0], column_status) == (ASK, {"messages.content.cache": NOT_READ})


def test_train_false_keeps_a_turn_out_of_the_loss_as_weight_zero_does():
    rows = [[*CHAT, CHAT[0], CHAT[1]] for _ in range(3)]
    rows[0][1], rows[1][1], rows[2][1] = (CHAT[1] | extra for extra in ({"train": False}, {"weight": 0}, {"train": 1}))
    trains = [[turn.train for turn in parse_row({"messages": row}, ORIGIN).messages] for row in rows]
    assert trains == [[True, False, True, True]] * 2 + [[True] * 4]


# Pairs


def test_a_request_in_openai_form_brings_its_tools_and_its_other_settings_are_counted():
    row = {**ROWS["openai-pair"], "input": {"messages": turns(ASK), "tools": [TOOL], "parallel_tool_calls": True}}
    record, column_status = read(row)
    assert record == Preference((ASK,), ((YES,), (NO,)), PAIR, ORIGIN, {}, {"tools": [TOOL]})
    assert column_status == {"input.parallel_tool_calls": NOT_READ}


@pytest.mark.parametrize("answer", [YES, NO])
def test_a_column_of_messages_that_is_one_of_the_dialogues_is_no_prompt(answer):
    for chosen, rejected in ((turns(ASK, YES), turns(ASK, NO)), (turns(YES), turns(NO))):
        row = {"messages": turns(ASK, answer), "chosen": chosen, "rejected": rejected}
        assert parse_row(row, ORIGIN) == Preference((ASK,), ((YES,), (NO,)), PAIR, ORIGIN, {})


def test_an_empty_list_of_messages_does_not_hide_that_the_answers_carry_their_prompt():
    assert parse_row({**ROWS["bare-pair"], "messages": []}, ORIGIN) == parse_row(ROWS["bare-pair"], ORIGIN)
    row = {"messages": [], "conversations": [], "text": "7 is prime"}
    assert parse_row(row, ORIGIN) == parse_row(ROWS["text"], ORIGIN)


spoken = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
spoken = spoken.filter(
    lambda text: text == text.strip() and not any(mark in text for mark in ("Human:", "Assistant:", "<|im_end|>"))
)


@given(st.lists(st.tuples(spoken, spoken), max_size=3), spoken, spoken, spoken)
def test_whole_dialogues_in_text_are_cut_at_their_common_beginning(before, ask, chosen, rejected):
    def text(answer: str) -> str:
        return "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in [*before, (ask, answer)])

    row = {"chosen": text(chosen), "rejected": text(rejected)}
    if chosen == rejected:
        assert refusal(row).rule == "same-answers"
        return
    pair = parse_row(row, ORIGIN)
    said = [words for pair in before for words in pair]
    assert [turn.content for turn in pair.prompt] == [*said, ask]
    assert pair.answers[0] + pair.answers[1] == (Message("assistant", chosen), Message("assistant", rejected))


def test_dialogues_in_text_that_part_before_the_last_answer_are_refused():
    texts = [f"\n\nHuman: a\n\nAssistant: {b}\n\nHuman: c\n\nAssistant: d" for b in "xy"]
    assert refusal(dict(zip(("chosen", "rejected"), texts, strict=True))).rule == "mixed-answer"


def test_column_statuses_are_those_that_an_audit_knows():
    assert COLUMN_STATUSES == (NOT_READ, KEPT, IGNORED)
