"""Around the updates of a run, whatever it trains: what is due behind each of them, and behind the last."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import save_pretrained
from phi2.data.encoded import Encoded
from phi2.inference.generate import generate_batch
from phi2.inference.kept_engine import release_engine
from phi2.lora import has_adapter
from phi2.losses.registry import State, as_numbers
from phi2.model import Phi2ForCausalLM
from phi2.runs.card import write_card
from phi2.runs.checkpoint import restore_checkpoint, save_checkpoint
from phi2.runs.folder import to_plain
from phi2.runs.log import STATE, Interrupted, Log, delayed_interrupt, last_metrics
from phi2.tokenizer import Tokenizer
from phi2.training.config import TrainingConfig
from phi2.training.metrics import Metrics
from phi2.training.optim import Optimizer
from phi2.training.passes import Passes, Result, passes_of, rewind_of, tell_choice
from phi2.training.precision import autocast, compute_dtype
from phi2.training.window import Windows, total_steps

Watch = Callable[[int, Phi2ForCausalLM], None]  # is shown the update and the model behind every evaluation


@dataclass(frozen=True)
class Updates:
    """The updates that a run has left.

    Attributes:
        interrupted: not empty once Ctrl-C has come.
        loss_state: numbers that the loss keeps from one update to the next.
        passes: how a window goes through the model.
        unread: updates that are not reported yet: number, tokens and metrics.
        save_more: writes what else the run goes on from into the folder of a checkpoint.
    """

    config: TrainingConfig
    model: Phi2ForCausalLM
    tokenizer: Tokenizer
    optimizer: Optimizer
    windows: Windows
    log: Log
    interrupted: list[int]
    loss_state: dict[str, float | Tensor]
    passes: Passes
    watch: Watch | None = None
    save_more: Callable[[Path], None] | None = None
    unread: deque[tuple[int, int, Metrics]] = field(default_factory=deque)

    @property
    def done(self) -> int:
        """Updates that were made before."""
        return self.log.first

    def steps(self) -> Iterator[int]:
        """Their numbers, counted from 1."""
        return self.log.steps()

    def compile(self, backward: Callable[[], Result]) -> None:
        """Has a GPU's kernels compiled, before the first update, and leaves everything as it was.

        Args:
            backward: adds the gradients of the first window; two passes ask for all kernels.
        """
        if not compiles(self.model.device):
            return
        with self.log.preparing("compiling kernels"):
            rewind = rewind_of(self.model.device)
            self.attempt(backward)
            self.optimizer.clear()
            rewind()

    def attempt(self, compute: Callable[[], Result]) -> Result:
        """What the passes of an update or an evaluation give; where memory does not hold them, in smaller ones."""
        rewind = rewind_of(self.model.device)

        def again() -> None:
            self.optimizer.clear()
            rewind()

        return self.passes.attempt(compute, again)

    def writes(self, step: int) -> bool:
        """Whether the metrics of an update are written."""
        return step % self.config.logging_steps == 0

    def end(self, step: int, tokens: int, metrics: Metrics, evaluate: Callable[[], Mapping[str, float]] | None) -> None:
        """Writes what is due behind an update: its metrics, an evaluation with samples, a checkpoint.

        The metrics of a GPU's update are read when the next one has been handed to it, or something else is due.

        Args:
            tokens: that were processed for it.
            evaluate: gives the metrics of the evaluation rows, where there are any.
        Raises:
            ValueError: when the loss or its gradient is no number any more, of this update or of one before.
            Interrupted: after Ctrl-C, behind the checkpoint.
        """
        config, total = self.config, self.log.total
        evaluates = _is_due(config.eval_steps, step, total)
        saves = config.save_strategy == "steps" and _is_due(config.save_steps, step, total)
        self.unread.append((step, tokens, metrics))
        self._read(0 if evaluates or saves else updates_behind(self.model.device))
        if evaluates:
            if evaluate is not None:
                self.log.write(step, "eval", self.attempt(evaluate))
            _write_samples(config, self.model, self.tokenizer, step)
            if self.watch is not None:
                self.watch(step, self.model)
        stops = bool(self.interrupted)  # asked once: Ctrl-C may come at any moment
        if saves or stops:
            self._read(0)
            keep = config.save_total_limit
            state = as_numbers(self.loss_state)
            save_checkpoint(Path(config.output), step, self.optimizer, self._save, keep, state, self.passes)
        if evaluates or saves:
            self.log.restart()
        if stops and step < total:
            raise Interrupted(f"stopped after step {step}; go on with resume: true")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within, what an error ends the run with hides no update that was made before, nor that one was refused."""
        try:
            yield
        except Exception as error:
            try:
                self._read(0)
            except ValueError as refusal:  # of an update before: the run would have ended with it
                raise refusal from error
            except Exception:  # a device that has failed gives nothing back
                pass
            raise

    def _read(self, left: int) -> None:
        """Reports all updates but the last `left`; those behind one that is refused are forgotten."""
        read = []
        try:
            while len(self.unread) > left:
                step, tokens, arriving = self.unread.popleft()
                metrics = arriving.wait()
                require_finite(metrics["loss"], step)
                if not self.optimizer.scaler.is_enabled():  # a scaled one that overflowed has been left out
                    require_finite_gradient(metrics["grad_norm"], step)
                require_finite_state(metrics, step)
                read.append((step, tokens, metrics | {"epoch": step / self.windows.per_epoch}))
        except ValueError:
            self.unread.clear()
            raise
        finally:
            self.log.train(read, self.config.logging_steps)

    def _save(self, folder: Path) -> None:
        weights_saver(self.config, self.model, self.tokenizer)(folder)
        if self.save_more is not None:
            self.save_more(folder)


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled when they are first launched there."""
    return device.type == "cuda"


def updates_behind(device: torch.device) -> int:
    """How many updates are handed to a device before the first of them is read: a GPU has work meanwhile."""
    return 1 if device.type == "cuda" else 0


def require_finite_gradient(norm: float, step: int) -> None:
    """Stops a run whose gradient is no number any more.

    Raises:
        ValueError: naming the step.
    """
    if not math.isfinite(norm):
        raise ValueError(f"update {step}: the norm of the gradient is {norm}; try a lower learning_rate")


def require_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is no number any more.

    Raises:
        ValueError: naming the step.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"step {step}: the loss is {loss}; try a lower learning_rate, or another dtype than float16; a loss of your"
            " own must be a number for every row"
        )


def require_finite_state(metrics: Mapping[str, float], step: int) -> None:
    """Stops a run whose loss keeps what is no number.

    Raises:
        ValueError: naming the step, and under which name.
    """
    for name, value in metrics.items():
        if name.startswith(STATE) and not math.isfinite(value):
            raise ValueError(f"update {step}: the loss keeps {value} as {name.removeprefix(STATE)}")


@contextmanager
def updates_of(
    config: TrainingConfig,
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    windows: Windows,
    rows: Sequence[Encoded],
    checkpoint: Path | None,
    title: str,
    loss_state: State | None = None,
    watch: Watch | None = None,
    save_more: Callable[[Path], None] | None = None,
) -> Iterator[Updates]:
    """The updates of a run from its start or from a checkpoint; behind the block its result and card are written.

    Args:
        rows: all that go through the model.
        title: of the progress bar.
        loss_state: what the loss starts from of the numbers that it keeps; None where it keeps none.
        save_more: writes what else the run goes on from into the folder of a checkpoint.
    """
    run, total, kept = Path(config.output), total_steps(config, windows), dict(loss_state or {})
    optimizer = Optimizer(model, config, total, scale_loss=compute_dtype(config) == torch.float16)
    with autocast(config):
        passes = passes_of(config, model, rows)
    done = restore_checkpoint(checkpoint, optimizer, kept, passes) if checkpoint else 0
    tell_choice(passes, config, model.device)
    with closing(Log(run, done, total, title)) as log, delayed_interrupt() as interrupted:
        left = Updates(config, model, tokenizer, optimizer, windows, log, interrupted, kept, passes, watch, save_more)
        with left.told():
            yield left
    weights_saver(config, model, tokenizer, compute_dtype(config))(run)
    write_card(run, to_plain(config), last_metrics(run), tokenizer.template_origin)


def weights_saver(
    config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer, dtype: torch.dtype | None = None
) -> Callable[[Path], None]:
    """Writes adapter/ (PEFT) or model/ (Hugging Face, in `dtype`) into a folder, with the tokenizer."""

    def save(folder: Path) -> None:
        if has_adapter(model):
            save_adapter(model, folder / "adapter", config.model)
            tokenizer.save(folder / "adapter")
        else:
            save_pretrained(model, tokenizer, folder / "model", dtype=dtype, overwrite=True)

    return save


def _is_due(every: int, step: int, total: int) -> bool:
    """Whether something done every `every` updates, and after the last, is due after update `step`."""
    return step == total or (every > 0 and step % every == 0)


def _write_samples(config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer, step: int) -> None:
    """Answers every sample prompt greedily and appends the answers to samples.jsonl."""
    if not config.sample_prompts:
        return
    prompts = list(config.sample_prompts)
    answers = generate_batch(
        model, tokenizer, prompts, prompt_style=tokenizer.prompt_style, max_new_tokens=128, temperature=0.0
    )
    release_engine(model)  # training needs its memory
    with (Path(config.output) / "samples.jsonl").open("a", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            line = {"step": step, "prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
