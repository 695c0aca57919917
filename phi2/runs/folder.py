"""The folder of a run: whether it may be used, what was asked for, and on what machine."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from phi2.files import read_yaml, require_folder, write_whole
from phi2.runs.checkpoint import last_checkpoint
from phi2.runs.config import RunConfig
from phi2.runs.log import whole_lines

FREE_TO_CHANGE = frozenset(
    "output resume device logging_steps eval_steps save_strategy save_steps save_total_limit sample_prompts"
    " ledger loss_file".split()  # what stands in that file may not change: inputs.json
)


def open_run(config: RunConfig) -> Path | None:
    """Makes the run folder, or checks that the run in it can go on, and returns the checkpoint to go on from.

    A run that goes on is left as it is, until its inputs have been compared too.

    Raises:
        ValueError: when the folder holds a run and `resume` is off, or when a setting differs from that run's.
    """
    require_folder(Path(config.output))
    run, checkpoint = Path(config.output), last_checkpoint(Path(config.output))
    if checkpoint or whole_lines(run / "metrics.jsonl"):
        if not config.resume:
            raise ValueError(f"{run} holds a run already; give another output, or resume: true to go on with it")
        require_same_settings(run / "config.yaml", config, FREE_TO_CHANGE, "resumed run")
    elif run.exists() and not (run / "config.yaml").exists() and any(run.iterdir()):
        raise ValueError(f"{run} exists and holds no run of ours; give another output")
    run.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_settings(run, config)
    return checkpoint


def write_settings(run: Path, config: RunConfig) -> None:
    """config.yaml and environment.json: what was asked for, and where."""
    write_whole(run / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    write_whole(run / "environment.json", json.dumps(environment(), indent=1))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """A config as YAML holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_as_text))


def _as_text(value: Any) -> str:
    """What no YAML file holds: rows of another library by their number."""
    is_rows = isinstance(value, Sequence) or hasattr(value, "column_names")
    return f"{len(value)} rows in memory" if is_rows else str(value)


def require_same_settings(path: Path, config: RunConfig, free: Collection[str], what: str) -> None:
    """Compares settings with those of a file; one that a later version brought was at its default before.

    Args:
        free: settings that may differ.
        what: has the settings, for the error.
    Raises:
        ValueError: naming what differs, or a missing file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the {what.split()[-1]} cannot go on")
    settings, before = to_plain(config), _completed(read_yaml(path), _defaults(type(config)))
    changed = [k for k in settings if k not in free and before.get(k) != settings[k]]
    if changed:
        told = ", ".join(f"{k} {before.get(k)!r} -> {settings[k]!r}" for k in changed)
        raise ValueError(f"{path}: a {what} keeps its settings, but these differ: {told}")


def _defaults(kind: type[RunConfig]) -> dict[str, Any]:
    """As YAML holds them."""
    made = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
    }
    given = {name: default for name, default in made.items() if default is not dataclasses.MISSING}
    return json.loads(
        json.dumps(given, default=lambda value: vars(value) if dataclasses.is_dataclass(value) else str(value))
    )


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
