"""The tuner drops what may not be shipped and never times what is wrong; specs describe what it launches.

The clock alone needs a GPU; here it is set by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import run, tune
from benchmarks.harness import aot, comparison, gpu, spec
from benchmarks.harness.aot import Row
from benchmarks.harness.comparison import OURS
from benchmarks.harness.spec import ENTRIES, Entry, Shapes, label
from benchmarks.registry import CASES, GateError
from phi2_kernels import gelu_triton

KERNELS = Path(gelu_triton.__file__).parent
GELU = ENTRIES["gelu_forward"]
SHIPPED = GELU.shipped(80)
SMALLER = GELU.launch(80, (1, 1024, 4))
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
    cpu = torch.device("cpu")
    x = spec.make(text, SHAPES, cpu, comparison.random(0, cpu))
    assert x.shape == shape and x.dtype == dtype and x.float().std() > 0.05
    assert x.stride() == ((60, 4, 12, 1) if "->" in text else x.contiguous().stride())


@pytest.mark.parametrize(("text", "values"), [("7:int32%S", [0, 1, 2, 3, 4, 0, 1]), ("2:int64=C", [64, 64])])
def test_a_text_describes_a_tensor_of_integers(text, values):
    x = spec.make(text, SHAPES, torch.device("cpu"), None)
    assert x.tolist() == values and str(x.dtype)[6:] in text


def test_every_entry_of_every_launch_table_can_be_tuned():
    tables = [file.stem for file in KERNELS.glob("*_triton.py") if re.search(r"^LAUNCH = ", file.read_text(), re.M)]
    entries = {(entry.file, key) for entry in ENTRIES.values() for key in entry.table(80)}
    assert entries == {(entry.file, entry.key) for entry in ENTRIES.values()}
    assert {file for file, _ in entries} == set(tables)


@pytest.mark.parametrize("arch", spec.ARCHITECTURES)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_shipped_launch_comes_first_and_no_launch_twice(name, arch):
    launches = ENTRIES[name].launches(arch)
    assert launches[0] == ENTRIES[name].shipped(arch) and 3 < len(launches) < 8
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
    assert grids == [(8, 1, 1), (2, 1, 1)] and GELU.shipped(80) == SHIPPED


@pytest.fixture
def small(monkeypatch) -> None:
    """The calls of the tuner at shapes that the interpreter takes, where this machine can run them."""
    monkeypatch.setattr(spec, "PHI2", Shapes(B=1, C=32, F=96, H=1, N=9, S=70, V=300, CHUNK=3))
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_candidate_computes_what_the_shipped_launch_computes(name, small):
    launches = ENTRIES[name].launches(80)
    found = comparison.gate(tune.compare_launches(name, 80, launches))
    assert list(found.implementations) == [OURS, *map(label, launches[1:])] and not found.absent


def test_without_repeatable_numbers_of_the_shipped_launch_there_are_no_times(small, monkeypatch):
    class Random(Entry):
        def run(self, *inputs):
            return {name: torch.rand_like(x) for name, x in super().run(*inputs).items()}

    monkeypatch.setitem(ENTRIES, "gelu_forward", Random(**vars(GELU)))
    with pytest.raises(GateError, match="gelu_forward: x is off by"):
        comparison.gate(tune.compare_launches("gelu_forward", 80, [SHIPPED, SMALLER]))


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> None:
    """Stands for the compiler: of GELU's launches the last one spills."""

    def compiled(jobs):
        stacks = [0] * (len(jobs) - 1) + [64]
        return [[Row("gelu forward", "", name, arch, f"sm_{arch}", 4, 64, stack, 0, 0, True, [], 0)]
                for (arch, name, _), stack in zip(jobs, stacks, strict=True)]  # fmt: skip

    monkeypatch.setattr(aot, "compiled", compiled)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tune, "CASES", CASES.copy())
    monkeypatch.setattr(run, "CASES", tune.CASES)


def test_what_is_within_the_budgets_is_timed_beside_the_shipped_launch(compiler, small, monkeypatch):
    fast = label(SMALLER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "measured_rates", lambda: gpu.Rates(1, 1))
    monkeypatch.setattr(gpu, "peak_memory", lambda implementation, inputs: 0.0)
    monkeypatch.setattr(gpu, "timed", lambda calls, turns: {name: [0.5 if name == fast else 1.0] for name in calls})
    report = tune.tune("gelu_forward", 1)
    launches = list(map(label, GELU.launches(80)))
    assert report.facts[f"dropped {launches[-1]}"] == "64 bytes of stack"
    assert [row["side"] for row in report.table] == [OURS, *launches[1:-1]]
    (best,) = (measure for measure in report.measures if "best" in measure.name)
    assert (best.ratio, best.is_met) == (0.5, False)


def test_without_a_gpu_it_prints_what_each_launch_occupies(compiler, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["gelu_forward"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["gate"] == "compiled only: times need a GPU" and line["measures"] == []
    assert [row["candidate"] for row in line["table"]] == 2 * list(map(label, GELU.launches(80)))
    assert line["table"][-1]["violations"] == "64 bytes of stack"


def test_an_unknown_entry_ends_with_the_ones_there_are(capsys):
    with pytest.raises(SystemExit):
        tune.main(["gelu_forward", "soft_max"])
    assert f"some of {', '.join(ENTRIES)}, got soft_max\n" in capsys.readouterr().err
