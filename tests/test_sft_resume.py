"""Supervised runs that repeat, that go on after an interruption, and that leave another run's folder alone."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phi2.lora_config import LoraConfig
from phi2.runs.log import Interrupted
from phi2.training import loop, sft
from phi2.training.metrics import Metrics
from phi2.training.sft import SFTConfig, train

LORA = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))


@pytest.fixture(scope="module")
def random_config(tiny_phi_with_dropout, sft_data) -> Callable[..., SFTConfig]:
    """A run with everything that is random: dropout in the model and in the adapter, NEFTune, shuffling."""
    where = dict(model=str(tiny_phi_with_dropout), data=sft_data, eval_data=sft_data, device="cpu")
    size = dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
    noise = dict(lora=dataclasses.replace(LORA, lora_dropout=0.2), neftune_noise_alpha=5.0)
    often = dict(eval_steps=2, save_steps=3, sample_prompts=["Q?"])
    return lambda output, **changes: SFTConfig(output=str(output), **{**where, **size, **noise, **often, **changes})


@pytest.fixture(scope="module")
def whole(random_config, tmp_path_factory) -> Path:
    """That run, not interrupted."""
    return train(random_config(tmp_path_factory.mktemp("whole") / "run"))


def stop_at(step: int, run: Callable[[], Path]) -> None:
    """Breaks a run off behind update `step`, before anything tells of it."""

    class Stop(Exception):
        pass

    def stop(loss: float, at: int) -> None:
        if at == step:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "require_finite", stop)
        run()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    random_config, whole, metrics_of, tmp_path, assert_same_weights
):
    again, other = (train(random_config(tmp_path / str(seed), seed=seed, sample_prompts=[])) for seed in (42, 1))
    assert metrics_of(whole) == metrics_of(again) != metrics_of(other)
    assert_same_weights(whole, again)


def test_how_often_a_run_evaluates_saves_and_samples_does_not_change_it(
    random_config, whole, tmp_path, assert_same_weights
):
    seldom = random_config(tmp_path / "run", eval_data=None, eval_steps=0, save_steps=0, sample_prompts=[])
    assert_same_weights(train(seldom), whole)


def test_a_killed_run_resumes_bit_for_bit(
    random_config, whole, train_and_kill, metrics_of, tmp_path, assert_same_weights
):
    config = random_config(tmp_path / "run")
    train_and_kill(config, step=5)
    assert [line["step"] for line in metrics_of(config.output)] == [1, 2, 2, 3, 4, 4]
    resumed = train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"lora": None}, {"lora": None, "dtype": "float16"}], ids=str)
def test_runs_of_every_kind_resume_bit_for_bit(random_config, metrics_of, tmp_path, changes, assert_same_weights):
    configs = [random_config(tmp_path / name, **changes, sample_prompts=[]) for name in ("whole", "stopped")]
    whole = train(configs[0])
    stop_at(5, lambda: train(configs[1]))
    resumed = train(dataclasses.replace(configs[1], resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


def test_a_run_killed_before_its_first_checkpoint_starts_over(random_config, whole, metrics_of, tmp_path):
    config = random_config(tmp_path / "run", sample_prompts=[])
    stop_at(3, lambda: train(config))
    assert metrics_of(train(dataclasses.replace(config, resume=True))) == metrics_of(whole)


def test_resuming_a_finished_run_changes_nothing(sft_config, metrics_of, weights_of):
    run = train(sft_config())
    lines, weights = metrics_of(run), weights_of(run)
    assert metrics_of(train(sft_config(resume=True))) == lines
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(run).items())


def test_without_a_save_strategy_a_run_leaves_its_result_alone(sft_config, metrics_of, tmp_path):
    run = train(sft_config(save_strategy="no"))
    assert (run / "adapter").exists() and not (run / "checkpoints").exists()
    assert metrics_of(run) == metrics_of(train(sft_config(output=str(tmp_path / "saving"))))


@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_ends_the_update_saves_and_can_be_resumed(
    random_config, whole, metrics_of, tmp_path, monkeypatch, step, assert_same_weights
):
    config, update, calls = random_config(tmp_path / "run", sample_prompts=[]), sft.update, []

    def update_meets_ctrl_c(*arguments) -> Metrics:
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"stopped after step {step}; go on with"):
        patch.setattr(sft, "update", update_meets_ctrl_c)
        train(config)
    names = {path.name for path in (Path(config.output) / "checkpoints").iterdir()}
    assert names == {f"step-{step}"} | ({"step-3"} if step > 3 else set())
    resumed = train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


def test_ctrl_c_during_the_last_update_lets_the_run_end(sft_config, monkeypatch):
    update = sft.update
    monkeypatch.setattr(sft, "update", lambda *a: (os.kill(os.getpid(), signal.SIGINT), update(*a))[1])
    assert (train(sft_config(max_steps=1)) / "adapter").exists()


def test_another_run_in_the_same_folder_is_refused_and_the_first_stays(sft_config):
    run = train(sft_config(max_steps=1))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for config in (sft_config(max_steps=1), sft_config(max_steps=1, resume=True, learning_rate=1.0)):
        with pytest.raises(ValueError, match="holds a run already|these differ: learning_rate 0.01 -> 1.0"):
            train(config)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
