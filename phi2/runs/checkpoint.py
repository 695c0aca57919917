"""Checkpoints a run resumes from bit for bit: weights, optimizer, random state. Nothing in them is a pickle.

    checkpoints/step-N/
      adapter/ or model/       the trained weights, in the layout of the final result
      state.safetensors        AdamW's moments and the random generators' states
      reference.safetensors    where the reference moves: its weights, and what it is averaged from
      state.json               the step, counters, the loss scaler, what the loss keeps between updates, and how many
                               tokens a pass may hold

A checkpoint is written under another name and renamed when complete, so a folder called step-N is always whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from phi2.files import whole_folder


class OptimizerState(Protocol):
    """What a checkpoint keeps of an optimizer; beside it the random numbers of its device."""

    device: torch.device

    def tensors(self) -> dict[str, Tensor]: ...
    def numbers(self) -> dict: ...
    def restore(self, tensors: dict[str, Tensor], numbers: dict) -> None: ...


class PassState(Protocol):
    """What a checkpoint keeps of the passes."""

    max_tokens: int
    halved: bool


def last_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(found, key=_step_of, default=None)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(
    run: Path,
    step: int,
    optimizer: OptimizerState,
    save_weights: Callable[[Path], None],
    keep: int,
    loss_state: Mapping[str, float],
    passes: PassState,
) -> None:
    """Writes checkpoints/step-N, then deletes all but the last `keep`.

    Args:
        step: updates done.
        save_weights: writes adapter/ or model/, and what else the run goes on from, into the folder it is given.
        loss_state: numbers that the loss keeps from one update to the next.
    """
    folder = run / "checkpoints" / f"step-{step}"
    if folder.exists():
        return
    with whole_folder(folder) as unfinished:
        save_weights(unfinished)
        save_tensors({**optimizer.tensors(), **_random_state(optimizer.device)}, unfinished / "state.safetensors")
        numbers = {"step": step, "optimizer": optimizer.numbers(), "loss": dict(loss_state)}
        numbers["passes"] = {"max_tokens": passes.max_tokens, "halved": passes.halved}
        (unfinished / "state.json").write_text(json.dumps(numbers, indent=1))
    for old in sorted(folder.parent.glob("step-*"), key=_step_of)[:-keep]:
        shutil.rmtree(old)


def restore_checkpoint(folder: Path, optimizer: OptimizerState, loss_state: dict[str, Any], passes: PassState) -> int:
    """Puts the optimizer and the random generators back and returns the step; the weights are loaded with the model.

    Args:
        loss_state, passes: set to what they were.
    Raises:
        ValueError: naming the file that cannot be read.
    """
    try:
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
        state = json.loads((folder / "state.json").read_text())
        optimizer.restore(tensors, state["optimizer"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and optimizer.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], optimizer.device)
        loss_state.update({name: state["loss"][name] for name in loss_state})
        passes.max_tokens, passes.halved = state["passes"]["max_tokens"], state["passes"]["halved"]
        return state["step"]
    except (OSError, KeyError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: cannot resume from this checkpoint: {error!r}") from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes them. Raises OSError, naming the file, on a full disk."""
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: could not be written ({error})") from error


def _random_state(device: torch.device) -> dict[str, Tensor]:
    cuda = {"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"rng.cpu": torch.get_rng_state(), **cuda}
