"""The run folder: who may write into it, what a resumed run may change, lines that repeat, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from phi2.runs.folder import environment, open_run
from phi2.runs.log import Interrupted, Log, delayed_interrupt


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def begun(sft_config) -> Path:
    """The folder of a run that made one update."""
    open_run(sft_config())
    run = Path(sft_config().output)
    log = Log(run, 0, 6, "sft")
    log.write(1, "train", {"loss": 2.0})
    log.close()
    return run


# ---- opening ----


def test_a_new_run_writes_down_what_was_asked_for_and_where(sft_config):
    config = sft_config(learning_rate=3e-5, sample_prompts=["hi"])
    assert open_run(config) is None
    run = Path(config.output)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["learning_rate"] == 3e-5 and settings["lora"]["r"] == 4 and settings["sample_prompts"] == ["hi"]
    written = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(written["packages"]["torch"].partition("+")[0])
    assert written["threads"] == torch.get_num_threads() and written["command"] == sys.argv
    assert files_in(run) == {"config.yaml", "environment.json"}


def test_paths_are_written_down_as_text(sft_config, tiny_phi):
    open_run(sft_config(model=tiny_phi))
    assert yaml.safe_load((Path(sft_config().output) / "config.yaml").read_text())["model"] == str(tiny_phi)


def test_the_environment_is_told_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_a_folder_that_holds_a_run_is_refused(sft_config, begun):
    before = (begun / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run already; give another output, or resume: true"):
        open_run(sft_config())
    assert (begun / "metrics.jsonl").read_text() == before


def test_a_run_that_failed_before_its_first_update_may_start_over_with_other_settings(sft_config):
    open_run(sft_config())
    Log(Path(sft_config().output), 0, 6, "sft").close()
    assert open_run(sft_config(seed=1)) is None


def test_a_folder_of_something_else_is_refused_and_left_alone(sft_config):
    folder = Path(sft_config().output)
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="exists and holds no run of ours; give another output"):
        open_run(sft_config())
    assert files_in(folder) == {"thesis.tex"}


# ---- resuming ----


def test_a_resumed_run_goes_on_from_its_last_checkpoint(sft_config, begun):
    (begun / "checkpoints" / "step-1").mkdir(parents=True)
    assert open_run(sft_config(resume=True)) == begun / "checkpoints" / "step-1"


def test_resume_without_a_run_starts_one(sft_config):
    assert open_run(sft_config(resume=True)) is None


def test_a_resumed_run_with_other_settings_is_refused_naming_old_and_new(sft_config, begun):
    with pytest.raises(ValueError) as caught:
        open_run(sft_config(resume=True, learning_rate=0.5, packing="best_fit"))
    message = str(caught.value)
    assert "config.yaml: a resumed run keeps its settings" in message and "\n" not in message
    assert "learning_rate 0.01 -> 0.5" in message and "packing 'none' -> 'best_fit'" in message


def test_another_setting_of_lora_is_another_setting(sft_config, begun):
    lora = dataclasses.replace(sft_config().lora, r=8)
    with pytest.raises(ValueError, match="these differ: lora "):
        open_run(sft_config(resume=True, lora=lora))


def test_what_does_not_change_the_result_may_change(sft_config, begun):
    moved = begun.rename(begun.with_name("moved"))
    changes = dict(output=str(moved), logging_steps=2, eval_steps=1, save_steps=3, save_total_limit=9)
    open_run(sft_config(resume=True, sample_prompts=["hi"], **changes))
    assert yaml.safe_load((moved / "config.yaml").read_text())["save_steps"] == 3


# ---- files ----


def test_every_line_of_metrics_says_its_step_and_kind(tmp_path):
    log = Log(tmp_path, 0, 4, "sft")
    for step in (1, 2, 3):
        log.train([(step, 100, {"loss": step / 2})], every=2)
    log.write(3, "eval", {"eval_loss": 1.25})
    log.close()
    train, evaluated = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train.pop("tokens_per_second") > 0
    assert train == {"step": 2, "type": "train", "loss": 1.0}
    assert evaluated == {"step": 3, "type": "eval", "eval_loss": 1.25}


def test_the_speed_is_that_of_the_updates_alone(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 100.0, 102.0, 102.0])  # opened; two updates of two seconds, 88 s apart
    monkeypatch.setattr("phi2.runs.log.time.perf_counter", lambda: next(clock))
    log = Log(tmp_path, 0, 2, "sft")
    for step in log.steps():
        log.train([(step, 100, {"loss": 1.0})], every=2)
        log.restart()
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tokens_per_second"] == 50.0


def test_updates_that_are_known_together_share_their_time(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 5.0])
    monkeypatch.setattr("phi2.runs.log.time.perf_counter", lambda: next(clock))
    log = Log(tmp_path, 0, 3, "sft")
    next(log.steps())
    log.train([], every=1)
    log.train([(step, 100, {"loss": 1.0}) for step in (1, 2)], every=1)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens_per_second"] for line in lines] == [40.0, 40.0]


def test_lines_of_updates_that_will_be_made_again_are_dropped(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.dumps({"step": step, "answer": "a\u2028b"}, ensure_ascii=False) for step in (1, 2, 2, 3, 4)]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    Log(tmp_path, 2, 6, "sft").close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = (tmp_path / name).read_text(encoding="utf-8").split("\n")[:-1]
        assert [json.loads(line)["step"] for line in kept] == [1, 2, 2]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    Log(tmp_path, 2, 6, "sft").close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_line_torn_by_a_full_disk_does_not_keep_a_run_from_going_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n')
    Log(tmp_path, 2, 6, "sft").close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_setting_of_a_later_version_was_at_its_default(sft_config, begun):
    path = begun / "config.yaml"
    path.write_text("".join(line for line in path.open() if not line.startswith(("fuse:", "neftune"))))
    open_run(sft_config(resume=True))
    with pytest.raises(ValueError, match="fuse 'auto' -> True"):
        open_run(sft_config(resume=True, fuse=True))


def test_a_setting_of_lora_that_a_later_version_brought_was_at_its_default(sft_config, begun):
    path = begun / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["lora"]["lora_dropout"]
    path.write_text(yaml.safe_dump(settings))
    open_run(sft_config(resume=True))
    lora = dataclasses.replace(sft_config().lora, lora_dropout=0.1)
    with pytest.raises(ValueError, match="these differ: lora "):
        open_run(sft_config(resume=True, lora=lora))


# ---- Ctrl-C ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_clusters_stop_wait_until_they_are_asked_for(number):
    with delayed_interrupt() as interrupted:
        assert not interrupted
        os.kill(os.getpid(), number)
        assert interrupted


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), delayed_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_ctrl_c_is_what_it_was_before():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), delayed_interrupt():
        raise Interrupted("stopped")
    assert signal.getsignal(signal.SIGINT) is before
