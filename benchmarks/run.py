"""Runs benchmark cases and prints each twice: a table for people, then one JSON line for programs.

    python -m benchmarks.run --case dpo_step_vs_trl
    python -m benchmarks.run --list
    python -m benchmarks.run --case head --tiny

The JSON line is also appended to benchmarks/results/<device>.jsonl. No number comes out of a case whose sides do not
compute the same. --tiny runs what wants a GPU on tiny shapes wherever it is, its gate included: that it works is all
that it says. Its times mean nothing, so none is told or kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import stream
from benchmarks.harness.gpu import DeviceError
from benchmarks.registry import CASES, Cells, GateError, Measure, Report, Spread, load
from phi2.runs.folder import environment

load()
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when a gate is red, a side fails, or data or a device is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), action="append", default=[], help="what to measure")
    parser.add_argument("--turns", type=int, help="repetitions, in place of the case's own number")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, a GPU or not: the gate, and no result")
    parser.add_argument("--list", action="store_true", help="say what there is to measure")
    options = parser.parse_args(arguments)
    if options.tiny:
        require_tiny(parser, options)
    if options.list or not options.case:
        width = max(map(len, CASES))
        print("\n".join(f"{name:<{width}}  {case.summary}" for name, case in CASES.items()))
        return 0
    for name in options.case:
        try:
            run_tiny(name) if options.tiny else run(name, options.turns)
        except (GateError, DeviceError, FileNotFoundError, ChildProcessError) as error:
            print(f"{name}: no number: {error}", file=sys.stderr)
            return 1
    return 0


def run(name: str, turns: int | None) -> None:
    """Measures a case and publishes what it found."""
    load = os.getloadavg()[0]
    report = CASES[name].run(turns or CASES[name].turns)
    print(text := table(name, report))
    stream.tell(text)
    publish(name, report, load)


def require_tiny(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where a case has no tiny shapes, or a number of repetitions is given for what is not timed."""
    if not options.case:
        parser.error("--tiny needs a --case")
    if options.turns is not None:
        parser.error("--tiny measures nothing, so it takes no --turns")
    if missing := [name for name in options.case if CASES[name].tiny is None]:
        known = ", ".join(name for name, case in CASES.items() if case.tiny)
        parser.error(f"--tiny: {', '.join(missing)} has no tiny shapes; those that have: {known}")


def run_tiny(name: str) -> None:
    """Prints what a case says of tiny shapes. Triton reads when it is imported whether it is to interpret."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    report = CASES[name].tiny()
    print(table(name, replace(report, measures=[], table=[])))
    print("\n  tiny shapes: their times mean nothing, so none is told or kept")


def table(name: str, report: Report) -> str:
    peer, version = next(iter(report.peer.items()))
    lines = [f"{name}: {CASES[name].summary}", f"  gate green: {report.gate}"]
    lines += [f"  {key}: {value}" for key, value in report.facts.items()]
    measures = [_row(measure, f"{peer} {version}".rstrip()) for measure in report.measures]
    return "\n".join(lines + columns(measures) + columns(report.table))


def columns(rows: list[Cells]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell."""
    if not rows:
        return []
    cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["", *("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)]


def _row(measure: Measure, peer: str) -> Cells:
    sign, verdict = ">=" if measure.more_is_better else "<=", "met" if measure.is_met else "MISSED"
    return {
        "measure": measure.name,
        "unit": measure.unit,
        "ours": _cell(measure.ours),
        peer: _cell(measure.theirs),
        "ratio": f"{measure.ratio:.3f}",
        "target": "" if measure.target is None else f"{sign} {measure.target:.3g} {verdict}",
    }


def _cell(spread: Spread) -> str:
    median = f"{spread.median:,.3f}" if spread.median < 100 else f"{spread.median:,.0f}"
    return median if spread.low == spread.high else f"{median} ({spread.low:.3f}-{spread.high:.3f})"


def publish(name: str, report: Report, load: float) -> None:
    """Prints the JSON line and appends it to the file of this device."""
    here, device = environment(), device_name()
    line = {
        "case": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "load_before": round(load, 2),
        "commit": here["commit"],
        "python": here["python"],
        "packages": here["packages"] | report.peer,
        "gate": report.gate,
        **report.facts,
        **({"table": report.table} if report.table else {}),
        "measures": [{**asdict(m), "ratio": m.ratio, "is_met": m.is_met} for m in report.measures],
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    stream.tell(**line)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1).strip() if model else 'cpu'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
