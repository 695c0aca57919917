"""One optimizer step of ours against one of trl's on a CPU: a model of 105 M, float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness.models import MEDIUM, initialized, instruct_tokenizer
from benchmarks.harness.processes import compare
from benchmarks.harness.trainers import EXACT, Job, ours, prepare, real_records, with_trl
from benchmarks.registry import Report, case, versions


def compare_steps(turns: int, kind: str, batch_size: int, checkpointing: bool, time: float) -> Report:
    """Half the memory, and `time` of the time at most."""
    with TemporaryDirectory() as folder:
        job = Job(kind, Path(folder), batch_size, gradient_checkpointing=checkpointing)
        prepare(job, initialized(MEDIUM), instruct_tokenizer(), real_records(kind))
        result = compare(ours, with_trl, job, turns, EXACT)
    return Report(
        peer=versions("trl", "transformers", "peft"),
        gate=result.agreement(),
        measures=[*result.times(target=time), *result.memory(target=0.5)],
    )


compare_dpo = partial(compare_steps, kind="preference", batch_size=4, time=0.4)
compare_sft = partial(compare_steps, kind="supervised", batch_size=8, time=0.7)
CHECKPOINTED = "the same, both sides with gradient checkpointing"
case("dpo_step_vs_trl", 10, "LoRA DPO: one step over 4 pairs of up to 512 tokens")(
    partial(compare_dpo, checkpointing=False)
)
case("dpo_checkpointed_step_vs_trl", 10, CHECKPOINTED)(partial(compare_dpo, checkpointing=True))
case("sft_step_vs_trl", 10, "LoRA SFT: one step over 8 rows of up to 512 tokens")(
    partial(compare_sft, checkpointing=False)
)
case("sft_checkpointed_step_vs_trl", 10, CHECKPOINTED)(partial(compare_sft, checkpointing=True))
