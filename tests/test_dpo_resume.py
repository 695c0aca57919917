"""Preference runs that repeat, and that go on after an interruption."""

from __future__ import annotations

import dataclasses

import pytest

from phi2.lora_config import LoraConfig
from phi2.training import loop
from phi2.training.dpo import train

LORA = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    dpo_config, metrics_of, tmp_path, assert_same_weights
):
    settings = dict(disable_dropout=False, lora=dataclasses.replace(LORA, lora_dropout=0.2))
    first, again, other = (
        train(dpo_config(**settings, output=str(tmp_path / str(number)), seed=seed))
        for number, seed in enumerate((0, 0, 1))
    )
    assert metrics_of(first) == metrics_of(again) != metrics_of(other)
    assert_same_weights(first, again)


def test_a_killed_run_resumes_bit_for_bit(
    dpo_config, pair_data, train_and_kill, metrics_of, tmp_path, assert_same_weights
):
    """With an adapter to start from: its frozen copy, the reference, is made again."""
    lora = dataclasses.replace(LORA, lora_dropout=0.2)
    start = dpo_config(output=str(tmp_path / "start"), max_steps=2, lora=lora, disable_dropout=False)
    start = train(start) / "adapter"
    noise = dict(adapter=str(start), lora=LoraConfig(), disable_dropout=False, nll_weight=0.1)
    often = dict(eval_data=pair_data, eval_steps=2, save_steps=3)
    whole = train(dpo_config(**noise, **often))
    config = dpo_config(**noise, **often, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    assert [line["step"] for line in metrics_of(config.output)] == [1, 2, 2, 3, 4, 4]
    resumed = train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("loss", ["beta_dpo", "sigmoid:0.5,bco:0.5"])
def test_a_killed_run_goes_on_with_what_its_loss_keeps(
    dpo_config, pair_data, train_and_kill, metrics_of, tmp_path, assert_same_weights, loss
):
    """Two micro-batches an update, whose dropout is drawn once and seen twice."""
    noise = dict(lora=dataclasses.replace(LORA, lora_dropout=0.2), disable_dropout=False)
    often = dict(loss=loss, beta=0.3, eval_data=pair_data, eval_steps=2, save_steps=3, learning_rate=1e-3)
    whole = train(dpo_config(**noise, **often))
    config = dpo_config(**noise, **often, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    resumed = train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)
    kept = [{k: v for k, v in line.items() if k.startswith("state/")} for line in metrics_of(whole)]
    assert kept[0] and kept[0] != kept[-1]


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float16"}, {"lora": None}, {"precompute_ref_log_probs": True}, {"loss": "simpo", "dtype": "bfloat16"}],
    ids=str,
)
def test_runs_of_every_kind_resume_bit_for_bit(
    dpo_config, metrics_of, monkeypatch, tmp_path, changes, assert_same_weights
):
    class Stop(Exception):
        pass

    def stop(loss: float, step: int) -> None:
        if step == 5:
            raise Stop

    whole = train(dpo_config(**changes, save_steps=3))
    config = dpo_config(**changes, save_steps=3, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "require_finite", stop)
        train(config)
    resumed = train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


def test_a_resumed_run_with_another_loss_is_refused(dpo_config):
    train(dpo_config(max_steps=1))
    with pytest.raises(ValueError, match="these differ: beta 0.1 -> 0.3, .*loss 'sigmoid' -> 'ipo'"):
        train(dpo_config(max_steps=1, resume=True, loss="ipo", beta=0.3))
