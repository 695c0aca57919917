"""Around the updates: what is read of them, and when. A GPU's are read when the next one has been handed to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi2.arriving import Arriving
from phi2.losses.registry import preference_loss
from phi2.runs.log import Interrupted
from phi2.training import dpo, loop, metrics, sft
from phi2.training.metrics import Metrics
from phi2.training.optim import Optimizer


@pytest.fixture
def behind(monkeypatch) -> None:
    """Updates are read as on a GPU."""
    monkeypatch.setattr(loop, "updates_behind", lambda device: 1)


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What a run does, in order."""
    found: list[str] = []

    def watch(where, name: str, event: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, **k: found.append(event) or real(*a, **k))

    watch(sft, "update", "update"), watch(Metrics, "wait", "read")
    watch(sft, "evaluate", "evaluate"), watch(loop, "save_checkpoint", "save")
    return found


def test_the_next_update_is_handed_over_before_one_is_read_and_all_are_read_before_anything_else(
    behind, events, sft_config, sft_data
):
    sft.train(sft_config(max_steps=5, eval_data=sft_data, eval_steps=2, save_steps=3))
    assert events == [
        "update", "update", "read", "read", "evaluate", "update", "read", "save",
        "update", "read", "evaluate", "update", "read", "evaluate", "save",
    ]  # fmt: skip


def test_an_update_reads_nothing_of_what_it_asks_for(behind, events, dpo_config, sft_config, monkeypatch):
    monkeypatch.setattr(Arriving, "wait", lambda self: pytest.fail("waited within an update"))
    for train, config in ((dpo.train, dpo_config(max_steps=1)), (sft.train, sft_config(max_steps=1))):
        with pytest.raises(pytest.fail.Exception):
            train(config)
    assert events.count("read") == 2  # behind the last update: it was this that failed


def test_a_run_that_is_read_behind_its_updates_says_the_same(behind, sft_config, metrics_of, monkeypatch, tmp_path):
    late = sft.train(sft_config(max_steps=5))
    monkeypatch.undo()
    assert metrics_of(late) == metrics_of(sft.train(sft_config(max_steps=5, output=str(tmp_path / "b"))))


def test_a_run_that_diverges_names_the_update_and_keeps_no_checkpoint_of_it(behind, sft_config):
    config = sft_config(learning_rate=1e30, max_steps=20, save_steps=2, save_total_limit=20)
    with pytest.raises(ValueError, match=r"(update|step) (\d+): the .* (nan|inf); try a lower learning_rate") as caught:
        sft.train(config)
    told = int(str(caught.value).split(":")[0].split()[1])
    saved = sorted(int(path.name.split("-")[1]) for path in Path(config.output, "checkpoints").glob("*"))
    assert saved == [*range(2, told, 2)]
    found = [load_file(path) for path in Path(config.output, "checkpoints").rglob("*.safetensors")]
    assert all(tensor.isfinite().all() for tensors in found for tensor in tensors.values())


MOMENTS = {"reading": (Metrics, "wait"), "evaluating": (sft, "evaluate"), "saving": (loop, "save_checkpoint")}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_at_any_moment_leaves_a_checkpoint_and_no_update_untold(
    moment, lag, sft_config, sft_data, metrics_of, monkeypatch
):
    monkeypatch.setattr(loop, "updates_behind", lambda device: lag)
    real, calls = getattr(*moment), []

    def meets_ctrl_c(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(*moment, meets_ctrl_c)
    config = sft_config(max_steps=6, eval_data=sft_data, eval_steps=2, save_steps=3, save_total_limit=9)
    with pytest.raises(Interrupted) as told:
        sft.train(config)
    step = int(str(told.value).split("after step ")[1].split(";")[0])
    assert Path(config.output, "checkpoints", f"step-{step}").exists()
    assert [line["step"] for line in metrics_of(config.output) if line["type"] == "train"] == [*range(1, step + 1)]


def test_of_two_updates_that_were_handed_over_the_first_is_told(behind, events, sft_config, monkeypatch):
    monkeypatch.setattr(Optimizer, "backward", lambda self, loss: (loss * float("nan")).backward())
    with pytest.raises(ValueError, match="update 1: the norm of the gradient is nan; try a lower learning_rate"):
        sft.train(sft_config(max_steps=3))
    assert events == ["update", "update", "read"]


def test_what_was_read_before_an_update_that_diverged_is_told(behind, sft_config, monkeypatch, metrics_of):
    config, calls = sft_config(max_steps=4, save_steps=2), []

    def second_is_none(optimizer, loss):
        calls.append(None)
        (loss * (1 if len(calls) == 1 else float("nan"))).backward()

    monkeypatch.setattr(Optimizer, "backward", second_is_none)
    with pytest.raises(ValueError, match="update 2: the norm of the gradient is nan"):
        sft.train(config)
    assert [line["step"] for line in metrics_of(config.output)] == [1]


def test_a_loss_that_keeps_no_number_is_told(dpo_config, registry):
    @preference_loss("mine", scope="window", state={"mean": 0.0})
    def mine(pairs, state):
        return pairs.margin, {"mean": state["mean"] / 0}

    with pytest.raises(ValueError, match="^update 1: the loss keeps nan as mean$"):
        dpo.train(dpo_config(loss="mine"))


def test_an_error_hides_no_update_that_was_made_before_it(behind, sft_config, monkeypatch, metrics_of):
    config, real, calls = sft_config(max_steps=4), Optimizer.step, []

    def third_fails(optimizer):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("too much")
        return real(optimizer)

    monkeypatch.setattr(Optimizer, "step", third_fails)
    with pytest.raises(torch.OutOfMemoryError):
        sft.train(config)
    assert [line["step"] for line in metrics_of(config.output)] == [1, 2]


def test_an_error_behind_an_update_that_diverged_is_its_consequence(behind, sft_config, monkeypatch, metrics_of):
    config, real, calls = sft_config(max_steps=4), Optimizer.step, []

    def third_fails(optimizer):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("a consequence")
        norm = real(optimizer)
        return norm * float("nan") if len(calls) == 2 else norm

    monkeypatch.setattr(Optimizer, "step", third_fails)
    with pytest.raises(ValueError, match="update 2: the norm of the gradient is nan") as caught:
        sft.train(config)
    assert str(caught.value.__cause__) == "a consequence"
    assert [line["step"] for line in metrics_of(config.output)] == [1]


def test_what_is_not_written_is_not_computed(dpo_config, metrics_of, monkeypatch, tmp_path):
    made, real = [], metrics.metrics_of
    monkeypatch.setattr("phi2.training.objective.metrics_of", lambda *a: made.append(None) or real(*a))
    few = metrics_of(dpo.train(dpo_config(max_steps=4, logging_steps=2)))
    assert len(made) == 2
    every = metrics_of(dpo.train(dpo_config(max_steps=4, output=str(tmp_path / "every"))))
    assert [line["step"] for line in few] == [2, 4] and few == [line for line in every if line["step"] % 2 == 0]
