"""The tuner drops what may not be shipped, never times what is wrong, and proposes only what is faster beyond doubt.

The clock alone needs a GPU; here it is set by hand.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from benchmarks import run, tune
from benchmarks.harness import aot, comparison, gpu, spec
from benchmarks.harness.aot import Row
from benchmarks.harness.spec import Entry, Shapes, label
from benchmarks.registry import GateError, Spread
from benchmarks.tune import OPS, Candidate, Timed, proposals, sieve
from phi2_kernels import gelu_triton
from phi2_kernels.attention_tiles_triton import AttentionLaunch as Tile

KERNELS = Path(gelu_triton.__file__).parent
GELU = OPS["gelu_forward"]
SHIPPED = GELU.shipped(80)
SPILLING, SMALLER = GELU.launch(80, (8, 1024, 1)), GELU.launch(80, (1, 1024, 4))


def test_the_sieve_drops_a_launch_that_spills_and_says_so():
    kept, dropped = sieve("gelu_forward", 80, [SPILLING, SHIPPED])
    assert (kept.launch, kept.faults) == (SHIPPED, "")
    assert dropped.launch == SPILLING and re.fullmatch(r"\d+ bytes of stack", dropped.faults)
    assert [each.rows[0].launch for each in (kept, dropped)] == ["n4 f1024", "n8 f1024"]


@pytest.fixture
def rows(monkeypatch) -> list[Row]:
    """Stands for the compiler: what each launch of the sieve compiles to, in their order."""
    made: list[Row] = []
    monkeypatch.setattr(aot, "rows_of", lambda arch, jobs: [[row] for row in made])
    return made


def row(efficiency: float, stack: int = 0, issue: float = 50) -> Row:
    """Bound by memory, which is busy for 100 clocks."""
    clocks = {"dram": 100.0, "issue": issue}
    return Row("gelu forward", "", "candidate", 80, 4, 64, stack, 0, 8, 0, True, [], 0, clocks, "dram", efficiency)


def test_the_sieve_ranks_by_efficiency_then_by_what_else_is_busy_and_puts_dropped_ones_last(rows):
    rows += [row(1.0, stack=64), row(0.5), row(1.0, issue=90), row(1.0, issue=40)]
    launches = [GELU.launch(80, (4, 1024, warps)) for warps in (1, 2, 4, 8)]
    assert [each.launch["num_warps"] for each in sieve("gelu_forward", 80, launches)] == [8, 4, 2, 1]


def test_every_form_of_a_kernel_must_keep_its_budgets():
    assert Candidate(SHIPPED, [row(1.0), row(0.4, stack=64)]).faults == "64 bytes of stack"


SHAPES = Shapes(B=2, H=3, S=5, D=4, C=64)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("S 2H C/32", (5, 6, 2), torch.bfloat16),
        ("B 7:float32", (2, 7), torch.float32),
        ("B S H D -> B H S D", (2, 3, 5, 4), torch.bfloat16),
    ],
)
def test_a_text_describes_a_tensor_of_random_numbers(text, shape, dtype):
    x = spec.make(text, SHAPES, comparison.random(0, torch.device("cpu")), torch.device("cpu"))
    assert x.shape == shape and x.dtype == dtype and x.float().std() > 0.05
    assert x.stride() == ((60, 4, 12, 1) if "->" in text else x.contiguous().stride())


@pytest.mark.parametrize(("text", "values"), [("7:int32%S", [0, 1, 2, 3, 4, 0, 1]), ("2:int64=C", [64, 64])])
def test_a_text_describes_a_tensor_of_integers(text, values):
    x = spec.make(text, SHAPES, comparison.random(0, torch.device("cpu")), torch.device("cpu"))
    assert x.tolist() == values and str(x.dtype)[6:] in text


def test_every_entry_of_every_launch_table_can_be_tuned():
    tables = [file.stem for file in KERNELS.glob("*_triton.py") if re.search(r"^LAUNCH = ", file.read_text(), re.M)]
    entries = {(op.file, key) for op in OPS.values() for key in op.table(80)}
    assert entries == {(op.file, op.key) for op in OPS.values()} and {file for file, _ in entries} == set(tables)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", OPS)
def test_the_shipped_launch_comes_first_and_no_launch_twice(name, arch):
    launches = OPS[name].launches(arch)
    assert launches[0] == OPS[name].shipped(arch) and 3 < len(launches) < 8
    assert len({label(launch) for launch in launches}) == len(launches)


def test_another_launch_runs_only_within_and_is_gone_after_an_error(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(gelu_triton, "_forward_kernel", Kernel())
    x = torch.empty(8, 1024)
    with pytest.raises(OSError), GELU.launched_as(80, SMALLER):
        gelu_triton.forward(x, x)
        raise OSError
    gelu_triton.forward(x, x)
    assert grids == [(8, 1), (2, 1)] and GELU.shipped(80) == SHIPPED


@pytest.fixture
def small(monkeypatch) -> None:
    """The calls of the tuner at shapes that the interpreter takes, where this machine can run them."""
    monkeypatch.setattr(spec, "PHI2", Shapes(B=1, C=64, F=96, H=1, N=9, S=70, V=300, CHUNK=3))
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("name", OPS)
def test_every_candidate_computes_what_the_shipped_launch_computes(name, small):
    launches = OPS[name].launches(80)
    found = tune.differences(OPS[name], 80, launches)
    assert found == {label(launch): "" for launch in launches}


@pytest.fixture
def clock(small, monkeypatch, tmp_path) -> dict[str, float]:
    """Stands for the GPU's clock: milliseconds by launch, 1 unless said otherwise; "timed" lists what was timed."""
    times: dict = {"timed": []}

    def timed(calls, turns):
        times["timed"] += calls
        return {name: [times.get(name, 1.0)] * turns for name in calls}

    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    return times


def altered(alter: Callable[[Tensor], Tensor]) -> Entry:
    """GELU, with a function between what it computes and what it says."""

    class Altered(Entry):
        def run(self, *inputs):
            return {name: alter(x) for name, x in super().run(*inputs).items()}

    return Altered(**vars(GELU))


def candidates() -> list[Candidate]:
    """Two within their budgets and one that is not."""
    return [Candidate(SMALLER, [row(1.0)]), Candidate(SHIPPED, [row(1.0)]), Candidate(SPILLING, [row(0.9, stack=64)])]


def test_times_come_in_a_table_and_a_json_line_that_is_kept(clock, capsys, tmp_path):
    clock |= {label(SHIPPED): 0.004, label(SMALLER): 0.002}
    timed = tune.clock("gelu_forward", 80, candidates(), 3)
    assert [(t.launch, t.time.median) for t in timed] == [(SHIPPED, pytest.approx(4)), (SMALLER, pytest.approx(2))]
    *table, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  n=4 f=1024 num_warps=4 .* 4.0 +4.0 +4.0 +shipped", table[4])
    assert table[5].endswith("dropped: 64 bytes of stack")
    line = json.loads(last)
    assert line["case"] == "tune_gelu_forward" and line["measures"][0]["ratio"] == pytest.approx(0.5)
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.read_text() == last + "\n"


def test_a_candidate_that_computes_something_else_is_never_timed(clock, monkeypatch, capsys):
    wrong_if_smaller = altered(lambda x: x * (1.5 if GELU.shipped(80) == SMALLER else 1))
    monkeypatch.setitem(OPS, "gelu_forward", wrong_if_smaller)
    timed = tune.clock("gelu_forward", 80, candidates(), 3)
    assert [t.launch for t in timed] == [SHIPPED] and clock["timed"] == [label(SHIPPED)]
    assert "dropped: y is off by 5.0e-01" in capsys.readouterr().out


def test_an_output_that_a_candidate_forgets_is_seen(small):
    assert tune.differences(altered(torch.empty_like), 80, [SMALLER]) == {label(SMALLER): "y is off by nan"}


def test_without_repeatable_numbers_of_the_shipped_launch_there_are_no_times(clock, monkeypatch, tmp_path):
    monkeypatch.setitem(OPS, "gelu_forward", altered(torch.rand_like))
    with pytest.raises(GateError, match="gelu_forward: the shipped launch, n=4 f=1024 num_warps=4: y is off by"):
        tune.clock("gelu_forward", 80, candidates(), 3)
    assert clock["timed"] == [] and not (tmp_path / "results").exists()


def times(*launches: tuple[Tile | dict, float], width: float = 1.0) -> list[Timed]:
    return [Timed(launch, Spread(us - width / 2, us, us + width / 2)) for launch, us in launches]


@pytest.mark.parametrize(("us", "proposed"), [(98.0, {"gelu_forward": SMALLER}), (99.5, {}), (101.0, {})])
def test_a_launch_is_proposed_when_it_saves_more_than_the_spread(us, proposed):
    assert proposals({"gelu_forward": times((SHIPPED, 100.0), (SMALLER, us))}, 80) == proposed


def test_forward_and_dq_are_chosen_together_with_one_block_m():
    wide, narrow, fast = Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)
    forward = times((wide, 100.0), (narrow, 80.0))
    both = {"attention_forward": forward, "attention_dq": times((wide, 100.0), (fast, 110.0))}
    assert proposals(both, 80) == {"attention_forward": narrow, "attention_dq": fast}
    costly = {"attention_forward": forward, "attention_dq": times((wide, 100.0), (fast, 130.0))}
    assert proposals(costly, 80) == {}
    assert proposals({"attention_forward": forward}, 80) == {}  # dq stays as it is shipped


def test_a_proposal_reads_like_the_table_it_is_for():
    (line,) = tune.advice({"attention_dkdv": Tile(32, 64, 4, 2)}, 80)
    where, _, entry = line.partition(": ")
    assert where == f"{OPS['attention_dkdv'].file}.py, LAUNCH[80]"
    assert eval("{" + entry + "}", {"AttentionLaunch": Tile}) == {"dkdv": Tile(32, 64, 4, 2)}


def test_without_a_gpu_it_prints_the_static_half_and_says_what_is_missing(rows, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows += [row(1.0)] * len(GELU.launches(80))
    assert tune.main(["--op", "gelu_forward"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "gelu_forward, sm_80" and any(line.endswith(" shipped") for line in out)
    assert out[-1] == "in the order of the static model; times need a GPU"


def test_on_a_gpu_the_launch_to_write_into_the_table_comes_last(small, rows, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "clock", lambda *_: times((SHIPPED, 100.0), (SMALLER, 50.0)))
    rows += [row(1.0)] * len(GELU.launches(80))
    assert tune.main(["--op", "gelu_forward"]) == 0
    assert capsys.readouterr().out == f'gelu_triton.py, LAUNCH[80]: "forward": {SMALLER},\n'


def test_an_unknown_op_ends_in_one_line_that_lists_the_ops(capsys):
    assert tune.main(["--op", "gelu_forward,soft_max"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"--op must be some of {', '.join(OPS)}, got soft_max\n"


def test_a_compiler_that_fails_ends_in_one_line(monkeypatch, capsys):
    def fail(*_):
        raise ChildProcessError("benchmarks.harness.aot ended with exit code 1")

    monkeypatch.setattr(aot, "rows_of", fail)
    assert tune.main(["--op", "gelu_forward"]) == 1
    assert capsys.readouterr().err == "no number: benchmarks.harness.aot ended with exit code 1\n"
