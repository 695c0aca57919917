"""Checkpoints: whole or not there, the last few kept, and what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from phi2.lora_config import LoraConfig
from phi2.runs.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint
from phi2.training import loop, sft
from phi2.training.optim import Optimizer
from phi2.training.passes import Passes


@pytest.fixture
def optimizer(sft_config) -> Optimizer:
    """After one update, so that it has a state."""
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model, sft_config(), total_steps=10, scale_loss=False)
    optimizer.backward(model(torch.ones(3)).square().sum())
    optimizer.step()
    return optimizer


def write_weights(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("weights")


def names_in(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_a_run_without_checkpoints_has_no_last_one(tmp_path):
    assert last_checkpoint(tmp_path) is None


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 2):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert last_checkpoint(tmp_path).name == "step-10"


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    for name in ("step-3", ".step-7.unfinished", "step-8.old", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(tmp_path).name == "step-3"


def test_only_the_last_few_are_kept(tmp_path, optimizer):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, optimizer, write_weights, keep=2, loss_state={}, passes=Passes(64))
    assert names_in(tmp_path) == {"step-10", "step-11"}


def test_step_optimizer_and_random_state_come_back(tmp_path, optimizer, sft_config):
    torch.manual_seed(3)
    save_checkpoint(tmp_path, 7, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    expected = torch.rand(4)
    fresh = Optimizer(nn.Linear(3, 2), sft_config(), total_steps=10, scale_loss=False)
    torch.manual_seed(99)
    assert restore_checkpoint(last_checkpoint(tmp_path), fresh, {}, Passes(32)) == 7
    assert torch.equal(torch.rand(4), expected)
    assert fresh.updates == 1 and fresh.numbers() == optimizer.numbers()
    before, after = optimizer.tensors(), fresh.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (last_checkpoint(tmp_path) / "model" / "weights").read_text() == "weights"


def test_the_random_state_of_a_gpu_is_that_of_the_one_that_trains(tmp_path, optimizer, monkeypatch):
    states, trained = {torch.device("cuda", 0): 10, torch.device("cuda", 1): 11}, torch.device("cuda", 1)
    monkeypatch.setattr(optimizer, "device", trained)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([states[device]]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state.item()}))
    save_checkpoint(tmp_path, 7, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    states[trained] = 99
    restore_checkpoint(last_checkpoint(tmp_path), optimizer, {}, Passes(32))
    assert states == {torch.device("cuda", 0): 10, trained: 11}


def test_what_the_loss_keeps_comes_back_to_the_last_bit(tmp_path, optimizer):
    kept = {"mean": torch.tensor(0.1).item() / 3, "updates": 4.0}
    save_checkpoint(tmp_path, 1, optimizer, write_weights, keep=1, loss_state=kept, passes=Passes(64))
    state = {"mean": 0.0, "updates": 0.0}
    restore_checkpoint(last_checkpoint(tmp_path), optimizer, state, Passes(32))
    assert state == kept


def test_how_many_tokens_a_pass_holds_comes_back(tmp_path, optimizer):
    halved, passes = Passes(64), Passes(32)
    halved.halved = True
    save_checkpoint(tmp_path, 1, optimizer, write_weights, keep=1, loss_state={}, passes=halved)
    restore_checkpoint(last_checkpoint(tmp_path), optimizer, {}, passes)
    assert vars(passes) == vars(halved)


def test_a_checkpoint_without_what_the_loss_keeps_is_refused(tmp_path, optimizer):
    save_checkpoint(tmp_path, 1, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    with pytest.raises(ValueError, match=r"step-1: cannot resume from this checkpoint: KeyError\('mean'\)"):
        restore_checkpoint(last_checkpoint(tmp_path), optimizer, {"mean": 0.0}, Passes(32))


def test_an_interrupted_save_leaves_the_checkpoint_before_it_and_nothing_else(tmp_path, optimizer):
    save_checkpoint(tmp_path, 1, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))

    def interrupted(folder: Path) -> None:
        write_weights(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, optimizer, interrupted, keep=1, loss_state={}, passes=Passes(64))
    assert names_in(tmp_path) == {"step-1"}


def test_a_partial_checkpoint_of_a_killed_run_is_written_anew(tmp_path, optimizer):
    left = tmp_path / "checkpoints" / ".step-2.unfinished" / "model"
    left.mkdir(parents=True)
    (left / "weights").write_text("half")
    save_checkpoint(tmp_path, 2, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    assert names_in(tmp_path) == {"step-2"}
    assert (last_checkpoint(tmp_path) / "model" / "weights").read_text() == "weights"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def drop_step(path: Path) -> None:
    path.write_text(json.dumps({"optimizer": json.loads(path.read_text())["optimizer"]}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", truncate),
        ("state.safetensors", Path.unlink),
        ("state.json", truncate),
        ("state.json", Path.unlink),
        ("state.json", drop_step),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, optimizer, file, damage: Callable[[Path], None]):
    save_checkpoint(tmp_path, 4, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    damage(last_checkpoint(tmp_path) / file)
    with pytest.raises(ValueError, match="step-4: cannot resume from this checkpoint: ") as caught:
        restore_checkpoint(last_checkpoint(tmp_path), optimizer, {}, Passes(32))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path, optimizer, sft_config):
    save_checkpoint(tmp_path, 4, optimizer, write_weights, keep=1, loss_state={}, passes=Passes(64))
    other = Optimizer(nn.Sequential(nn.Linear(3, 2)), sft_config(), total_steps=10, scale_loss=False)
    with pytest.raises(ValueError, match=r"step-4: cannot resume from this checkpoint: KeyError\('0.weight.step'\)"):
        restore_checkpoint(last_checkpoint(tmp_path), other, {}, Passes(32))


def test_a_full_disk_ends_the_run_with_an_oserror_and_leaves_the_checkpoint_before(sft_config, full_disk, monkeypatch):
    config = sft_config(save_steps=2, save_total_limit=1, lora=LoraConfig(r=16, target_modules=("q_proj",)))

    def save(run: Path, step: int, *rest) -> None:
        if step == 2:
            return save_checkpoint(run, step, *rest)
        room = (last_checkpoint(run) / "state.safetensors").stat().st_size - 1  # it is the largest file here
        with full_disk(room):
            return save_checkpoint(run, step, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(OSError, match="state.safetensors: could not be written"):
        sft.train(config)
    run = Path(config.output)
    assert names_in(run) == {"step-2"}
    assert {path.name for path in last_checkpoint(run).iterdir()} == {"adapter", "state.safetensors", "state.json"}
