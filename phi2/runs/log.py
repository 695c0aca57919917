"""What comes of a run line by line, metrics.jsonl and the progress bar, and how it is interrupted between two lines."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from phi2.files import write_whole

STATE = "state/"  # before the names of numbers that a loss keeps from one update to the next


def whole_lines(path: Path) -> list[str]:
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
            write_whole(path, "".join(f"{line}\n" for line in whole_lines(path) if json.loads(line)["step"] <= first))
        self.bar = tqdm(total=total, initial=first, desc=name, unit="step", dynamic_ncols=True)
        self.first, self.total = first, total
        self.tokens, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The updates that are left. Their time runs from here, or from `restart`, to `train`."""
        self.restart()
        yield from range(self.first + 1, self.total + 1)

    def restart(self) -> None:
        """What came since `train` was not training."""
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """Within, the bar says so; the next update's time runs from the end."""
        self.bar.set_postfix_str(what)
        yield
        self.bar.set_postfix_str("")
        self.restart()

    def train(self, updates: Sequence[tuple[int, int, Mapping[str, float]]], every: int) -> None:
        """Updates that are known by now, in equal shares of the time since the last ones.

        Args:
            updates: the number of each, the tokens that were processed for it, and its metrics.
            every: so many updates a line is written.
        """
        now = time.perf_counter()
        for step, tokens, metrics in updates:
            self.tokens += tokens
            self.seconds += (now - self.started) / len(updates)
            self.bar.update()
            if step % every == 0:
                speed = self.tokens / self.seconds
                self.tokens, self.seconds = 0, 0.0
                self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed:,.0f} tok/s")
                self.write(step, "train", {**metrics, "tokens_per_second": round(speed, 1)})
        if updates:
            self.started = now

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "type": kind, **metrics}) + "\n")

    def close(self) -> None:
        self.bar.close()


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    values: dict[str, float] = {}
    for line in whole_lines(run / "metrics.jsonl"):
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
