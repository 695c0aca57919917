"""A run as an object: what its folder holds, as numbers to compute with, a model to ask and a table to look at.

run = phi2.Run("runs/ipo")  # as `phi2.dpo(...)` returns it
run.metrics["loss"]  # (n,) of the updates that were logged
model, tokenizer = run.load()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi2.files import read_json_lines, read_yaml
from phi2.pages.charts import number
from phi2.pages.page import fragment, table
from phi2.runs.shown import MAIN_CHARTS, curves, summary, title_of

if TYPE_CHECKING:
    from phi2.model import Phi2ForCausalLM
    from phi2.tokenizer import Tokenizer

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "kl")  # metrics of the table, where a run has them


class Run:
    """What a run has left behind so far. Files are read when they are asked for, so a run that goes on can be watched.

    It stands for its folder wherever a path is taken, and `run / "report.html"` is a file in it.

    Args:
        path: folder of a run.

    Attributes:
        path: the same.
        config: its settings, as config.yaml holds them.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: one line, here or where a file is read, when the folder holds no run or the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")
        if not (self.path / "config.yaml").is_file():
            raise ValueError(f"{self.path} holds no run: it has no config.yaml")
        self.config: dict[str, Any] = read_yaml(self.path / "config.yaml")

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Of the updates: (n,) values of each metric, and under "step" the updates they belong to."""
        return _columns(self._lines("train"))

    @property
    def evaluations(self) -> dict[str, np.ndarray]:
        """Of the evaluations, in the same form."""
        return _columns(self._lines("eval"))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What the model answered to the sample prompts: step, prompt, answer, finish_reason."""
        return self._read("samples.jsonl")

    def load(self, **options: Any) -> tuple[Phi2ForCausalLM, Tokenizer]:
        """The model that the run made, a LoRA adapter on its base, and the tokenizer.

        Args:
            options: of `phi2.load`: device, dtype, quantize.
        Raises:
            ValueError: while the run has no result yet.
        """
        from phi2.checkpoints.weights import load

        if (self / "adapter").is_dir():
            return load(self.config["model"], adapter=str(self / "adapter"), **options)
        if (self / "model").is_dir():
            return load(str(self / "model"), **options)
        raise ValueError(f"{self.path} has no adapter and no model yet: the run has not ended")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = self._read("metrics.jsonl")
        title = f"<strong>{escape(title_of(self.config))}</strong><br>{escape(f'{self.path}: {summary(lines)}')}"
        return fragment(f"<p>{title}</p>{self._table()}{curves(lines, MAIN_CHARTS)}")

    def _table(self) -> str:
        updates, held_out = self.metrics, self.evaluations
        rows = [
            [name, *(number(float(updates[name][i])) for i in (0, -1)), _last(held_out, f"eval_{name}")]
            for name in SHOWN
            if name in updates
        ]
        return table(["", "first update", "last update", "held out"], rows) if rows else ""

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self._read("metrics.jsonl") if line.get("type") == kind]

    def _read(self, name: str) -> list[dict[str, Any]]:
        return read_json_lines(self / name) if (self / name).is_file() else []


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A value that a line lacks is NaN."""
    names = dict.fromkeys(name for line in lines for name in line if name != "type")
    return {name: np.array([line.get(name, np.nan) for line in lines]) for name in names}


def _last(columns: dict[str, np.ndarray], name: str) -> str:
    return number(float(columns[name][-1])) if name in columns else ""
