"""On-policy pairs: a model's answers scored by a function, paired, and read by a preference run without a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import phi2
from phi2.answers.pairs import SampledPairs, choose_pairs
from phi2.answers.score import SCORES, Score
from phi2.cli.commands import main
from phi2.data.toy import skills

SCORE = "def length(prompt, answer, row):\n    return len(answer)\n"


@pytest.fixture
def sampled(tiny_phi, tmp_path):
    """sampled(rows, score's source, **settings) -> what `phi2.sample_pairs` returns."""

    def sample(rows: list[dict], source: str = SCORE, **changes) -> SampledPairs:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mine.py").write_text(source)
        name = source.rpartition("def ")[2].partition("(")[0]
        where = dict(model=str(tiny_phi), prompts=str(tmp_path / "prompts.jsonl"), device="cpu")
        output, score = str(tmp_path / "pairs.jsonl"), f"{tmp_path / 'mine.py'}:{name}"
        return phi2.sample_pairs(**{**where, "output": output, "score": score, "max_new_tokens": 6, "n": 4, **changes})

    return sample


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


PROMPTS = [{"prompt": f"Q{'?' * i}", "id": i} for i in range(4)]


def test_the_embedded_skills_from_prompts_to_a_preference_run(tmp_path, capsys):
    pairs, run = str(tmp_path / "pairs.jsonl"), tmp_path / "run"
    sampling = ["--rows", "8", "--n", "4", "--max_new_tokens", "32", "--temperature", "1.5", "--score", "toy"]
    model = ["--model", "nano-instruct", "--device", "cpu"]
    assert main(["sample_pairs", *model, "--prompts", "toy-prompts", *sampling, "--output", pairs]) == 0
    out = capsys.readouterr().out
    steps = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--lora.r", "4"]
    assert main(["dpo", *model, "--data", pairs, "--output", str(run), *steps]) == 0
    audit = json.loads((run / "data_audit.json").read_text())
    assert audit["dropped"] == {} and audit["columns"]["not read"] == {}
    assert f"{audit['kept']} pairs of 8 prompts" in out and audit["kept"] > 0


def test_the_best_answer_stands_against_the_worst_with_their_scores(sampled):
    result = sampled(PROMPTS)
    answers = {row["index"]: row["answers"] for row in rows_of(result.asked.file.path)}
    assert len(rows_of(result.output)) == result.tally.pairs > 0
    for pair in rows_of(result.output):
        scores = [answer["score"] for answer in answers[pair["index"]] if answer["text"].strip()]
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(scores), min(scores))
        assert len(pair["chosen"][0]["content"]) == max(scores)
        assert pair["prompt"] == [{"role": "user", "content": PROMPTS[pair["index"]]["prompt"]}]


def test_a_score_is_given_what_the_model_saw_its_answer_and_the_row(sampled, tmp_path):
    log = tmp_path / "seen.jsonl"
    source = (
        "import json\n"
        "def log(prompt, answer, row):\n"
        f"    print(json.dumps([prompt, answer, row]), file=open({str(log)!r}, 'a'))\n"
        "    return len(answer)\n"
    )
    result = sampled(PROMPTS[:1], source, system="Be brief.")
    shown = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    texts = [answer["text"] for answer in rows_of(result.asked.file.path)[0]["answers"]]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [[shown, text, PROMPTS[0]] for text in texts]


def test_text_prompts_of_a_model_without_turns_give_pairs_of_text(sampled):
    for pair in rows_of(sampled(PROMPTS, prompt_style="instruct").output):
        assert pair["prompt"].startswith("Instruct: Q") and isinstance(pair["chosen"], str)


def test_what_the_template_was_given_stays_with_the_pair(make_phi, sampled):
    folder = make_phi()
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tools | length }}{{ mood }}"
    (folder / "chat_template.jinja").write_text(template)
    given = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "glad"}}
    score = "def total(prompt, answer, row):\n    return sum(map(ord, answer))\n"
    for pair in rows_of(sampled([{"prompt": "Q", **given}], score, model=str(folder)).output):
        assert given.items() <= pair.items()


def test_other_pairs_of_the_same_answers_need_no_new_ones(sampled, monkeypatch):
    first = sampled(PROMPTS)
    answers = first.asked.file.path.read_bytes()
    monkeypatch.delattr(phi2.answers.answer, "replies_to")
    again = sampled(PROMPTS, pairs="all", resume=True)
    assert again.asked.file.path.read_bytes() == answers and again.tally.pairs > first.tally.pairs


def test_a_changed_score_is_named_and_the_answers_stay(sampled):
    path = sampled(PROMPTS).asked.file.path
    before = path.read_bytes()
    with pytest.raises(ValueError, match="pairs.answers.jsonl: the score changed since this run began"):
        sampled(PROMPTS, SCORE.replace("len(answer)", "-len(answer)"), resume=True)
    assert path.read_bytes() == before


def test_pairs_that_are_there_are_not_written_over(sampled, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine\n")
    for resume in (False, True):
        with pytest.raises(ValueError, match="pairs.jsonl exists already; give another output"):
            sampled(PROMPTS, resume=resume)
    assert (tmp_path / "pairs.jsonl").read_text() == "mine\n"


def test_answers_of_equal_worth_make_no_pair_and_that_is_told(sampled, tmp_path):
    with pytest.raises(ValueError, match="no pair can be made: 0 pairs of 4 prompts; 4 have none, as no scores differ"):
        sampled(PROMPTS, "def same(prompt, answer, row):\n    return 1\n")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_prompt_that_cannot_be_answered_makes_no_pair_and_no_gap(sampled):
    with pytest.warns(UserWarning, match="1 of 5 prompts cannot be answered"):
        result = sampled([{"prompt": "the " * 300}, *PROMPTS])
    assert result.tally.errors == 1 and result.tally.prompts == 5
    assert all(row["index"] > 0 for row in rows_of(result.output))


# ---- which pairs ----

ANSWERS = st.lists(
    st.fixed_dictionaries({"text": st.sampled_from(["a", "b", "c", " ", ""]), "score": st.integers(-2, 2)}), max_size=6
)


@given(ANSWERS, st.sampled_from(["best_worst", "all"]), st.sampled_from([0.0, 1.0]))
def test_a_pair_is_of_two_texts_the_first_of_which_is_better_by_more_than_the_margin(answers, pairs, margin):
    for better, worse in choose_pairs(answers, pairs, margin):
        assert better["score"] - worse["score"] > margin
        assert better["text"] != worse["text"] and better["text"].strip() and worse["text"].strip()


@given(ANSWERS)
def test_the_best_pair_is_the_one_of_all_with_the_widest_margin(answers):
    every = choose_pairs(answers, "all", 0.0)
    margins = [better["score"] - worse["score"] for better, worse in every]
    best = choose_pairs(answers, "best_worst", 0.0)
    assert [better["score"] - worse["score"] for better, worse in best] == ([max(margins)] if margins else [])


def test_all_pairs_are_every_two_that_differ():
    answers = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 1), ("d", 2))]
    chosen = [(better["text"], worse["text"]) for better, worse in choose_pairs(answers, "all", 0.0)]
    assert chosen == [("b", "d"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")]


# ---- scores ----


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("length", "", "score must be FILE.py:FUNCTION or one of toy, got 'length'"),
        ("{folder}/mine.py", SCORE, "score must be FILE.py:FUNCTION or one of toy"),
        ("{folder}/mine.py:width", SCORE, "has no function 'width'; there are length"),
        ("{folder}/mine.py:length", "1 / 0", "mine.py line 1: ZeroDivisionError"),
    ],
)
def test_a_score_that_is_none_is_told_in_words(name, source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        Score(name.format(folder=tmp_path))


def test_a_missing_score_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="score .*none.py: no such file"):
        Score(f"{tmp_path}/none.py:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("row['reference']", r"mine.py:f: .*prompts.jsonl row 1: KeyError: 'reference'"),
        ("float('nan')", "row 1: must return a finite number, got nan"),
        ("'8'", "row 1: must return a finite number, got '8'"),
        ("None", "row 1: must return a finite number, got None"),
    ],
)
def test_a_score_that_fails_names_the_row(body, message, sampled):
    with pytest.raises(ValueError, match=message):
        sampled(PROMPTS, f"def f(prompt, answer, row):\n    return {body}\n")


def test_the_toy_score_is_the_grade_of_its_skill():
    for item in skills.questions()[:40]:
        prompt = [message._asdict() for message in item.messages]
        assert SCORES["toy"](prompt, item.answer, {}) == 1.0
        assert [SCORES["toy"](prompt, wrong, {}) for wrong in item.wrong] == [0.0] * len(item.wrong)
    with pytest.raises(ValueError, match="grades the questions of toy-prompts"):
        SCORES["toy"]("What is love?", "Baby", {})


def test_a_setting_that_is_none_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="there is no setting 'scor'; did you mean score"):
        phi2.sample_pairs(model="nano", prompts="p.jsonl", output="o.jsonl", scor="toy")
    with pytest.raises(ValueError, match="score: expected str, got <built-in function len>"):
        phi2.sample_pairs(model="nano", prompts="p.jsonl", output="o.jsonl", score=len)
