"""Files of prompts answered: a row for each and nothing lost, whatever is in them and wherever a run is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi2
import phi2.answers.answer
from phi2.answers.answer import Asked, answer_file, blocks
from phi2.answers.config import AskConfig
from phi2.answers.file import whole_rows
from phi2.answers.questions import Question
from phi2.data.records import Origin

LONG = "the " * 300  # longer than the context of tiny_phi


@pytest.fixture
def asked(tiny_phi, tmp_path):
    """Answers rows into `answers.jsonl`: asked(rows, **settings) -> what `answer_file` returns."""

    def ask(rows: list[dict], **changes) -> Asked:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        where = dict(model=str(tiny_phi), prompts=str(tmp_path / "prompts.jsonl"), device="cpu")
        return answer_file(
            AskConfig(**{**where, "output": str(tmp_path / "answers.jsonl"), "max_new_tokens": 6, **changes})
        )

    return ask


def rows_of(asked: Asked) -> list[dict]:
    return [json.loads(line) for line in asked.file.path.read_text(encoding="utf-8").split("\n")[:-1]]


PROMPTS = [{"prompt": f"Q{'?' * i}", "id": i} for i in range(5)]


def test_a_row_of_the_output_is_the_row_of_the_prompt_with_its_answers(asked):
    first, *_, last = rows_of(asked(PROMPTS, temperature=0.8, n=2))
    assert list(first) == ["index", "prompt", "id", "answers"] and (last["index"], last["id"]) == (4, 4)
    assert [list(answer) for answer in first["answers"]] == [["text", "finish_reason", "seed", "tokens"]] * 2


def test_answers_are_those_of_generate_from_the_seeds_that_are_told(asked, tiny_phi):
    model, tokenizer = phi2.load(tiny_phi, device="cpu")
    settings = dict(temperature=0.8, top_k=9, max_new_tokens=6)
    rows = rows_of(asked(PROMPTS, **settings, n=2, seed=3))
    assert [answer["seed"] for row in rows for answer in row["answers"]] == list(range(3, 13))
    for row in rows:
        for answer in row["answers"]:
            chat = [{"role": "user", "content": row["prompt"]}]
            reply = phi2.generate(model, tokenizer, chat, **settings, seed=answer["seed"])
            assert (answer["text"], answer["tokens"]) == (reply.text, len(reply.token_ids))


def test_log_probs_are_written_when_they_are_asked_for(asked, tiny_phi):
    model, tokenizer = phi2.load(tiny_phi, device="cpu")
    (row,) = rows_of(asked(PROMPTS[:1], logprobs=True))
    reply = phi2.generate(model, tokenizer, [{"role": "user", "content": "Q"}], max_new_tokens=6)
    assert row["answers"][0]["token_ids"] == reply.token_ids
    assert row["answers"][0]["logprobs"] == pytest.approx(reply.logprobs, abs=1e-5)


def test_a_row_sets_its_own_sampling(asked):
    own = [
        {"prompt": "a", "max_new_tokens": 2, "n": 3},
        {"prompt": "b", "temperature": 0, "stop": None},
        {"prompt": "c", "seed": 70, "top_k": 1},
        {"prompt": "d"},
    ]
    rows = rows_of(asked(own, temperature=0.9, top_k=5, n=2))
    assert [[answer["seed"] for answer in row["answers"]] for row in rows] == [[0, 1, 2], [None], [70, 71], [6, 7]]
    assert all(answer["tokens"] <= 2 for answer in rows[0]["answers"])


BAD_ROWS = {
    "too long": ({"prompt": LONG}, "has 919 tokens"),
    "no prompt": ({"title": "a"}, "hold no prompt"),
    "an option out of range": ({"prompt": "a", "top_p": 7}, "top_p must be in"),
    "an option of another type": ({"prompt": "a", "max_new_tokens": "9"}, "max_new_tokens must be"),
    "a stop that is no text": ({"prompt": "a", "stop": 5}, "stop must be a string or a list of strings, got 5"),
    "no answers": ({"prompt": "a", "n": 0}, "n must be a whole number of at least 1"),
    "several answers without draws": ({"prompt": "a", "n": 2, "temperature": 0}, "n 2 needs a temperature"),
    "media": ({"prompt": "a", "image": "x.png"}, "'image' .* is not read here"),
    "tools that the template does not read": ({"prompt": "a", "tools": [{"name": "f"}]}, "does not read 'tools'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_answered_is_told_before_and_gets_an_error_in_its_place(case, asked):
    bad, reason = BAD_ROWS[case]
    with pytest.warns(UserWarning, match=f"1 of 3 prompts cannot be answered, .*jsonl row 2: .*{reason}"):
        rows = rows_of(asked([PROMPTS[0], bad, PROMPTS[1]], temperature=0.9))
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert bad.items() <= rows[1].items() and "row 2: " in rows[1]["error"] and "answers" not in rows[1]
    assert [answer["seed"] for answer in rows[2]["answers"]] == [2]


def test_columns_that_are_not_read_are_counted(asked):
    assert "columns not read: id 5\n" in str(asked(PROMPTS))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "prompts.jsonl: no prompt can be answered: it is empty"),
        ([{"prompt": LONG}], {}, "no prompt can be answered: .*row 1: the prompt has"),
        ([{"prompt": "a", "answers": []}], {}, "row 1: a column 'answers' is what"),
        (PROMPTS, {"ignore_columns": ["idd"]}, "ignore_columns: no row has anything in 'idd'"),
    ],
)
def test_what_is_wrong_with_the_whole_file_is_told_before_anything_is_written(rows, settings, message, asked, tmp_path):
    with pytest.raises(ValueError, match=message):
        asked(rows, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_value_that_json_cannot_hold_names_its_row(tiny_phi, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "raw": [None, b"\0"]}), path)
    with pytest.raises(ValueError, match="prompts.parquet row 2: .*bytes"):
        answer_file(AskConfig(model=str(tiny_phi), prompts=str(path), output=str(tmp_path / "a.jsonl"), device="cpu"))


def test_any_text_of_a_row_comes_back_as_it_was(asked):
    row = {"prompt": "é", "id": "half \ud800, whole \U0001f600, \u2028"}
    (again,) = rows_of(asked([row]))
    assert again["id"] == row["id"]


# ---- a run that goes on ----

MANY = [*({"prompt": f"Q{'?' * (i % 7)}", "id": i} for i in range(8)), {"prompt": LONG}, {"prompt": "é"}]
SAMPLED = dict(temperature=0.9, n=2, logprobs=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Three slots, and blocks of three answers or a few more."""
    monkeypatch.setattr(phi2.answers.answer, "default_slots", lambda model, length: 3)
    monkeypatch.setattr(phi2.answers.answer, "ROUNDS", 2)


@pytest.mark.filterwarnings("ignore:.*cannot be answered")
def test_a_file_cut_at_any_byte_and_gone_on_with_is_the_same_file(asked, small_blocks):
    path = asked(MANY, **SAMPLED).file.path
    whole = path.read_bytes()

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(whole)))
    def cut(end):
        path.write_bytes(whole[:end])
        asked(MANY, **SAMPLED, resume=True)
        assert path.read_bytes() == whole

    cut()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9)), max_size=5), st.data())
def test_whole_rows_are_those_in_front_of_the_cut(tmp_path_factory, rows, data):
    lines = [json.dumps({**row, "index": number}).encode() + b"\n" for number, row in enumerate(rows)]
    path, end = tmp_path_factory.getbasetemp() / "cut.jsonl", data.draw(st.integers(0, sum(map(len, lines))))
    path.write_bytes(b"".join(lines)[:end])
    whole, byte = whole_rows(path)
    assert byte == sum(map(len, lines[:whole])) <= end
    assert whole == len(rows) or end < byte + len(lines[whole])


@pytest.mark.filterwarnings("ignore:.*cannot be answered")
def test_a_full_disk_leaves_whole_rows_and_a_run_that_goes_on_ends_in_the_same_file(asked, full_disk, tmp_path):
    whole = asked(MANY, **SAMPLED).file.path.read_bytes()
    path = tmp_path / "other.jsonl"
    with (
        full_disk(len(whole) // 2),
        pytest.raises(OSError, match="other.jsonl: File too large; [2-7] whole rows"),
    ):
        asked(MANY, **SAMPLED, output=str(path))
    left = path.read_bytes()
    assert left.endswith(b"\n") and whole.startswith(left)
    assert asked(MANY, **SAMPLED, output=str(path), resume=True).file.path.read_bytes() == whole


def test_an_interrupted_run_says_how_far_it_got(asked, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phi2.answers.answer, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt, match="0 of 5 rows are in .*answers.jsonl; resume: true goes on"):
        asked(PROMPTS)


def test_a_finished_file_is_gone_on_with_without_a_word_of_the_model(asked, monkeypatch):
    before = asked(PROMPTS).file.path.read_bytes()
    monkeypatch.delattr(phi2.answers.answer, "replies_to")
    assert asked(PROMPTS, resume=True).file.path.read_bytes() == before


def test_a_new_seed_is_kept_by_the_run_that_goes_on(asked, tmp_path):
    path = asked(PROMPTS, temperature=0.9, seed=None).file.path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert asked(PROMPTS, temperature=0.9, seed=None, resume=True).file.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("rows", "changes", "what"),
    [
        ([*PROMPTS[:-1], {"prompt": "other"}], {}, "prompts"),
        (PROMPTS, {"temperature": 0.5}, "temperature"),
        (PROMPTS, {"temperature": 0.9, "seed": 1}, "seed"),
        (PROMPTS, {"temperature": 0.9, "n": 2}, "n"),
        (PROMPTS, {"temperature": 0.9, "system": "Be brief."}, "system"),
    ],
)
def test_a_run_that_goes_on_names_what_has_changed(rows, changes, what, asked):
    path = asked(PROMPTS, temperature=0.9).file.path
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"answers.jsonl: the {what} changed since this run began"):
        asked(rows, **{"temperature": 0.9, **changes}, resume=True)
    assert path.read_bytes() == before


def test_a_file_that_is_there_is_not_written_over(asked, tmp_path):
    asked(PROMPTS)
    with pytest.raises(ValueError, match="answers.jsonl exists already; give another output, or resume"):
        asked(PROMPTS)
    (tmp_path / "answers.jsonl.inputs.json").unlink()
    with pytest.raises(ValueError, match="without answers.jsonl.inputs.json beside it"):
        asked(PROMPTS, resume=True)


def test_a_line_that_no_cut_can_leave_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in ('{"index": 0}\nnot JSON\n', '{"index": 0}\n{"index": 2}\n', '{"index": 0}\n[1]\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match="a.jsonl row 2: is not what was written there"):
            whole_rows(path)


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_blocks_hold_every_question_in_order_and_a_bounded_number_of_answers(counts, answers):
    questions = [Question(i, Origin("f", i), {}, params=(None,) * count) for i, count in enumerate(counts)]
    cut = list(blocks(questions, answers))
    assert [question for block in cut for question in block] == questions
    for block in cut:
        assert block and sum(max(1, len(question.params)) for question in block[:-1]) < answers


# ---- the command ----


def test_generate_answers_a_file(tiny_phi, tmp_path, capsys):
    from phi2.cli.commands import main

    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    where = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "new" / "a.jsonl")]
    assert main(["generate", "--model", str(tiny_phi), *where, "--max_new_tokens", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out == f"2 answers to 2 of 2 prompts\nwrote {tmp_path}/new/a.jsonl\n"
    assert len(Path(tmp_path / "new" / "a.jsonl").read_text().splitlines()) == 2


BAD_USAGE = {
    "give one of prompt (a text) and prompts (a file), got none": [],
    "give one of prompt (a text) and prompts (a file), got both": ["--prompt", "a", "--prompts", "a.txt"],
    "prompts needs an output": ["--prompts", "a.txt"],
    "output must be the name of a .jsonl file, got 'a.csv'": ["--prompts", "a.txt", "--output", "a.csv"],
    "output a.jsonl needs prompts, got one prompt": ["--prompt", "a", "--output", "a.jsonl"],
    "n 2 needs prompts, got one prompt": ["--prompt", "a", "--n", "2", "--temperature", "1"],
    "n 2 needs a temperature above 0, got 0 (greedy)": ["--prompts", "a.txt", "--output", "a.jsonl", "--n", "2"],
    "ignore_columns ['id'] needs prompts, got one prompt": ["--prompt", "a", "--ignore_columns", "id"],
}


@pytest.mark.parametrize("message", BAD_USAGE)
def test_settings_at_odds_are_told_in_one_line(message, capsys):
    from phi2.cli.commands import main

    assert main(["generate", "--model", "/nowhere", *BAD_USAGE[message]]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
