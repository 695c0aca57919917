"""`phi2 evaluate` and `phi2.evaluate`, whole: tasks of the harness from local files, beside the toy skills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phi2
from phi2.checkpoints.weights import load
from phi2.cli.commands import main
from phi2.evaluation.api import slug
from phi2.evaluation.config import EvaluateConfig
from phi2.evaluation.results import Evaluation

SHORT = dict(limit=2, num_fewshot=1, max_gen_toks=8, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def both(task_data, tmp_path_factory) -> Evaluation:
    """Two models over a generated task, a group and the toy skills."""
    where = dict(data_dir=task_data, output=str(tmp_path_factory.mktemp("both")))
    tasks = ["gsm8k", "toy", "mmlu"]
    return phi2.evaluate(
        ["nano", "nano-instruct"], tasks=tasks, questions=2, apply_chat_template=True, **where, **SHORT
    )


def test_every_task_has_its_lines_in_the_order_asked_for(both):
    tasks = list(dict.fromkeys(task for task, _ in both.rows))
    assert tasks == ["gsm8k", "follow", "arithmetic", "quiz", "truthful", "coreference", "mmlu"]


def test_a_group_counts_the_samples_of_all_its_tasks(both):
    score = both.models["nano"].score("mmlu", "acc,none")
    assert score.n == 4 and score.values.mean() == pytest.approx(score.value)


def test_the_table_says_how_it_was_made(both):
    text = str(both)
    assert "lm-evaluation-harness 0." in text and "chat template, all shots in one turn, the first 2 samples" in text
    assert "gsm8k 1, mmlu 1" in text and "mmlu: 2 of its 57 subjects" in text and "nano-instruct - nano" in text


def test_every_sample_is_kept_with_prompt_answer_and_score(both):
    lines = (both.output / "samples" / "nano.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2 + 10 + 4
    sums = [row for row in rows if row["task"] == "gsm8k"]
    assert all("What is" in row["prompt"] and row["expected"].startswith("Add.") for row in sums)
    assert all(set(row["options"]) == {"A", "B", "C", "D"} for row in rows if row["task"].startswith("mmlu"))


def test_results_are_written_as_json_and_as_a_page(both):
    results = json.loads((both.output / "results.json").read_text())
    assert [*results["models"]] == ["nano", "nano-instruct"] and results["published"]["gsm8k"]["phi-2"] == 56.44
    assert {one["model"] for one in results["differences"]} == {"nano-instruct"}
    html = (both.output / "report.html").read_text()
    assert "What is 1 and 1?" in html and "56.75" in html and "gsm8k_train.jsonl" in html


def test_a_notebook_shows_the_table(both):
    assert "<table" in both._repr_html_() and "nano-instruct" in both._repr_html_()


def test_the_same_call_answers_nothing_again(both, task_data, monkeypatch):
    monkeypatch.setattr("phi2.evaluation.harness.replies", None)
    monkeypatch.setattr("phi2.evaluation.harness.score", lambda model, requests: iter([]))
    settings = dict(data_dir=task_data, output=str(both.output), apply_chat_template=True, **SHORT)
    again = phi2.evaluate("nano", tasks=["gsm8k", "mmlu"], **settings)
    first = both.models["nano"]
    for score in again.models["nano"].scores:
        assert score.value == first.score(score.task, score.metric).value


KILLED = """
import phi2
from phi2.evaluation.answers import Answers

added = Answers.add
def add(self, *answer):
    added(self, *answer)
    if sum(1 for _ in open(self._file.name)) == 3:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

Answers.add = add
phi2.evaluate("nano", tasks="mmlu", data_dir={data!r}, output={output!r}, **{short!r})
"""


def test_a_killed_evaluation_goes_on_where_it_was(task_data, tmp_path):
    code = KILLED.format(data=task_data, output=str(tmp_path), short=SHORT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    file = tmp_path / "answers" / "0.jsonl"
    before = file.read_text()
    assert before.count("\n") == 3
    whole = phi2.evaluate("nano", tasks="mmlu", data_dir=task_data, output=str(tmp_path), **SHORT)
    fresh = phi2.evaluate("nano", tasks="mmlu", data_dir=task_data, output=str(tmp_path / "other"), **SHORT)
    assert file.read_text().startswith(before) and file.read_text().count("\n") == 16
    options = [[s.options for s in one.models["nano"].samples] for one in (whole, fresh)]
    assert [list(o) for o in options[0]] == [list(o) for o in options[1]]
    for ours, theirs in zip(*options, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_an_interrupt_says_where_the_answers_are(task_data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi2.evaluation.harness.score", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted; the answers so far are in {tmp_path}"):
        phi2.evaluate("nano", tasks="mmlu", data_dir=task_data, output=str(tmp_path), **SHORT)


RANK = """
import phi2
phi2.evaluate("nano", tasks=["gsm8k", "mmlu"], data_dir={data!r}, output={output!r}, **{short!r})
"""


def test_processes_share_the_samples_and_the_first_tells_the_scores_of_one_alone(task_data, tmp_path):
    alone = phi2.evaluate("nano", tasks=["gsm8k", "mmlu"], data_dir=task_data, output=str(tmp_path / "one"), **SHORT)
    code = RANK.format(data=task_data, output=str(tmp_path / "two"), short=SHORT)
    port = str(20000 + os.getpid() % 20000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    results = json.loads((tmp_path / "two" / "results.json").read_text())["models"]["nano"]
    expected = {(score.task, score.metric): score.value for score in alone.models["nano"].scores}
    assert {(line["task"], line["metric"]): line["value"] for line in results} == expected
    answers = [(tmp_path / "two" / "answers" / f"{i}.jsonl").read_text().count("\n") for i in range(2)]
    assert min(answers) > 0


def test_a_run_is_evaluated_as_what_it_trained(tiny_phi, sft_config, tmp_path):
    from phi2.evaluation.models import load_named
    from phi2.training.sft import train

    run = train(sft_config(max_steps=1))
    config = EvaluateConfig(model=str(run), device="cpu", dtype="float32")
    expected, _ = load(tiny_phi, "cpu", "float32", adapter=run / "adapter")
    for name in (run, run / "adapter"):
        model, _ = load_named(str(name), config)
        ours, theirs = model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def test_models_in_memory_are_evaluated_by_the_names_they_are_given(both):
    model, tokenizer = load("nano-instruct", "cpu", "float32")
    found = phi2.evaluate({"mine": (model, tokenizer)}, questions=2)
    skills = [score for score in both.models["nano-instruct"].scores if score.metric == "right"]
    assert [(s.task, s.value) for s in found.models["mine"].scores] == [(s.task, s.value) for s in skills]
    with pytest.raises(ValueError, match="dtype cannot change a model that is loaded already"):
        phi2.evaluate({"mine": (model, tokenizer)}, dtype="bfloat16")


def fails(capsys, *arguments: str) -> str:
    code = main(["evaluate", *arguments])
    err = capsys.readouterr().err.splitlines()
    assert code in (1, 2) and err[-1].startswith("phi2 evaluate: ")
    return err[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "nano,nano-instruct", "--adapter", "a"], "adapter goes with one model"),
        (["--model", "nano", "--model", "nano"], "model names 'nano' twice"),
        (["--model", "nano", "--tasks", "gsm8k", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--model", "nano", "--num_fewshot", "2"], "num_fewshot means nothing to the tasks toy"),
        (["--model", "nano", "--tasks", "gsm8k", "--questions", "5"], "questions means nothing to the tasks gsm8k"),
        (["--model", "nano", "--tasks", "gsm8k", "--fewshot_as_multiturn"], "it needs apply_chat_template"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(arguments, reason, capsys):
    assert reason in fails(capsys, *arguments)


def test_an_unknown_task_is_told_with_the_nearest(monkeypatch, capsys):
    from lm_eval.tasks import TaskManager

    from phi2.evaluation import tasks

    few = TaskManager(include_path=tasks.HERE / "gsm8k", include_defaults=False)  # of 14683: they take 16 s
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: few)
    assert "no task is called 'gsm9k'; did you mean gsm8k?" in fails(capsys, "--model", "nano", "--tasks", "gsm9k")


def test_data_that_cannot_be_had_is_one_line(monkeypatch, capsys):
    import datasets

    def offline(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    told = fails(capsys, "--model", "nano", "--tasks", "gsm8k")
    assert "gsm8k: its data cannot be had" in told and "give a data_dir of local files" in told


def test_a_chat_template_that_is_missing_is_told_before_anything_is_loaded(make_phi, task_data, capsys, monkeypatch):
    folder = make_phi()
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if not t["content"].startswith("<|im_")]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("phi2.evaluation.models.load", None)
    told = fails(capsys, "--model", str(folder), "--tasks", "gsm8k", "--apply_chat_template", "--data_dir", task_data)
    assert "its tokenizer has no chat template, which apply_chat_template and the toy skills need" in told


def test_names_become_files(tmp_path):
    assert slug("runs/dpo v2/") == "runs_dpo_v2" and Path(slug("../x")).name == slug("../x")
