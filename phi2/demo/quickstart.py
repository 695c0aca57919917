"""The whole recipe in miniature: what was done to Phi-2, done to the tiny model of this package, in minutes on a CPU.

    base -> SFT of all weights -> DPO with LoRA -> merge -> grades of all three -> a chat -> report.html
                                  and other losses beside it, each with two seeds -> compare/report.html

Every step is what a user would write for the large model: the same configs, the same functions, other numbers. SFT
trains all weights here because the base has never seen a chat, and a model of 5 million weights has no rank to spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import perf_counter

from phi2.checkpoints.convert import merge_adapter
from phi2.checkpoints.weights import load
from phi2.data.sources import DataSpec
from phi2.evaluation.toy import Score, evaluate
from phi2.inference.chat import ChatSession
from phi2.lab import compare
from phi2.lab.compare_config import CompareConfig
from phi2.lab.comparison import Comparison
from phi2.lab.report import write_comparison, write_report
from phi2.lora_config import LoraConfig
from phi2.training import dpo, sft

BASE = "nano"
LORA = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"))
LOSSES, SEEDS = ("sigmoid", "ipo", "simpo"), 2
SMALL_TALK = ("Where does the owl live?", "And what does it eat?")  # no longer than the chats it was trained on
SAMPLE_PROMPTS = [
    "What colour is the cat? Use three words.",
    "Where does the hen live? Say it twice.",
    "What is 7 + 4?",
]


@dataclass(frozen=True)
class Budget:
    """How much is spent; the defaults take four minutes on two free cores."""

    sft_steps: int = 240
    """Updates of supervised fine-tuning, of 32 conversations each."""
    dpo_steps: int = 160
    """Updates of preference optimisation, of 16 pairs each."""
    questions: int = 200
    """Held-out questions of each skill, asked to every model."""
    held_out_rows: int = 200
    """Rows that a run is evaluated on."""
    compare_steps: int = 30
    """Updates of each run of the comparison of losses, of 8 pairs each."""

    def __post_init__(self) -> None:
        for name in ("sft_steps", "dpo_steps", "questions", "held_out_rows", "compare_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def quickstart(output: str = "runs/quickstart", seed: int = 0, budget: Budget | None = None) -> Path:
    """Runs the recipe, prints a table and returns the path of the report.

    Args:
        output: folder to make, for the two runs and the report.
        seed: of the data's order, the adapters and the questions.
        budget: how much is spent.

    Raises:
        ValueError: when `output` exists.
    """
    folder, budget, start = Path(output), budget or Budget(), perf_counter()
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or give another output")
    _say("SFT: shows the base model how to answer")
    models = {"base": BASE, "SFT": str(fine_tune(folder / "sft", seed, budget))}
    _say("DPO: shows it which of two answers is better")
    models["DPO"] = str(align(folder / "dpo", models["SFT"], seed, budget))

    scores: dict[str, dict[str, Score]] = {}
    for name, model in models.items():
        _say(f"Grading {name}: {budget.questions} held-out questions of each skill")
        scores[name] = evaluate(*load(model), budget.questions, seed)
    conversation = talk(models["DPO"])
    _say(f"Comparing {', '.join(LOSSES)}: {SEEDS} runs each from the SFT model")
    comparison = compare_losses(folder / "compare", models["SFT"], seed, budget)
    runs = {"The SFT run": folder / "sft", "The DPO run": folder / "dpo"}
    report = write_comparison(folder / "report.html", "Phi-2's recipe in miniature", scores, runs, conversation)
    _say(f"Done in {perf_counter() - start:.0f} s. Right answers, with 95 % intervals:")
    print(score_table(scores))
    print("\n" + "\n".join(f"{message['role']:>9}: {message['content']}" for message in conversation))
    print(f"\n{comparison}")
    print(f"\nreport    {report}\nlosses    {comparison.path / 'report.html'}")
    print(f"chat      phi2 chat --model {models['DPO']}")
    return report


def fine_tune(run: Path, seed: int, budget: Budget) -> Path:
    """Supervised fine-tuning of the base model; returns the folder of the new model."""
    config = sft.SFTConfig(
        model=BASE,
        data="toy-sft",
        eval_data=[DataSpec("toy-sft", split="test", rows=budget.held_out_rows)],
        eval_steps=ceil(budget.sft_steps / 4),
        output=str(run),
        lora=None,
        train_on="assistant",
        max_length=256,
        max_steps=budget.sft_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        seed=seed,
        sample_prompts=SAMPLE_PROMPTS,
    )
    sft.train(config)
    write_report(run)
    return run / "model"


def align(run: Path, model: str, seed: int, budget: Budget) -> Path:
    """Preference optimisation of the model that SFT left; returns the folder of the merged model.

    The likelihood of the chosen answers is part of the objective (`nll_weight`): at a learning rate that gets through
    in three minutes, DPO alone pushes both answers down, and the model forgets how to count.
    """
    config = dpo.DPOConfig(
        model=model,
        data="toy-dpo",
        eval_data=[DataSpec("toy-dpo", split="test", rows=budget.held_out_rows)],
        eval_steps=ceil(budget.dpo_steps / 4),
        output=str(run),
        lora=LORA,
        max_length=256,
        max_steps=budget.dpo_steps,
        per_device_train_batch_size=16,
        nll_weight=1.0,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        sample_prompts=SAMPLE_PROMPTS,
    )
    dpo.train(config)
    write_report(run)
    return merge_adapter(model, str(run / "adapter"), str(run / "model"))


def compare_losses(folder: Path, model: str, seed: int, budget: Budget) -> Comparison:
    """Which loss is better beyond noise: a small `phi2 compare`, from the model that SFT left."""
    config = CompareConfig(
        model=model,
        data="toy-dpo",
        eval_data=[DataSpec("toy-dpo", split="test", rows=budget.held_out_rows)],
        losses=[*LOSSES],
        seeds=SEEDS,
        seed=seed,
        eval_steps=budget.compare_steps,
        output=str(folder),
        lora=LoraConfig(r=8, target_modules=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
        max_length=256,
        max_steps=budget.compare_steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
    )
    return compare.run(config)


def talk(model: str) -> Sequence[Mapping[str, str]]:
    """A short conversation with a model."""
    session = ChatSession(*load(model), max_new_tokens=48)
    for text in SMALL_TALK:
        session.reply(text)
    return session.transcript


def score_table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """Skills as rows, models as columns."""
    skills = next(iter(scores.values()))
    rows = [["", *scores], *([skill, *(str(of_model[skill]) for of_model in scores.values())] for skill in skills)]
    return "\n".join(f"{first:<12}" + "".join(f"{cell:>24}" for cell in rest) for first, *rest in rows)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
