"""What is evaluated and how: settings, which the command line reads without loading torch or the harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from phi2.inference.config import LoadConfig

TOY = "toy"  # the task that needs no harness
TOY_ONLY, HARNESS_ONLY = (
    ("questions", "seed"),
    (*("limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "max_gen_toks", "data_dir"),),
)


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """What a model is asked.

    Raises:
        ValueError: for a value out of range, and for a setting that nothing would read.
    """

    tasks: Sequence[str] | str = (TOY,)
    """toy (five skills that code grades), or tasks of lm-evaluation-harness: ifeval, gsm8k, mmlu, truthfulqa_mc2 and
    winogrande are those of phi-2-instruct's model card."""
    limit: int | None = None
    """Samples of each task, the first ones; unset, all."""
    num_fewshot: int | None = None
    """Shots of every task that has any; unset, those of the model card (5; none for ifeval and truthfulqa_mc2), else
    the task's own."""
    apply_chat_template: bool = False
    """Show prompts in the model's chat template, as the model card does."""
    fewshot_as_multiturn: bool = False
    """Show each shot as a question and an answer of the conversation; else all stand in one turn, as in the card."""
    max_gen_toks: int | None = None
    """Tokens of a written answer at most; unset, what the task says (ifeval 1280, gsm8k 256)."""
    data_dir: str | None = None
    """Folder of .jsonl or .json files with the data of the card's tasks, in place of the hub."""
    questions: int = 100
    """Held-out questions of each toy skill."""
    seed: int = 0
    """Of the choice of toy questions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names("tasks", self.tasks))
        for name, least in (("questions", 1), ("limit", 1), ("num_fewshot", 0), ("max_gen_toks", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn makes turns of a chat: it needs apply_chat_template")
        self._require_readers()

    def _require_readers(self) -> None:
        for name in HARNESS_ONLY if not self.harness_tasks else TOY_ONLY if TOY not in self.tasks else ():
            default = next(field.default for field in fields(self) if field.name == name)
            if getattr(self, name) != default:
                raise ValueError(f"{name} means nothing to the tasks {', '.join(self.tasks)}")

    @property
    def harness_tasks(self) -> list[str]:
        return [task for task in self.tasks if task != TOY]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadConfig, TasksConfig):
    """Models, and what each is asked."""

    model: Sequence[str] | str
    """Folder, hub id, "nano" or "nano-instruct"; or the folder of a run or an adapter, whose base is found by itself.
    Several, with commas or by giving the flag again, stand side by side, and the others are compared with the first."""
    output: str | None = None
    """Folder for scores, samples and report.html; what it holds of a killed evaluation is not computed again. Unset, it
    is runs/evaluate, and the toy skills alone write nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _names("model", self.model))
        super().__post_init__()
        if self.adapter is not None and len(self.model) > 1:
            raise ValueError("adapter goes with one model; name the folders of adapters or runs as models instead")


def _names(setting: str, given: Sequence[str] | str) -> tuple[str, ...]:
    """Single names of a text, or of several, with commas between."""
    texts = [given] if isinstance(given, str) else given
    names = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(f"{setting} must name at least one, got {given!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{setting} names {twice[0]!r} twice")
    return names
