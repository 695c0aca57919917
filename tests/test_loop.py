"""Around the updates: what is read of them, and when. A GPU's are read when the next one has been handed to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

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
    sft.train(sft_config(max_steps=4, eval_data=sft_data, eval_steps=3, save_steps=3))
    assert events == ["update", "update", "read", "update", "read", "read", "evaluate", "save"] + [
        "update", "read", "evaluate", "save",
    ]  # fmt: skip


def test_a_run_that_is_read_behind_its_updates_says_the_same(behind, sft_config, metrics_of, monkeypatch, tmp_path):
    late = sft.train(sft_config(max_steps=5))
    monkeypatch.undo()
    assert metrics_of(late) == metrics_of(sft.train(sft_config(max_steps=5, output=str(tmp_path / "b"))))


def test_a_run_that_diverges_names_the_update_and_keeps_no_checkpoint_of_it(behind, sft_config):
    config = sft_config(learning_rate=1e30, max_steps=20, save_steps=1, save_total_limit=20)
    with pytest.raises(ValueError, match=r"(update|step) (\d+): the .* (nan|inf); try a lower learning_rate") as caught:
        sft.train(config)
    told = int(str(caught.value).split(":")[0].split()[1])
    saved = sorted(int(path.name.split("-")[1]) for path in Path(config.output, "checkpoints").iterdir())
    assert saved == list(range(1, told))
    found = [load_file(path) for path in Path(config.output, "checkpoints").rglob("*.safetensors")]
    assert all(tensor.isfinite().all() for tensors in found for tensor in tensors.values())


def test_of_two_updates_that_were_handed_over_the_first_is_told(behind, events, sft_config, monkeypatch):
    monkeypatch.setattr(Optimizer, "backward", lambda self, loss: (loss * float("nan")).backward())
    with pytest.raises(ValueError, match="update 1: the norm of the gradient is nan; try a lower learning_rate"):
        sft.train(sft_config(max_steps=3))
    assert events == ["update", "update", "read"]


def test_what_is_not_written_is_not_computed(dpo_config, metrics_of, monkeypatch, tmp_path):
    made, real = [], metrics.metrics_of
    monkeypatch.setattr("phi2.training.objective.metrics_of", lambda *a: made.append(None) or real(*a))
    few = metrics_of(dpo.train(dpo_config(max_steps=4, logging_steps=2)))
    assert len(made) == 2
    every = metrics_of(dpo.train(dpo_config(max_steps=4, output=str(tmp_path / "every"))))
    assert [line["step"] for line in few] == [2, 4] and few == [line for line in every if line["step"] % 2 == 0]
