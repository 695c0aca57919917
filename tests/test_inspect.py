"""What `phi2 inspect` prints: targets between brackets, white space and end tokens visible, the audit at the end."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from phi2.data.audit import Audit
from phi2.data.encode import EncodeConfig
from phi2.data.inspect import InspectConfig, inspect_data, inspect_rows, visible
from phi2.data.records import PAIR, Chat, Message, Origin, Plain, Preference, RowError
from phi2.tokenizer import Tokenizer

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {}).with_chatml()


BYTES = byte_tokenizer()


def show(*records, kind: str = "supervised", color: bool | None = False, **options) -> str:
    return inspect_rows(records, BYTES, EncodeConfig(), kind, color=color, **options)


def plain(prompt: str, completion: str, row: int = 1) -> Plain:
    return Plain(prompt, completion, Origin("a.jsonl", row))


def test_row_is_its_header_and_its_tokens_with_targets_in_brackets():
    chat = Chat((Message("user", "Hi"), Message("assistant", "Yo")), Origin("a.jsonl", 3))
    assert show(chat).split("\n\n")[0].splitlines() == [
        "a.jsonl row 3: 25 tokens, 4 of them targets; eos_present",
        "<|im_start|>user↵",
        "Hi<|im_end|>↵",
        "<|im_start|>assistant↵",
        "⟦Yo<|im_end|>↵",
        "⟧",
    ]


def test_pair_shows_prompt_chosen_and_rejected():
    pair = Preference("ab", ("c", "de"), PAIR, Origin("a.jsonl", 1), {})
    assert show(pair, kind="preference").split("\n\n")[0].splitlines() == [
        "a.jsonl row 1: 7 tokens, 5 of them targets; eos_added",
        "prompt (2)",
        "ab",
        "chosen (2)",
        "⟦c<|im_end|>⟧",
        "rejected (3)",
        "⟦de<|im_end|>⟧",
    ]


def test_audit_of_all_rows_follows_the_rows_that_are_shown():
    text = show(*(plain("", "word", row) for row in range(1, 6)), limit=2)
    assert ("a.jsonl row 2" in text, "a.jsonl row 3" in text) == (True, False)
    assert re.search(r"^audit of 5 rows\nrows +5\nkept +5 ", text, re.MULTILINE)


def test_audit_counts_the_rows_that_the_reader_dropped():
    dropped = Audit()
    dropped.drop(RowError(Origin("a.jsonl", 2), "empty-answer", "text is empty"))
    text = show(plain("", "word"), dropped=dropped)
    assert "audit of 2 rows" in text and "dropped empty-answer" in text


def test_ids_follow_their_tokens():
    text = show(plain("", "a\n"), ids=True)
    a, newline = BYTES.encode("a\n")
    assert f"⟦a⟨{a}⟩↵⟨{newline}⟩\n<|im_end|>⟨{BYTES.eos_id}⟩⟧" in text


def test_character_of_several_tokens_stands_at_the_last_of_them():
    first, second = BYTES.encode("é")
    assert f"⟦⟨{first}⟩é⟨{second}⟩" in show(plain("", "é"), ids=True)


def test_character_that_was_cut_in_two_is_shown_as_broken():
    text = inspect_rows([plain("", "aé")], BYTES, EncodeConfig(max_length=2), "supervised", color=False)
    assert "⟦a\ufffd⟧" in text


def test_color_marks_context_targets_and_special_tokens():
    text = show(plain("p", "c"), color=True)
    assert "\x1b[2mp\x1b[0m⟦" in text and "⟦\x1b[36mc\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m⟧" in text


@settings(deadline=None)
@given(st.text(max_size=10), st.text(min_size=1, max_size=10))
def test_color_changes_nothing_but_color(prompt, completion):
    assert ANSI.sub("", show(plain(prompt, completion), color=True)) == show(plain(prompt, completion))


def test_output_that_is_no_terminal_has_no_color():
    assert "\x1b" not in show(plain("p", "c"), color=None)


@pytest.mark.parametrize(("no_color", "expected"), [("", True), ("1", False)])
def test_terminal_has_color_unless_told_otherwise(monkeypatch, no_color, expected):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b" in show(plain("p", "c"), color=None)) == expected


@settings(deadline=None)
@given(st.text(min_size=1))
def test_nothing_in_a_row_can_drive_the_terminal(text):
    shown = show(plain("\x1b[31m\x9b\u202e", text))
    assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" the", " the"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        ("a ", "a␣"),
        ("\n\n", "↵↵"),
        ("\t", "→"),
        ("\x07", "\\x07"),
        ("", ""),
    ],
)
def test_white_space_that_could_be_missed_is_visible(token, expected):
    assert visible(token) == expected


# Rows as files have them


def inspected(tmp_path, row: dict, **options) -> str:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return inspect_data(InspectConfig(data=str(tmp_path / "rows.jsonl"), model="nano", **options))


def test_columns_that_are_not_read_stand_under_the_audit(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "dataset": "x", "ids": [1]}
    assert inspected(tmp_path, row).splitlines()[-2:] == [
        "columns not read: ids 1",
        "columns kept for the loss and reports: dataset 1",
    ]


def test_pairs_that_are_all_refused_say_why_instead_of_being_called_no_pairs(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "Be brief."}
    with pytest.raises(ValueError, match=r"'system' \(the system turn.*\[not-read\]"):
        inspected(tmp_path, row)


def test_ignored_columns_are_shown_and_a_name_that_nothing_has_is_refused(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "Be brief."}
    assert "columns ignored as asked: system 1" in inspected(tmp_path, row, ignore_columns=["system"])
    with pytest.raises(ValueError, match="ignore_columns: no row has anything in 'sistem'"):
        inspected(tmp_path, row, ignore_columns=["system", "sistem"])
