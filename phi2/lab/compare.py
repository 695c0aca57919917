"""Loss variants times seeds over one base, one data set and one session: `phi2 compare`.

    variants -> one session, one pass of the reference -> a run for each variant and seed -> results.jsonl, report.html

Every run stands in a folder of its own, as `phi2 dpo` would leave it, and goes on by its own checkpoints. What is
finished is not run again, and the tables are made of the run folders alone: so they are the same, however often the
comparison was broken off.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from phi2.data.encoded import EncodedPreference
from phi2.data.flat import Joined
from phi2.data.processes import end_with_parent
from phi2.evaluation.api import tasks_of
from phi2.evaluation.config import TOY
from phi2.evaluation.models import require_chat_template
from phi2.files import require_folder, write_whole
from phi2.keywords import config_of, explained
from phi2.lab.compare_config import CompareConfig
from phi2.lab.compare_report import write_report as write_page
from phi2.lab.comparison import RESULTS, SETTINGS, Comparison, at_kl, curve_of, farthest_common_kl
from phi2.lab.measure import Measure, Tasks, start_of
from phi2.lab.report import write_report
from phi2.lab.variants import Variant, variants_of
from phi2.model import Phi2ForCausalLM
from phi2.runs.folder import require_same_settings, to_plain
from phi2.runs.inputs import inputs_of, require_same_inputs
from phi2.runs.log import Interrupted
from phi2.runs.run import Run
from phi2.training import dpo
from phi2.training.api import DATA
from phi2.training.config import STARTS, DPOConfig
from phi2.training.look import look_at_loss
from phi2.training.needs import require_both_labels, require_neighbours, rows_for
from phi2.training.reference import reference_kind, reference_of
from phi2.training.reference_cache import Reference
from phi2.training.session import start
from phi2.training.weights import with_weights
from phi2.training.window import total_steps, windows_of

if TYPE_CHECKING:
    from phi2.evaluation.tasks import Loaded

FAILURE = "failure.txt"  # in the folder of a run that did not come to its end
EVALUATIONS = 4  # of a run, where eval_steps does not say it
FREE_TO_CHANGE = {"output", "resume", "jobs", "device", "match", "match_kl", "baseline"}  # of a comparison that goes on


@explained(CompareConfig)
def compare(**settings: Any) -> Comparison:
    """Variants of a loss, each with several seeds, over the same model and pairs.

    Args:
        settings: the flags of `phi2 compare`; groups of them, such as lora and grid, may be dicts.
    Returns:
        What the comparison left behind: metrics as arrays, differences to the baseline, its runs.
    Raises:
        ValueError: for settings, variants, data or an output folder that cannot be used.
    """
    return run(config_of(CompareConfig, settings, DATA))


def run(config: CompareConfig) -> Comparison:
    """`compare` for settings in one object. Raises Interrupted after Ctrl-C: the same settings with resume go on."""
    variants = variants_of(config)
    resumed = open_comparison(config)
    bench = Bench(config, variants)
    bench.require_usable(resumed)
    left = [cell for cell in bench.cells if not cell.is_done]
    if left:
        bench.score_references()
    if config.jobs == 1 or len(left) < 2:
        for number, cell in enumerate(left, start=1):
            print(f"\n{cell} ({number} of {len(left)})", flush=True)
            bench.run(cell)
    else:
        _run_in_processes(config, left)
    require_any_result(bench.cells)
    write_results(config, bench.cells)
    comparison = Comparison(config.output)
    write_page(comparison)
    return comparison


@dataclass(frozen=True)
class Cell:
    """A run of a comparison: a variant with a seed.

    Attributes:
        total: its updates.
    """

    variant: Variant
    seed: int
    config: DPOConfig
    total: int

    @property
    def is_done(self) -> bool:
        """A run writes its card last, one that failed why."""
        return self.failure is not None or (Path(self.config.output) / "README.md").is_file()

    @property
    def failure(self) -> str | None:
        """Why the run did not end."""
        path = Path(self.config.output) / FAILURE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


class Bench:
    """What the runs of a comparison share: the session, and what references say, each asked once."""

    def __init__(self, config: CompareConfig, variants: Sequence[Variant]) -> None:
        self.config, self.variants = config, variants
        self.session = start(variants[0].config)
        self.references: dict[tuple[str, bool], tuple[Reference, Phi2ForCausalLM | None]] = {}

    @cached_property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed for each variant."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        return [self._cell(variant, seed) for variant in self.variants for seed in seeds]

    def _cell(self, variant: Variant, seed: int) -> Cell:
        config = variant.config
        total = total_steps(config, windows_of(config, len(self.session.rows.train)))
        dpo.require_moves(config, total)
        config = replace(
            config,
            seed=seed,
            output=str(Path(self.config.output) / "cells" / variant.folder / str(seed)),
            resume=self.config.resume,
            eval_steps=config.eval_steps or ceil(total / EVALUATIONS),
            reference_cache=config.reference_cache or (self.cache if config.precompute_ref_log_probs else None),
        )
        return Cell(variant, seed, config, total)

    @property
    def cache(self) -> str:
        """Folder of the log-probabilities of references."""
        return self.config.reference_cache or str(Path(self.config.output) / "reference")

    def require_usable(self, resumed: bool) -> None:
        """Refuses inputs that have changed since the comparison began, and any loss that could not be trained."""
        session, rows = self.session, self.session.rows
        self._require_tasks()
        inputs = inputs_of(self.variants[0].config, session.tokenizer, rows.train, rows.evaluation, session.dtype)
        for variant in self.variants:
            found = dpo.preference_inputs(variant.config, variant.loss)
            inputs |= {f"{what} of {variant.name}": digest for what, digest in found.items()}
            with named(f"variant {variant.name}"):
                self._require_trainable(variant)
        alone = next((row for row in rows.evaluation if len(row.answers) == 1), None)
        if alone is not None:
            raise ValueError(
                f"a comparison ranks answers to one held-out prompt, and {alone.origin} has one answer with a label:"
                " give pairs or lists"
            )
        require_same_inputs(Path(self.config.output), inputs, resumed)

    def _require_tasks(self) -> None:
        """Refuses tasks that the model could not be asked, and loads their data."""
        given = self.config.evaluation
        if given is not None and (given.apply_chat_template or TOY in given.tasks):
            require_chat_template(self.config.model, self.session.tokenizer)
        _ = self.loaded

    def _require_trainable(self, variant: Variant) -> None:
        """Refuses rows that the loss of a variant cannot be given, and a loss that is not what it says."""
        loss, sets = variant.loss, self.session.rows
        train, held_out = (rows_for(loss, each) for each in (sets.train, sets.evaluation))
        require_both_labels(loss, train)
        require_neighbours(loss, windows_of(variant.config, len(train)).size)
        look_at_loss(loss, *with_weights(variant.config, train, held_out))

    def score_references(self) -> None:
        """Every reference is asked once for all pairs that any run will see, in an order that depends on no run."""
        for cell in self.cells:
            self.reference(cell.config)
            self.reference(self.measured_from(cell.config))

    def measured_from(self, config: DPOConfig) -> DPOConfig:
        """The settings of a run with the reference that all runs are measured from: the comparison's own, where it
        begins. A start has one name in full training and another with an adapter."""
        asked = self.config.reference
        return replace(config.at_start(), reference="auto" if asked in STARTS else asked)

    def reference(self, config: DPOConfig) -> tuple[Reference, Phi2ForCausalLM | None]:
        """Log-probabilities of the pairs of all runs, known for good, and the model that gives them."""
        key = (reference_kind(config), config.lora is None)
        if key not in self.references:
            asked = replace(config.at_start(), precompute_ref_log_probs=True, reference_cache=self.cache)
            with self.session.policy(asked) as model:
                scored = reference_of(self.session, asked, model, None, self.pairs)
            self.references[key] = scored, start_of(self.session, config)
        return self.references[key]

    @cached_property
    def pairs(self) -> Sequence[EncodedPreference]:
        """Those that a run with a reference will see, in the order of the data, and the held-out ones; then what such
        runs set behind other prompts."""
        train, held_out, _ = self.session.rows
        seen: set[int] = set()
        others: list[EncodedPreference] = []
        for cell in self.cells:
            if cell.config.precompute_ref_log_probs:
                windows, loss = windows_of(cell.config, len(train)), cell.variant.loss
                seen.update(windows.until(cell.total))
                others += dpo.others_to_score(cell.config, loss, windows, cell.total, train, held_out)
        return Joined(train.take(sorted(seen)), held_out, others)

    @cached_property
    def loaded(self) -> Loaded | None:
        """Tasks of the harness, with their data."""
        return None if self.config.asked is None else tasks_of(self.config.asked)

    def _tasks(self, cell: Cell) -> Tasks | None:
        """What a run is asked, behind the last update or wherever a value at equal KL may be read."""
        asked = self.config.asked
        if asked is None or (self.config.evaluation is None and self.session.tokenizer.chat_template is None):
            return None
        return Tasks(asked, self.loaded, range(cell.total + 1) if self.config.match == "kl" else (cell.total,))

    def run(self, cell: Cell) -> None:
        """Runs a cell, or goes on with it. One that fails, as where the loss is no number any more, leaves why."""
        common = self.measured_from(cell.config)
        known, start = self.reference(common)
        moves, other = cell.config.sync_ref_model, reference_kind(cell.config) != reference_kind(common)
        elsewhere = cell.variant.loss.reference_free or moves or other  # what its own evaluations look from
        measure = Measure(self.session, cell.config, known, start, elsewhere, self._tasks(cell))
        try:
            write_report(dpo.fit(self.session, cell.config, measure))
        except ValueError as error:
            print(f"{cell} failed: {error}")
            write_whole(Path(cell.config.output) / FAILURE, f"{error}\n")


@contextmanager
def named(which: str) -> Iterator[None]:
    """Says of which variant or run a refusal is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{which}: {error}") from error


def open_comparison(config: CompareConfig) -> bool:
    """Makes the folder, or checks that the comparison in it can go on; returns whether it has begun already.

    Raises:
        ValueError: when the folder holds another comparison, or something else, or `resume` is off.
    """
    output = Path(config.output)
    require_folder(output)
    path = output / SETTINGS
    begun = any(output.glob("cells/*/*/config.yaml"))
    if begun and not config.resume:
        raise ValueError(f"{output} holds a comparison already; give another output, or resume: true to go on with it")
    if begun:
        require_same_settings(path, config, FREE_TO_CHANGE, "comparison")
    elif not path.exists() and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} exists and holds no comparison; give another output")
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in to_plain(config).items() if name != "resume"}
    write_whole(path, yaml.safe_dump(kept, sort_keys=False))
    return begun


def require_any_result(cells: Sequence[Cell]) -> None:
    """Raises ValueError when no run came to its end."""
    first = cells[0]
    if all(cell.failure is not None for cell in cells):
        raise ValueError(f"every run failed; {first}: {first.failure}")


def write_results(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """results.jsonl, a line for each run; one that failed has no metrics."""
    curves = [[] if cell.failure is not None else curve_of(Run(cell.config.output)) for cell in cells]
    if config.match == "kl":
        farthest = farthest_common_kl([curve for curve in curves if curve])
        kl = config.match_kl or farthest
        found = [at_kl(curve, kl) for curve in curves]
        if not any(found):
            raise ValueError(
                f"match_kl {kl:g}: no run has a value there; the largest KL that all reach is {farthest:g}"
            )
    else:
        found = [curve[-1] if curve else {} for curve in curves]
    lines = (json.dumps(_result(config, cell, metrics)) for cell, metrics in zip(cells, found, strict=True))
    write_whole(Path(config.output) / RESULTS, "".join(f"{line}\n" for line in lines))


def _result(config: CompareConfig, cell: Cell, metrics: dict[str, float]) -> dict[str, Any]:
    variant = cell.variant
    resolved = dpo.with_all_knobs(variant.config, variant.loss)
    failure = {} if cell.failure is None else {"failure": cell.failure}
    return {
        "variant": variant.name,
        "seed": cell.seed,
        "run": str(Path(cell.config.output).relative_to(config.output)),
        "loss": resolved.loss,
        "knobs": variant.loss.knobs,
        "settings": variant.own,
        "metrics": metrics,
        **failure,
    }


_bench: Bench | None = None  # of a process that shares the runs with others


def _run_in_processes(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Each process opens a session of its own."""
    jobs, threads = min(config.jobs, len(cells)), max(1, torch.get_num_threads() // config.jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _open, (config, threads))
    try:
        with pool, tqdm(total=len(cells), desc="compare", unit="run", dynamic_ncols=True) as bar:
            for cell in _finished(pool, cells, jobs):
                bar.set_postfix_str(str(cell))
                bar.update()
    except BrokenProcessPool as error:
        raise OSError("a process of the comparison was killed; go on with resume: true") from error
    except KeyboardInterrupt as interrupt:
        raise Interrupted("stopped; go on with resume: true") from interrupt


def _finished(pool: ProcessPoolExecutor, cells: Iterable[Cell], jobs: int) -> Iterator[Cell]:
    """Each cell when it is done. No more are handed out than are run, so that behind Ctrl-C none begins."""
    left, running = iter(cells), dict[Future, Cell]()

    def hand_out(count: int) -> None:
        for cell in islice(left, count):
            running[pool.submit(_run, cell.variant.name, cell.seed)] = cell

    hand_out(jobs)
    while running:
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            done.result()
            yield running.pop(done)
            hand_out(1)


def _open(config: CompareConfig, threads: int) -> None:
    global _bench
    end_with_parent()
    torch.set_num_threads(threads)
    shown = tqdm.__init__
    tqdm.__init__ = lambda *a, **b: shown(*a, **{**b, "disable": True})  # several bars in one line cannot be read
    with redirect_stdout(None):  # the first process has told of the rows
        _bench = Bench(config, variants_of(config))
        _ = _bench.cells


def _run(variant: str, seed: int) -> None:
    assert _bench is not None
    _bench.run(next(cell for cell in _bench.cells if (cell.variant.name, cell.seed) == (variant, seed)))
