"""Rows in, prompts out: the same prompt from every layout, nothing of a row passed over, text files line by line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data.columns import IGNORED, NOT_READ, RowContext
from phi2.data.formats import FORMATS
from phi2.data.prompts import COLUMNS, TOY, prompt_rows, read_prompt_row
from phi2.data.records import Message, Origin, Prompt, RowError
from phi2.data.toy import skills

ORIGIN = Origin("data.jsonl", 17)
ASK, YES, MORE = Message("user", "Is 7 prime?"), Message("assistant", "Yes."), Message("user", "And 8?")


def openai(*messages: Message) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def read(row: dict, as_turn: bool = True, **context) -> Prompt:
    return read_prompt_row(row, RowContext(ORIGIN, frozenset(), {}, **context), as_turn)


def columns_not_read(row: dict) -> set[str]:
    ctx = RowContext(ORIGIN, frozenset(), {})
    read_prompt_row(row, ctx, as_turn=True)
    assert set(ctx.column_status.values()) <= {NOT_READ}
    return set(ctx.column_status)


SAME = {
    "text": {"prompt": ASK.content},
    "messages": {"messages": openai(ASK)},
    "a prompt of messages": {"prompt": openai(ASK)},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK.content}]},
    "alpaca": {"instruction": ASK.content, "input": ""},
    "qa": {"question": ASK.content, "answer": YES.content},
    "orca": {"input": ASK.content, "chosen": "a", "rejected": "b"},
    "a chat to train on": {"messages": openai(ASK, YES)},
    "a pair": {"prompt": ASK.content, "chosen": openai(ASK, YES), "rejected": openai(ASK, MORE)},
}


@pytest.mark.parametrize("layout", SAME)
def test_every_layout_gives_the_same_prompt(layout):
    assert read(SAME[layout]) == Prompt((ASK,), ORIGIN)


def test_a_text_stays_text_for_a_model_without_turns():
    assert read({"question": "Why?", "context": "It rains."}, as_turn=False) == Prompt("It rains.\n\nWhy?", ORIGIN)


def test_earlier_turns_system_and_tools_belong_to_the_prompt():
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"prompt": "And 8?", "history": [[ASK.content, YES.content]], "system": "Be brief.", "tools": [tool]}
    assert read(row) == Prompt((Message("system", "Be brief."), ASK, YES, MORE), ORIGIN, {"tools": [tool]})


def test_other_columns_and_the_answer_of_a_training_row_are_counted():
    row = {"messages": openai(ASK, YES), "id": 7, "label": False, "weight": 0.5, "empty": ""}
    assert columns_not_read(row) == {"messages (the last answer)", "id", "label", "weight"}


@pytest.mark.parametrize(
    ("row", "as_turn", "rule"),
    [
        ({"title": "a"}, True, "no-prompt"),
        ({"prompt": ""}, True, "no-prompt"),
        ({"messages": openai(YES)}, True, "no-prompt"),
        ({"prompt": 3}, True, "not-a-list"),
        ({"prompt": "a", "image": "x.png"}, True, "not-read"),
        ({"prompt": "a", "context": "b"}, True, "not-read"),
        ({"prompt": "a", "system": "b"}, False, "not-read"),
        ({"prompt": "half \ud800"}, True, "bad-unicode"),
        ({"messages": [{"role": "robot", "content": "a"}]}, True, "unknown-role"),
    ],
)
def test_what_would_change_the_prompt_refuses_the_row(row, as_turn, rule):
    with pytest.raises(RowError, match="data.jsonl row 17") as caught:
        read(row, as_turn)
    assert caught.value.rule == rule


def test_columns_that_are_left_out_refuse_nothing():
    ctx = RowContext(ORIGIN, frozenset({"image"}), {})
    assert read_prompt_row({"prompt": "a", "image": "x.png"}, ctx, as_turn=False) == Prompt("a", ORIGIN)
    assert ctx.column_status == {"image": IGNORED}


TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "robot"]), "content": st.text()})
VALUE = st.one_of(st.none(), st.text(), st.integers(), st.booleans(), st.lists(st.text()), st.lists(TURN), TURN)
COLUMN = st.sampled_from([*COLUMNS, "context", "history", "system", "tools", "label", "images", "id"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(COLUMN, VALUE), st.booleans())
def test_any_row_is_a_prompt_or_refused_in_one_line(row, as_turn):
    try:
        prompt = read(row, as_turn)
    except RowError as error:
        assert "\n" not in str(error)
    else:
        assert prompt.prompt and isinstance(prompt.prompt, str | tuple)
        assert isinstance(prompt.prompt, str) or prompt.prompt[-1].role != "assistant"


def test_every_format_that_is_trained_on_brings_a_prompt_or_says_why_not():
    without = {name for name, layout in FORMATS.items() if not {*layout.required, *layout.optional} & {*COLUMNS}}
    assert without == {"bare-pair", "text"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))), st.booleans())
def test_a_text_file_has_a_prompt_a_line(tmp_path_factory, lines, windows):
    path = tmp_path_factory.getbasetemp() / "prompts.txt"
    path.write_bytes("".join(line + ("\r\n" if windows else "\n") for line in lines).encode("utf-8-sig"))
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    assert [(origin.row, row["prompt"]) for origin, row in prompt_rows(str(path))] == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(COLUMN, st.one_of(st.text(), st.integers(), st.none())), min_size=1))
def test_json_rows_come_as_they_are(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in prompt_rows(str(path))] == rows


def test_a_file_that_cannot_be_read_on_is_named_with_the_row(tmp_path):
    for name, content, message in (
        ("a.txt", b"fine\n\n\xff\n", "a.txt row 3: invalid UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "a.jsonl row 2: invalid JSON"),
        ("b.jsonl", b'"a text"\n', "b.jsonl row 1: a row must be an object, got str"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(prompt_rows(str(tmp_path / name)))


def test_sources_that_have_no_prompts_are_told(tmp_path):
    (tmp_path / "prompts.csv").touch()
    with pytest.raises(ValueError, match=r"suffix of a file of prompts must be one of \.txt, .*got '\.csv'"):
        prompt_rows(str(tmp_path / "prompts.csv"))
    with pytest.raises(ValueError, match=f"toy-sft has rows to train on; .* {TOY}"):
        prompt_rows("toy-sft")
    for name in ("none.txt", "no/such.txt", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            list(prompt_rows(name))


def test_the_toy_prompts_are_what_the_toy_pairs_ask():
    asked = [row["prompt"] for _, row in prompt_rows(TOY)]
    assert asked == [pair.prompt[-1].content for pair in skills.records("dpo")]


def test_questions_in_the_same_words_are_graded_alike():
    checks = {}
    for item in skills.questions():
        assert checks.setdefault(item.messages, item.check) == item.check
