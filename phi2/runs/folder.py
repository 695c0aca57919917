"""The folder of a run: what was asked for, on what machine, and what came of it, line by line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from phi2.files import write_whole
from phi2.runs.checkpoint import last_checkpoint
from phi2.training.config import TrainingConfig

FREE_TO_CHANGE = frozenset(
    "output resume device logging_steps eval_steps save_strategy save_steps save_total_limit sample_prompts"
    " loss_file".split()  # what stands in that file may not change: inputs.json
)


def open_run(config: TrainingConfig) -> Path | None:
    """Makes the run folder, or checks that the run in it can go on, and returns the checkpoint to go on from.

    A run that goes on is left as it is, until its inputs have been compared too.

    Raises:
        ValueError: when the folder holds a run and `resume` is off, or when a setting differs from that run's.
    """
    run, checkpoint = Path(config.output), last_checkpoint(Path(config.output))
    if checkpoint or _lines(run / "metrics.jsonl"):
        if not config.resume:
            raise ValueError(f"{run} holds a run already; give another output, or resume: true to go on with it")
        _require_same(run / "config.yaml", config)
    elif run.exists() and not (run / "config.yaml").exists() and any(run.iterdir()):
        raise ValueError(f"{run} exists and holds no run of ours; give another output")
    run.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_settings(run, config)
    return checkpoint


def write_settings(run: Path, config: TrainingConfig) -> None:
    """config.yaml and environment.json: what was asked for, and where."""
    write_whole(run / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    write_whole(run / "environment.json", json.dumps(environment(), indent=1))


def to_plain(config: TrainingConfig) -> dict[str, Any]:
    """A config as YAML holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _require_same(path: Path, config: TrainingConfig) -> None:
    """A setting that a later version brought was at its default before."""
    settings = to_plain(config)
    defaults = to_plain(type(config)(model=config.model, data=config.data, output=config.output))
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read, so the run cannot go on: {error}") from error
    before = _completed(before, defaults)
    changed = [k for k in settings if k not in FREE_TO_CHANGE and before.get(k) != settings[k]]
    if changed:
        told = ", ".join(f"{k} {before.get(k)!r} -> {settings[k]!r}" for k in changed)
        raise ValueError(f"{path}: a resumed run keeps its settings, but these differ: {told}")


def _completed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that are missing, within groups of settings too."""
    nested = {
        name: _completed(settings[name], default)
        for name, default in defaults.items()
        if isinstance(default, dict) and isinstance(settings.get(name), dict)
    }
    return defaults | settings | nested


def environment() -> dict[str, Any]:
    """Versions, machine and commit, so that a number can be made again."""
    packages = ("torch", "safetensors", "tokenizers", "numpy")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit this library stands at, None outside a checkout."""
    here = Path(__file__).parents[1]
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; the last one of a killed run, or of a full disk, may be torn."""
    return list(filter(_is_whole, path.read_text(encoding="utf-8").split("\n")[:-1])) if path.exists() else []


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


class Log:
    """metrics.jsonl and the progress bar of a run.

    Args:
        run: the run folder.
        first: updates done already; later lines of an interrupted run, also in samples.jsonl, are dropped: they will be
            made again.
        total: updates of the whole run.
    """

    def __init__(self, run: Path, first: int, total: int, name: str) -> None:
        self.path = run / "metrics.jsonl"
        for path in filter(Path.exists, (self.path, run / "samples.jsonl")):
            write_whole(path, "".join(f"{line}\n" for line in _lines(path) if json.loads(line)["step"] <= first))
        self.bar = tqdm(total=total, initial=first, desc=name, unit="step", dynamic_ncols=True)
        self.first, self.total = first, total
        self.tokens, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The updates that are left. An update's time runs from here to `train`: what comes behind is not training."""
        for step in range(self.first + 1, self.total + 1):
            self.started = time.perf_counter()
            yield step

    def train(self, step: int, tokens: int, metrics: Mapping[str, float], every: int) -> None:
        """One update: `tokens` were processed for it. A line is written every `every` updates."""
        self.tokens += tokens
        self.seconds += time.perf_counter() - self.started
        self.bar.update()
        if step % every == 0:
            speed = self.tokens / self.seconds
            self.tokens, self.seconds = 0, 0.0
            self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed:,.0f} tok/s")
            self.write(step, "train", {**metrics, "tokens_per_second": round(speed, 1)})

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "type": kind, **metrics}) + "\n")

    def close(self) -> None:
        self.bar.close()


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    values: dict[str, float] = {}
    for line in _lines(run / "metrics.jsonl"):
        values |= json.loads(line)
    return {name: value for name, value in values.items() if name != "type"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; the run stopped between two updates and can be resumed."""


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[list[int]]:
    """Ctrl-C or a cluster's SIGTERM inside does not break off an update: it is noted in the list this yields.

    A second one does. Python hears signals in its main thread only, so elsewhere the list stays empty.
    """
    caught: list[int] = []

    def note(number: int, frame) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
