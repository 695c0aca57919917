"""One LoRA DPO update on a CPU whose base is in bfloat16: against ours in float32, and against trl's in bfloat16.

A CPU that has no instructions for it makes them of many others, tens of times as slow: there it has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness.gpu import DeviceError
from benchmarks.harness.models import MEDIUM, TINY_WITH_TEXT, initialized, instruct_tokenizer
from benchmarks.harness.processes import Timer, compare_all
from benchmarks.harness.trainers import ROUNDED, Job, ours, prepare, real_records, toy_records, with_trl
from benchmarks.registry import Measure, Report, case, versions
from phi2.checkpoints.weights import load_tokenizer
from phi2.config import Phi2Config
from phi2.data.records import Record
from phi2.hub import resolve
from phi2.tokenizer import Tokenizer

INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them; the last is Arm's
SIZES = {
    "105 M": MEDIUM,
    "275 M": Phi2Config(
        hidden_size=960, intermediate_size=3840, num_hidden_layers=16, num_attention_heads=12, resid_pdrop=0.0
    ),
}


@case(
    "dpo_step_bf16_vs_fp32",
    turns=8,
    summary="LoRA DPO on a CPU: one step over 4 pairs in bfloat16, against our float32 and trl's bfloat16",
    tiny=lambda: report_of({"tiny": TINY_WITH_TEXT}, load_tokenizer(resolve("nano")), toy_records("preference"), 1),
)
def dpo_step_bf16_vs_fp32(turns: int) -> Report:
    """Worth choosing at 0.85 of the time."""
    if not INSTRUCTIONS & cpu_flags():
        raise DeviceError(f"it needs a CPU with one of {', '.join(sorted(INSTRUCTIONS))}, and this one has none")
    return report_of(SIZES, instruct_tokenizer(), real_records("preference"), turns)


def report_of(sizes: dict[str, Phi2Config], tokenizer: Tokenizer, records: Sequence[Record], turns: int) -> Report:
    measures: list[Measure] = []
    gates: list[str] = []
    for size, config in sizes.items():
        found, gate = compare_precisions(config, tokenizer, records, turns, size)
        measures, gates = measures + found, [*gates, f"{size}: {gate}"]
    return Report({"the other": ""} | versions("torch", "trl", "transformers", "peft"), "; ".join(gates), measures)


def cpu_flags() -> set[str]:
    """What instructions the CPU has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def compare_precisions(
    config: Phi2Config, tokenizer: Tokenizer, records: Sequence[Record], turns: int, size: str
) -> tuple[list[Measure], str]:
    """Times, and the gate in words; all three take turns, with the same weights."""
    with TemporaryDirectory() as folder:
        job = Job("preference", Path(folder), batch_size=4, dtype="bfloat16")
        prepare(job, initialized(config).bfloat16(), tokenizer, records)
        in_float32, trl = compare_all(ours, [ours_in_float32, with_trl], job, turns, ROUNDED[job.kind])
    measures = [
        *in_float32.times(target=0.85, name=f"{size}, ours in float32: "),
        *trl.times(target=None, name=f"{size}, trl in bfloat16: "),
    ]
    return measures, f"float32: {in_float32.agreement()}; trl: {trl.agreement()}"


def ours_in_float32(timer: Timer, job: Job) -> None:
    ours(timer, job._replace(dtype="float32"))
