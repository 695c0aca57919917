"""`phi2 verify`: what this project promises of its numbers, measured on a model and rows of the user's.

model, rows -> noise floor -> a line for each promise: green or red, what was measured, what is allowed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from phi2.data.encode import EncodedPreference, encode_records
from phi2.data.sources import load_records, require_ignored
from phi2.keywords import config_of, explained
from phi2.lab import checks, layouts, oracle
from phi2.lab.checks import Measured, Subject
from phi2.lab.noise import NoiseFloor, noise_floor
from phi2.lab.verify_config import VerifyConfig
from phi2.losses.bound import bind_loss
from phi2.tokenizer import Tokenizer
from phi2.training.api import DATA
from phi2.training.config import DPOConfig
from phi2.training.needs import rows_for
from phi2.training.reference import make_reference
from phi2.training.session import Rows, Session, require_fit, start

GREEN, RED, DIM, RESET = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[0m"
RESERVE = 4  # records that are encoded for each pair that is looked at: some may be dropped

OF_POLICY: dict[str, Callable[[Subject], Measured]] = {
    "log-probs are finite": checks.finite,
    "ids are within the vocabulary": checks.vocabulary,
    "log-probs in a padded batch": partial(checks.same_logps, layouts.padded),
    "log-probs packed": partial(checks.same_logps, layouts.packed),
    "log-probs with a shared prompt": partial(checks.same_logps, partial(layouts.shared, size=1)),
    "log-probs with shared prompts in a batch": partial(checks.same_logps, layouts.shared),
    "log-probs in another order": partial(checks.same_logps, layouts.reordered),
    "cached decoding is a full pass": checks.cached_decoding,
    "policy is reference at step 0": checks.policy_is_reference,
    "loss at step 0": checks.loss_at_start,
    "gradient of another split": checks.of_another_split,
    "gradient of separate rows": checks.of_separate_rows,
    "gradient with activation checkpointing": checks.with_checkpointing,
    "adapter saved and loaded": checks.adapter_round_trip,
    "logits of transformers": oracle.beside_transformers,
}
OF_RUNS = {"same seed, same adapter": checks.same_seed, "resumed from a checkpoint": checks.resumed}


@dataclass(frozen=True)
class Line:
    """One promise.

    Attributes:
        measured: None where it was not.
        note: why not, or what else there is to say.
    """

    name: str
    measured: Measured | None
    note: str = ""
    skipped: bool = False

    @property
    def is_red(self) -> bool:
        return not self.skipped and (self.measured is None or not self.measured.value <= self.measured.allowed)

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "RED" if self.is_red else "green"

    def __str__(self) -> str:
        """Verdict, name, what was measured, what is allowed."""
        if self.measured is None:
            return f"{self.verdict:<7}  {self.name:<40}  {self.note}"
        value, allowed, unit, _ = self.measured
        told = f"{_number(value):>8}  allowed {_number(allowed):<8} {unit}"
        return f"{self.verdict:<7}  {self.name:<40}  {told}{f'; {self.note}' if self.note else ''}".rstrip()


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found; it shows itself as the command prints it.

    Attributes:
        rows: those that were looked at.
    """

    rows: list[EncodedPreference]
    noise: NoiseFloor
    lines: list[Line]

    @property
    def red(self) -> list[Line]:
        return [line for line in self.lines if line.is_red]

    def __repr__(self) -> str:
        return self.shown(color=False)

    def shown(self, color: bool) -> str:
        """The noise floor, then a line for each promise."""
        colors = {"green": GREEN, "RED": RED, "skipped": DIM}
        lines = [f"{colors[line.verdict]}{line}{RESET}" if color else str(line) for line in self.lines]
        return "\n".join([str(self.noise), "", *lines])


@explained(VerifyConfig)
def verify(**settings: Any) -> Verification:
    """Measures on a model and rows of yours what this project promises of its numbers.

    Args:
        settings: the flags of `phi2 verify`.
    Returns:
        The noise floor, and a line for each promise; `red` are those that are broken.
    Raises:
        FileNotFoundError, ValueError: for settings, a model or data that cannot be used.
    """
    return run(config_of(VerifyConfig, settings, DATA))


def run(config: VerifyConfig) -> Verification:
    """`verify` for settings in one object."""
    total = 1 + len(OF_POLICY) + len(OF_RUNS)
    bar = tqdm(total=total, desc="verify", unit=" lines", disable=None, leave=False)
    with TemporaryDirectory() as name, bar:

        def line(name: str, check: Callable[..., Measured], *given: Any) -> Line:
            bar.update()
            return line_of(name, check, *given)

        folder = Path(name)
        settings = config.run(str(folder / "run"))
        session = start(settings)
        session.rows = Rows(rows_of(config, session.tokenizer), [], {})
        lines = [line("model saved and loaded", checks.model_round_trip, session, folder / "model")]
        with subject_of(session, settings, folder) as subject:
            lines += [line(name, check, subject) for name, check in OF_POLICY.items()]
        lines += [line(name, check, session, settings, folder) for name, check in OF_RUNS.items()]
    return Verification(subject.rows, subject.noise, lines)


@contextmanager
def subject_of(session: Session[EncodedPreference], settings: DPOConfig, folder: Path) -> Iterator[Subject]:
    """What the checks look at; behind the block the session is as it was."""
    rows = session.rows.train
    with session.policy(settings) as model:
        require_fit(settings, model.eval(), session.tokenizer, rows)
        with torch.no_grad():
            single = layouts.alone(model, rows)
        noise = noise_floor(model, rows, single, of_policy=settings.adapter is not None)
        reference = make_reference(session, settings, model, None, rows)
        yield Subject(session, settings, model, rows, single, noise, reference, folder)


def rows_of(config: VerifyConfig, tokenizer: Tokenizer) -> list[EncodedPreference]:
    """The first rows that can be used, as many as are asked for and there are.

    Raises:
        ValueError: when there is none, or one has a single answer, which is compared with nothing.
    """
    records, dropped = load_records(config.data, "preference", config.ignore_columns)
    require_ignored(config.ignore_columns, dropped)
    rows, _ = encode_records(records[: RESERVE * config.rows], tokenizer, config, "preference")
    return rows_for(bind_loss(DPOConfig.loss), rows[: config.rows])


def line_of(name: str, check: Callable[..., Measured], *given: Any) -> Line:
    """A check that is refused, as by a run that will not start, is red."""
    try:
        return Line(name, measured := check(*given), measured.note)
    except checks.Skipped as why:
        return Line(name, None, str(why), skipped=True)
    except ValueError as error:
        return Line(name, None, str(error))


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"
