"""A benchmark gives a number only when both compute the same, and then it gives it twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.cases import bfloat16
from benchmarks.harness import trainers
from benchmarks.harness.processes import WARM_UP, compare, compare_all
from benchmarks.registry import CASES, Case, GateError, Measure, Report, Spread

WORKERS = """
import time

def slow(timer, job):
    play(timer, 0.05, 1.0)

def fast(timer, job):
    ballast = bytearray(job)
    play(timer, 0.01, 1.0)

def wrong(timer, job):
    play(timer, 0.01, 1.01)

def broken(timer, job):
    raise OSError("no such model")

def play(timer, seconds, result):
    while True:
        timer.start()
        held = bytearray(40 * 2**20) if seconds > 0.02 else None
        time.sleep(seconds)
        timer.stop()
        timer.report(loss=[result, 2 * result])
"""
EVEN = Spread(1.0, 1.0, 1.0)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that child processes can import too."""
    (tmp_path / "toy_workers.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_workers

    return toy_workers


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def add_case(monkeypatch: pytest.MonkeyPatch, function) -> None:
    monkeypatch.setitem(CASES, "toy", Case(function, 5, "a toy"))


def report_of(ours: Spread, theirs: Spread, **more) -> Report:
    return Report({"peer": "1.0"}, "all equal", [Measure("time", "relative", ours, theirs, **more)], {"threads": 1})


def test_two_that_agree_are_timed_and_weighed_in_their_own_processes(workers):
    result = compare(workers.fast, workers.slow, 200 * 2**20, turns=5, tolerance={"loss": 1e-6})
    assert len(result.ours) == len(result.theirs) == WARM_UP + 5
    assert result.largest_difference == {"loss": 0.0}
    assert result.times(target=0.5)[0].ratio < 0.8  # about 0.2 on an idle machine
    whole, grown = result.memory()
    assert whole.ours.median > whole.theirs.median + 100  # the ballast was there before
    assert grown.theirs.median > grown.ours.median + 30  # what a turn takes


def test_two_that_differ_end_without_a_number(workers):
    with pytest.raises(GateError, match="turn 1: loss differs by 1.0e-02 of its size, allowed 1e-03"):
        compare(workers.wrong, workers.slow, 0, turns=1, tolerance={"loss": 1e-3})


def test_each_of_several_is_held_to_ours(workers):
    with pytest.raises(GateError, match="turn 1: loss differs by 9.9e-03 of its size"):
        compare_all(workers.fast, [workers.fast, workers.wrong], 0, turns=1, tolerance={"loss": 1e-3})


def test_one_that_fails_is_named(workers):
    with pytest.raises(ChildProcessError, match="broken ended before its turn"):
        compare(workers.broken, workers.slow, 0, turns=1, tolerance={"loss": 1e-3})


def test_a_case_prints_a_table_and_then_one_json_line_that_is_also_kept(results, monkeypatch, capsys):
    add_case(monkeypatch, lambda turns: report_of(Spread(0.2, 0.25, 0.3), Spread(0.4, 0.5, 0.6), target=0.4))
    assert run.main(["--case", "toy"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("peer 1.0" in line for line in table) and table[-1].endswith("0.500  <= 0.4 MISSED")
    line = json.loads(last)
    assert line["measures"][0]["ratio"] == 0.5 and line["measures"][0]["is_met"] is False
    assert line["packages"]["peer"] == "1.0" and line["commit"] and line["date"]
    (kept,) = results.iterdir()
    assert kept.read_text() == last + "\n"


def test_results_are_added_to_not_replaced(results, monkeypatch, capsys):
    add_case(monkeypatch, lambda turns: report_of(EVEN, EVEN))
    assert run.main(["--case", "toy", "--case", "toy"]) == 0
    (kept,) = results.iterdir()
    assert len(kept.read_text().splitlines()) == 2


def test_a_red_gate_prints_no_number_and_fails(results, monkeypatch, capsys):
    def red(turns: int) -> Report:
        raise GateError("turn 1: loss differs")

    add_case(monkeypatch, red)
    assert run.main(["--case", "toy"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == "toy: no number: turn 1: loss differs\n"
    assert not results.exists()


@pytest.mark.parametrize(("flags", "is_measured"), [({"avx2", "avx512_bf16"}, True), ({"avx2"}, False)])
def test_bfloat16_is_measured_where_the_cpu_has_it(flags, is_measured, results, monkeypatch, capsys):
    monkeypatch.setattr(bfloat16, "cpu_flags", lambda: flags)
    monkeypatch.setattr(bfloat16, "report_of", lambda *_: report_of(EVEN, EVEN))
    monkeypatch.setattr(bfloat16, "instruct_tokenizer", lambda: None)
    monkeypatch.setattr(bfloat16, "real_records", lambda kind: None)
    assert run.main(["--case", "dpo_step_bf16_vs_fp32"]) == (0 if is_measured else 1)
    needed = "it needs a CPU with one of amx_bf16, avx512_bf16, bf16, and this one has none"
    assert (needed in capsys.readouterr().err) is not is_measured


def test_without_the_real_data_it_says_what_is_needed(results, monkeypatch, capsys):
    monkeypatch.delenv("PHI2_SHARED", raising=False)
    assert run.main(["--case", "dpo_step_vs_trl"]) == 1
    assert "set PHI2_SHARED to a folder that holds tokenizer/phi-2-instruct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "more_is_better", "met"), [(0.4, False, True), (0.6, False, False), (0.6, True, True)]
)
def test_a_target_is_met_on_its_side_of_the_ratio(ratio, more_is_better, met):
    measure = Measure("x", "relative", Spread(0, ratio, 1), EVEN, target=0.5, more_is_better=more_is_better)
    assert measure.is_met is met


class Turns:
    """A clock that notes what it is told, and ends the worker at its third turn."""

    def __init__(self) -> None:
        self.told: list[str | set[str]] = []

    def start(self) -> None:
        if self.told.count("start") == 2:
            raise KeyboardInterrupt
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")

    def report(self, **results: float) -> None:
        self.told.append({name for name, value in results.items() if value > 0})


@pytest.mark.parametrize("kind", ["preference", "supervised"])
def test_our_loop_takes_turns_one_for_each_update(kind, tiny_phi, pair_data, sft_data, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(tiny_phi)
    (tmp_path / "rows.jsonl").symlink_to(pair_data if kind == "preference" else sft_data)
    monkeypatch.setitem(trainers.LORA, "target_modules", ["q_proj"])
    turns = Turns()
    with pytest.raises(KeyboardInterrupt):
        trainers.ours(turns, trainers.Job(kind, tmp_path, batch_size=2))
    assert turns.told == ["start", "stop", {"loss", "grad_norm"}] * 2
