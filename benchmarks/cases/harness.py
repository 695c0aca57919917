"""Our model in lm-evaluation-harness against the harness's own `hf` backend, on the same requests of the card's tasks.

Multiple choice is MMLU, TruthfulQA and Winogrande; written answers are IFEval's and GSM8K's, cut at 64 tokens. The
models are nano, with one shot, so that prompts fit its context of 512 tokens; and a random Phi of 30 M with the
tokenizer and the context of phi-2-instruct, and the shots of its model card.
"""

from __future__ import annotations

import os
import zlib
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.harness.models import initialized, save, shared_folder
from benchmarks.harness.processes import Timer, compare
from benchmarks.registry import Report, case, versions
from phi2.config import Phi2Config
from phi2.hub import resolve

CHOICES, WRITTEN = ("mmlu", "truthfulqa_mc2", "winogrande"), ("ifeval", "gsm8k")
NEW_TOKENS = 64
SIZES = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
RANDOM = Phi2Config(**SIZES, partial_rotary_factor=0.5, initializer_range=0.1)
TOLERANCE = {"log_likelihoods": 2e-6, "texts": 0.0}  # of the largest, hundreds of nats: 1e-4 or so


class Job(NamedTuple):
    """What both load and answer: so many samples of each task."""

    folder: Path
    tasks: tuple[str, ...]
    samples: int
    shots: int | None
    batch_size: int  # of theirs; padding makes 1 the fastest where nothing is generated


def compare_answers(
    turns: int, tasks: tuple[str, ...], samples: int, shots: int | None, batch_size: int, target: float
) -> Report:
    """Of nano, or, with the shots of the card, of the random model."""
    with TemporaryDirectory() as name:
        folder = resolve("nano") if shots else Path(name)
        if not shots:
            save(initialized(RANDOM), folder)
        job = Job(folder, tasks, samples, shots, batch_size)
        result = compare(ours, theirs, job, turns, TOLERANCE)
    return Report(
        peer=versions("transformers", "lm-eval"),
        gate=f"log-likelihoods apart by at most {result.largest_difference['log_likelihoods']:.0e} of the largest,"
        " texts equal",
        measures=result.speeds(target=target),
    )


case("harness_choice_vs_hf", 5, "log-likelihoods of multiple choice in lm-evaluation-harness, nano")(
    partial(compare_answers, tasks=CHOICES, samples=10, shots=1, batch_size=1, target=3.0)
)
case("harness_written_vs_hf", 5, "written answers in lm-evaluation-harness, nano")(
    partial(compare_answers, tasks=WRITTEN, samples=8, shots=1, batch_size=8, target=1.5)
)
case("harness_choice_30m_vs_hf", 3, "the same multiple choice, a random 30 M with the real tokenizer")(
    partial(compare_answers, tasks=CHOICES, samples=3, shots=None, batch_size=1, target=3.0)
)
case("harness_written_30m_vs_hf", 3, "the same written answers, a random 30 M with the real tokenizer")(
    partial(compare_answers, tasks=WRITTEN, samples=4, shots=None, batch_size=4, target=1.5)
)


def ours(timer: Timer, job: Job) -> None:
    from phi2.evaluation.harness import Phi2LM

    _answer(timer, job, Phi2LM(str(job.folder), device="cpu", dtype="float32"))


def theirs(timer: Timer, job: Job) -> None:
    from lm_eval.models.huggingface import HFLM

    made = HFLM(str(job.folder), device="cpu", dtype="float32", batch_size=job.batch_size)
    _answer(timer, job, made)


def _answer(timer: Timer, job: Job, model: Any) -> None:
    requests = _requests(job, model)
    while True:
        timer.start()
        found = {kind: getattr(model, kind)(of_kind, disable_tqdm=True) for kind, of_kind in requests.items()}
        timer.stop()
        scored, texts = (found.get(kind, []) for kind in ("loglikelihood", "generate_until"))
        timer.report(
            log_likelihoods=[total for total, _ in scored] or [0.0],
            texts=[float(zlib.crc32(text.encode())) for text in texts] or [0.0],
        )


def _requests(job: Job, model: Any) -> dict[str, list[Any]]:
    """Of every task, as the harness builds them with the model's chat template."""
    from phi2.evaluation.tasks import load_tasks

    os.environ.setdefault("NLTK_DATA", str(shared_folder() / "data" / "nltk_data"))
    requests: dict[str, list[Any]] = {}
    data = str(shared_folder() / "data" / "eval")
    for task in load_tasks(job.tasks, data, job.shots).tasks["tasks"].values():
        task.set_fewshot_seed(0)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": NEW_TOKENS}, update=True)
        task.build_all_requests(
            limit=job.samples, apply_chat_template=True, chat_template=model.apply_chat_template, tokenizer_name="both"
        )
        for instance in task.instances:
            requests.setdefault(instance.request_type, []).append(instance)
    return requests
